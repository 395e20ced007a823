"""Print where Teachers' gradients point: ``python -m tools.gradient_alignment [TEACHER ...]``.

For the flawed scenes among the first of the validation split: the cosine of the LoRA's gradient of the Teacher's loss
(default: the packaged Teacher) with that of the squared distance of the one-step prediction's latents from those of the
right video, along an optimisation of that distance. 1: the Teacher's gradient leads straight to the right video; 0: it
is orthogonal to that direction.
"""

from __future__ import annotations

import argparse
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmteacher.evaluation.microworld import first_frame, noise_seed, right_latents
from vlmteacher.lora.adapter import add_lora, lora_parameters, remove_lora
from vlmteacher.microworld import world
from vlmteacher.microworld.questions import right_queries
from vlmteacher.optimization.frames import teacher_frame_indices
from vlmteacher.optimization.reward import vqa_objective
from vlmteacher.pipeline import PACKAGED_PAIR, TeacherPipeline
from vlmteacher.teachers import load_teacher

UPDATES = (0, 6, 12)  # made before the gradients are compared
SCENES = 40


def gradient(loss: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teachers", nargs="*", default=[str(PACKAGED_PAIR / "teacher")])
    teachers = {name: load_teacher(name, torch.float32) for name in parser.parse_args().teachers}
    pipe = TeacherPipeline.from_pretrained(dtype=torch.float32, device_map="cpu")
    reasoner, settings = pipe.reasoner, pipe.defaults
    indices = teacher_frame_indices(world.NUM_FRAMES, settings.teacher_frames)
    cosines: dict[str, list[list[float]]] = {name: [[] for _ in UPDATES] for name in teachers}
    for index in range(SCENES):
        scene, prompt = world.instance(index, 1, "validation")
        if not world.flaw(scene, world.PACKAGED_FLAWS):
            continue
        condition = reasoner.encode(prompt, first_frame(scene), world.NUM_FRAMES, world.SIZE, world.SIZE)
        noise = reasoner.noise(condition, torch.Generator().manual_seed(noise_seed(index, 1)))
        right = right_latents(reasoner, scene)
        add_lora(reasoner.transformer, settings.rank, seed=0)
        parameters = list(lora_parameters(reasoner.transformer))
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0)
        for step in range(UPDATES[-1] + 1):
            towards_right = gradient((reasoner.predict_clean(condition, noise) - right).square().mean(), parameters)
            for name, teacher in teachers.items() if step in UPDATES else ():
                frames = pipe.decoder.decode(reasoner.predict_clean(condition, noise))[indices]
                losses = teacher.losses(frames, indices, world.FPS, right_queries(scene))
                from_teacher = gradient(vqa_objective(losses, settings.goal_weight), parameters)
                flat = [torch.cat([g.flatten() for g in each]) for each in (towards_right, from_teacher)]
                cosines[name][UPDATES.index(step)].append(F.cosine_similarity(*flat, dim=0).item())
            for parameter, value in zip(parameters, towards_right, strict=True):
                parameter.grad = value
            optimizer.step()
        remove_lora(reasoner.transformer)
    for name, rows in cosines.items():
        print(
            f"{name}: " + ", ".join(f"{fmean(row):.2f} after {n} updates" for n, row in zip(UPDATES, rows, strict=True))
        )


if __name__ == "__main__":
    main()
