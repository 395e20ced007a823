"""How often Teachers lead to right videos: ``python -m tools.teacher_success [TEACHER ...] [--device cuda]``.

Optimises the first scenes of the validation split and scenes out of domain (not those of the test), with the world's
own queries, as rows of one batch: on a GPU hundreds of instances take seconds, enough to tell a difference of a few
points from chance. Prints one line of JSON for each Teacher (default: the packaged one): success in domain and out of
it, of the first final video and of the one that the Teacher picks; mean updates; seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor

from recipes.microworld.teacher.lesson import Lesson
from recipes.microworld.teacher.pointing import Loras, RowAdam, Scenes
from recipes.microworld.training import load_config
from vlmteacher.decoders import SurrogateDecoder
from vlmteacher.evaluation.microworld import judge as verdict
from vlmteacher.evaluation.microworld import noise_seed
from vlmteacher.microworld import world
from vlmteacher.pipeline import PACKAGED_PAIR, TeacherPipeline
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.condition import Noise
from vlmteacher.settings import Settings, add_flags, given
from vlmteacher.teachers import load_teacher
from vlmteacher.teachers.qwen_vl import QwenVLTeacher

CHANGEABLE = ("threshold", "learning_rate", "goal_weight")
SPLITS = (("validation", 1), ("ood", 7))  # with their seeds


def optimise(
    reasoner: Reasoner,
    decoder: SurrogateDecoder,
    lesson: Lesson,
    loras: Loras,
    scenes: Scenes,
    z1: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """The LoRAs (rows, P) of all scenes after their optimisations, and the updates of each."""
    generator = torch.Generator().manual_seed(0)
    weights = loras.fresh(len(z1), generator).to(z1.device).requires_grad_()
    optimizer = RowAdam(weights.detach(), settings.learning_rate)
    working = torch.ones(len(z1), dtype=torch.bool, device=z1.device)
    updates = torch.zeros(len(z1), device=z1.device)
    for _ in range(settings.max_steps):
        with loras.on(weights):
            latents = reasoner.predict_clean_at(scenes.condition(), z1, 1.0)
        frames = decoder.decode_batch(latents)[:, lesson.indices]
        losses = lesson.objective(frames, scenes.questions, settings.goal_weight)
        working &= losses.detach() > settings.threshold
        if not working.any():
            break
        (gradient,) = torch.autograd.grad(losses.sum(), weights)
        before = weights.detach().clone()
        optimizer.step(gradient)
        with torch.no_grad():
            weights.copy_(torch.where(working[:, None], weights, before))
        updates += working
    return weights.detach(), updates


@torch.no_grad()
def final_videos(
    reasoner: Reasoner, lesson: Lesson, loras: Loras, weights: Tensor, scenes: Scenes, noise: Noise, settings: Settings
) -> tuple[Tensor, Tensor]:
    """(samples, rows): whether each few-step video is right, and the Teacher's objective on it."""
    right, losses = [], []
    for each in noise.samples():
        with loras.on(weights):
            latents = reasoner.sample(scenes.condition(), each)
        videos = torch.stack([reasoner.decode(z[None]) for z in latents])
        right.append([verdict(video, scene).success for video, scene in zip(videos, scenes.scenes, strict=True)])
        losses.append(lesson.objective(videos[:, lesson.indices], scenes.questions, settings.goal_weight))
    return torch.tensor(right), torch.stack(losses).cpu()


def measure(
    pipe: TeacherPipeline,
    lesson: Lesson,
    loras: Loras,
    settings: Settings,
    device: torch.device,
    count: int,
    batch: int,
) -> dict[str, Any]:
    """Success of the first final video and of the picked one for each split, mean updates and the number of scenes."""
    success: dict[str, Any] = {}
    updates: list[float] = []
    for split, seed in SPLITS:
        rights, losses = [], []
        for start in range(0, count, batch):
            indices = range(start, min(start + batch, count))
            drawn = [world.instance(index, seed, split) for index in indices]
            tasks, prompts = ([pair[part] for pair in drawn] for part in (0, 1))
            scenes = Scenes.of(pipe.reasoner, tasks, prompts, world.PACKAGED_FLAWS)
            one = scenes.condition(slice(1))
            seeds = [torch.Generator().manual_seed(noise_seed(index, seed)) for index in indices]
            noise = joined([pipe.reasoner.noise(one, each, settings.final_samples) for each in seeds])
            z1 = noise.z1.to(device)
            weights, counts = optimise(pipe.reasoner, pipe.decoder, lesson, loras, scenes, z1, settings)
            right, loss = final_videos(pipe.reasoner, lesson, loras, weights, scenes, noise, settings)
            rights.append(right)
            losses.append(loss)
            updates += counts.tolist()
        right, best = torch.cat(rights, 1), torch.cat(losses, 1).argmin(0)
        picked = right.gather(0, best[None])[0]
        success[split] = [round(verdicts.float().mean().item(), 3) for verdicts in (right[0], picked)]
    return {**success, "updates": sum(updates) / len(updates), "n": len(updates)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teachers", nargs="*", default=[str(PACKAGED_PAIR / "teacher")])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", type=int, default=200, help="scenes of each set (default: 200)")
    parser.add_argument("--batch", type=int, default=100, help="scenes optimised at once (default: 100)")
    add_flags(parser, *CHANGEABLE)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    pipe = TeacherPipeline.from_pretrained(dtype=torch.float32, device_map="cpu")
    settings = pipe.defaults.updated(**given(arguments))
    pipe.reasoner.to(device)
    pipe.decoder.to(device)
    loras = Loras(pipe.reasoner.transformer, settings.rank)
    for path in arguments.teachers:
        teacher = load_teacher(path, torch.float32)
        assert isinstance(teacher, QwenVLTeacher)
        lesson = Lesson(teacher, load_config("teacher") | {"bf16": False}).to(device)
        start = time.perf_counter()
        result = measure(pipe, lesson, loras, settings, device, arguments.count, arguments.batch)
        print(json.dumps({"teacher": path, **result, "seconds": round(time.perf_counter() - start, 1)}), flush=True)


def joined(noises: list[Noise]) -> Noise:
    """The noise of a batch, from those of its rows."""

    def together(draws: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return tuple(torch.cat(each) for each in zip(*draws, strict=True))

    others = zip(*(noise.others for noise in noises), strict=True)
    return Noise(
        torch.cat([noise.z1 for noise in noises]),
        together([noise.steps for noise in noises]),
        tuple(together(list(each)) for each in others),
    )


if __name__ == "__main__":
    main()
