"""Training-only losses of the Teacher on frame pairs and cells, and the accuracy of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.microworld.teacher.grounding import STATE, by_color, in_pairs
from recipes.microworld.teacher.model import PATCH
from vlmteacher.microworld import world
from vlmteacher.microworld.facts import FASTEST, Facts
from vlmteacher.microworld.questions import Question
from vlmteacher.microworld.scene import Scene


class Readout(nn.Module):
    """Heads that read the facts of a frame pair from one vector; actors are identified by their first colour."""

    SIZES: ClassVar = {"states": len(world.COLORS) * 2 * STATE, "there": len(world.COLORS), "flags": 3}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.Linear(width, sum(self.SIZES.values()))

    def forward(self, x: Tensor, truth: dict[str, Tensor]) -> dict[str, Tensor]:
        out = dict(zip(self.SIZES, self.heads(self.norm(x)).split(list(self.SIZES.values()), -1), strict=True))
        known = truth["states"].isfinite()
        predicted = out["states"].view_as(truth["states"]) * known
        return {
            "states": 60 * F.smooth_l1_loss(predicted, truth["states"].nan_to_num(), beta=0.02),
            "there": 3 * F.binary_cross_entropy_with_logits(out["there"], truth["there"]),
            "flags": 3 * F.binary_cross_entropy_with_logits(out["flags"], truth["flags"]),
        }


def pair_truth(scenes: Sequence[Scene], facts: Sequence[Facts], indices: list[int]) -> dict[str, Tensor]:
    """Targets (B, pairs, ...) of `Readout` for the Teacher's frames, those of `indices`.

    states: (colours, 2 frames, `STATE`) of the actor that had the colour at first. there: (colours,) whether there is
    exactly one of it in both frames. flags: whether something jumped, touched a block, changed in the scenery.
    """
    rows: dict[str, list[Tensor]] = {"states": [], "there": [], "flags": []}
    for scene, f in zip(scenes, facts, strict=True):
        states, there = by_color(scene, f, indices)
        step = np.hypot(*np.moveaxis(np.diff(f.position[indices], axis=0), -1, 0)) / np.diff(indices)[:, None]
        jumped = np.concatenate([[False], (step > FASTEST).any(1)]) | f.jumped[indices].any(1)
        flags = [~in_pairs(~x, range(len(indices))) for x in (jumped, f.touching[indices], ~f.intact[indices])]
        rows["states"].append(states.unflatten(0, (-1, 2)).transpose(1, 2))
        rows["there"].append(there[0::2] * there[1::2])
        rows["flags"].append(torch.from_numpy(np.stack(flags, 1)).float())
    return {name: torch.stack(values) for name, values in rows.items()}


def cell_truth(frames: Tensor) -> Tensor:
    """Shares of colours, blocks and background in the merged cells: (B, K, 3, H, W) -> (B, pairs, cells, 8)."""
    frames = frames[..., ::2, ::2]  # a quarter of the pixels is enough
    palette = frames.new_tensor([*world.COLORS.values(), world.BLOCK_COLOR, world.BACKGROUND])
    distance = (frames[:, :, None] - palette[None, None, :, :, None, None]).square().sum(3)
    share = (-distance / 0.02).softmax(2)
    size = PATCH
    cells = F.avg_pool2d(share.flatten(0, 1), size).unflatten(0, frames.shape[:2])  # (B, K, 8, h, w)
    pairs = 0.5 * (cells[:, 0::2] + cells[:, 1::2])
    return pairs.flatten(3).transpose(2, 3) * 4  # a ball fills about a third of a cell


def perturbed(frames: Tensor, gradient: Tensor, most: float, generator: torch.Generator | None = None) -> Tensor:
    """Frames (B, K, 3, H, W) after a step of random size, 0 to `most`, along the sign of a smoothed gradient.

    generator: of the sizes; None is torch's global one.
    """
    smooth = F.avg_pool2d(gradient.flatten(0, 1), 3, 1, 1).view_as(frames)
    size = most * torch.rand(len(frames), 1, 1, 1, 1, generator=generator).to(frames)
    return (frames.detach() + size * smooth.sign()).clamp(0, 1)


def accuracies(asked: list[list[Question]], scenes: list[Scene], right: list[list[bool]]) -> dict[str, float]:
    """Accuracy where the answer is Yes and where it is No: overall, and for each family and its kinds of questions."""
    sums: dict[str, list[bool]] = {}
    for questions, scene, row in zip(asked, scenes, right, strict=True):
        for question, correct in zip(questions, row, strict=True):
            answer = "yes" if question.answer else "no"
            for name in (answer, f"{scene.family}/{answer}", f"{scene.family}/{question.kind}/{answer}"):
                sums.setdefault(name, []).append(correct)
    return {name: float(np.mean(values)) for name, values in sums.items()}
