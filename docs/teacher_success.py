"""How often Teachers lead to right videos: ``python docs/teacher_success.py [TEACHER ...] [--device cuda]``.

The first scenes of the validation split and others out of domain (not the tests'), with right queries. All take the
steps of their optimisations together, as rows of one batch: on a GPU hundreds of instances take seconds, so many that
a difference of a few points can be told from chance. One line of JSON for each Teacher (by default the packaged one):
success in domain and out of it, of one final video and of the one that the Teacher picks; updates; seconds.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import Tensor

from recipes.microworld.teacher.lesson import Lesson
from recipes.microworld.teacher.pointing import Loras, RowAdam, Scenes
from recipes.microworld.training import load_config
from vlmteacher.evaluation.microworld import judge as verdict
from vlmteacher.evaluation.microworld import noise_seed
from vlmteacher.microworld import world
from vlmteacher.pipeline import PACKAGED_PAIR, TeacherPipeline
from vlmteacher.reasoners.condition import Noise
from vlmteacher.settings import Settings
from vlmteacher.teachers import load_teacher

GIVEN = ("threshold", "learning_rate", "goal_weight")
SETS = (("validation", 1), ("ood", 7))  # split and seed


def optimise(
    reasoner: object, decoder: object, lesson: Lesson, loras: Loras, scenes: Scenes, z1: Tensor, settings: Settings
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
    reasoner: object, lesson: Lesson, loras: Loras, weights: Tensor, scenes: Scenes, noise: Noise, settings: Settings
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teachers", nargs="*", default=[str(PACKAGED_PAIR / "teacher")])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", type=int, default=200, help="scenes of each set (default: 200)")
    parser.add_argument("--batch", type=int, default=100, help="of so many at once (default: 100)")
    for name in GIVEN:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help="instead of the pair's")
    arguments = parser.parse_args()
    pipe = TeacherPipeline.from_pretrained(dtype=torch.float32, device_map="cpu")
    given = {name: getattr(arguments, name) for name in GIVEN}
    settings = Settings(**pipe.defaults.to_dict() | {k: v for k, v in given.items() if v is not None})
    reasoner, device = pipe.reasoner.to(arguments.device), torch.device(arguments.device)
    decoder, loras = pipe.decoder.to(device), Loras(reasoner.transformer, settings.rank)
    for path in arguments.teachers:
        teacher = load_teacher(path, torch.float32)
        lesson = Lesson(teacher, load_config("teacher") | {"bf16": False}).to(device)
        found, began, updates = {}, time.perf_counter(), []
        for split, seed in SETS:
            rights, losses = [], []
            for start in range(0, arguments.count, arguments.batch):
                indices = range(start, min(start + arguments.batch, arguments.count))
                drawn = [world.instance(index, seed, split) for index in indices]
                scenes = Scenes.of(reasoner, [scene for scene, _ in drawn], [prompt for _, prompt in drawn])
                one = scenes.condition(slice(1))
                noises = [
                    reasoner.noise(one, torch.Generator().manual_seed(noise_seed(k, seed)), settings.final_samples)
                    for k in indices
                ]
                noise = joined(noises)
                weights, made = optimise(reasoner, decoder, lesson, loras, scenes, noise.z1, settings)
                right, loss = final_videos(reasoner, lesson, loras, weights, scenes, noise, settings)
                rights.append(right)
                losses.append(loss)
                updates += made.tolist()
            right, best = torch.cat(rights, 1), torch.cat(losses, 1).argmin(0)
            picked = right.gather(0, best[None])[0]
            found[split] = [round(each.float().mean().item(), 3) for each in (right[0], picked)]
        told = {"teacher": path, **found, "updates": sum(updates) / len(updates), "n": len(updates)}
        print(json.dumps(told | {"seconds": round(time.perf_counter() - began, 1)}), flush=True)


def joined(noises: list[Noise]) -> Noise:
    """One of a batch."""

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
