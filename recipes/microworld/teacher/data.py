"""Videos and questions that the Teacher learns from, and the scenes that it learns to write queries for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmteacher.microworld import corruptions, splits, world
from vlmteacher.microworld.facts import Facts, facts_of
from vlmteacher.microworld.families import FAMILIES
from vlmteacher.microworld.questions import STYLE, Question, own_questions
from vlmteacher.microworld.scene import Scene, Track
from vlmteacher.queries import query_prompt

# Weights with which kinds of videos are drawn, of those that a family has; `OWN` for kinds of one family only.
OWN = 2.0
MIX = {
    "right": 8.0,
    "static": 0.5,
    "backwards": 0.5,
    "final_only": 0.5,
    "half_finished": 1.5,
    "mistaken": 4.0,
    "wrong_target": 4.0,
    "near_miss": 1.5,
    "wall_crossing": 2.0,
    "teleport": 2.0,
    "vanish": 2.0,
    "fade_through": 1.5,
    "duplicate": 2.0,
    "ghost": 3.0,
    "wrong_color": 1.5,
    "eroded_scenery": 7.0,
    "disguise": 4.0,
    "another_instance": 0.0,
    "forbidden": 5.0,
}


def ask_text(task: str) -> str:
    """The prompt with which queries for a task are asked for."""
    return query_prompt(task, STYLE.query_instruction)


def task_text(scene: Scene, rng: np.random.Generator) -> str:
    """A prompt for the scene: in the world's own wording, or half the time in a paraphrase where the family has any."""
    family = FAMILIES[scene.family]
    if not family.paraphrases or rng.random() < 0.5:
        return world.write_prompt(scene, rng)
    return family.paraphrase(scene, rng)


def distort(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add blur, noise and a tint, as of a small decoder, to frames (T, H, W, 3) in [0, 1]."""
    if rng.random() < 0.6:
        side = float(rng.uniform(0, 0.25))
        for axis in (1, 2):
            frames = side * (np.roll(frames, 1, axis) + np.roll(frames, -1, axis)) + (1 - 2 * side) * frames
    if rng.random() < 0.5:
        frames = frames + rng.normal(0, rng.uniform(0, 0.05), frames.shape)
    if rng.random() < 0.3:
        frames = frames + rng.normal(0, 0.03, (1, 1, 1, 3))
    return np.clip(frames, 0, 1).astype(np.float32)


Row = tuple[np.ndarray, Scene, Facts]
"""A video (T, H, W, 3) in [0, 1], its scene and its facts."""


def draw_track(
    rng: np.random.Generator, outside: float = 0.0, families: Sequence[str] = world.FAMILIES
) -> tuple[Scene, Track]:
    """Draw a training scene, out of domain with probability `outside`, and a video of it, of a kind of `MIX`."""
    scene = splits.training_scene(rng, str(rng.choice(families)), outside)
    names = [kind for kind in ("right", *corruptions.kinds(scene.family)) if MIX.get(kind, OWN)]
    weights = np.asarray([MIX.get(kind, OWN) for kind in names])
    kind = str(rng.choice(names, p=weights / weights.sum()))
    return scene, world.perform(scene) if kind == "right" else corruptions.corrupt(kind, scene, rng)


def rendered(rng: np.random.Generator, outside: float = 0.0, families: Sequence[str] = world.FAMILIES) -> Row:
    """Draw a rendered video with the simulator's facts; its scene is out of domain with probability `outside`."""
    scene, track = draw_track(rng, outside, families)
    return distort(world.draw(track), rng), scene, facts_of(scene, track)


def fade(row: Row, share: float, rng: np.random.Generator) -> tuple[np.ndarray, list[Question], list[float]]:
    """Mix a video with the right one of its scene, and their answers likewise (mixup, arXiv 1710.09412).

    A Teacher that gives such answers has gradients that point to the right video.

    share: share of the right video. Returns the frames, four of the task's own questions (the goal twice where there
    are three), and the probability of Yes for each.
    """
    video, scene, facts = row
    track = world.perform(scene)
    questions, right = (own_questions(scene, f) for f in (facts, facts_of(scene, track)))
    chosen = [*range(len(questions)), 0][:4]
    weight = float(np.interp(share, (0.0, 0.9, 1.0), (0.0, 0.5, 1.0)))  # Yes is likely only near the right video
    yes = [(1 - weight) * questions[k].answer + weight * right[k].answer for k in chosen]
    frames = (1 - share) * video + share * distort(world.draw(track), rng)
    return frames, [questions[k] for k in chosen], yes


@dataclass(frozen=True)
class Batch:
    """Videos and the same number of questions about each.

    Attributes:
        frames: (B, T, 3, H, W) in [0, 1].
        scenes, facts: of each video.
        asked: the questions about each video.
        yes: (B, questions), the target probability of Yes; by default 0 or 1, as the questions' answers are.
    """

    frames: Tensor
    scenes: list[Scene]
    facts: list[Facts]
    asked: list[list[Question]]
    yes: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[Row], asked: list[list[Question]], yes: Tensor | None = None) -> Batch:
        videos, scenes, facts = zip(*rows, strict=True)
        frames = torch.from_numpy(np.stack(videos)).permute(0, 1, 4, 2, 3).float()
        return cls(frames, list(scenes), list(facts), asked, yes)


def blend(rows: list[Row], rng: np.random.Generator) -> Batch:
    """Fade every row by a random share; with the tasks' own questions."""
    frames, asked, yes = zip(*(fade(row, float(rng.uniform()), rng) for row in rows), strict=True)
    mixed = [(video, scene, facts) for video, (_, scene, facts) in zip(frames, rows, strict=True)]
    return Batch.of(mixed, list(asked), torch.tensor(yes))


class Source:
    """A source of training rows: collected ones, and newly rendered ones.

    groups: collected rows by kind; only those of `families` are used, and with an `outside` of 0 or 1 only those in or
    out of domain. outside: share of the rendered rows whose scene is out of domain.
    """

    def __init__(self, groups: dict[str, list[Row]], families: Sequence[str], outside: float) -> None:
        def fits(scene: Scene) -> bool:
            return scene.family in families and (0 < outside < 1 or (world.split_of(scene) == "ood") == bool(outside))

        self.groups = {kind: [row for row in rows if fits(row[1])] for kind, rows in groups.items()}
        self.families, self.outside = families, outside

    def draw(self, rng: np.random.Generator, counts: dict[str, int], batch: int) -> list[Row]:
        """Draw `counts` collected rows of each kind, where there are any, and fill up to `batch` with rendered ones."""
        rows = []
        for kind, count in counts.items():
            for _ in range(count if self.groups[kind] else 0):
                video, scene, facts = self.groups[kind][int(rng.integers(len(self.groups[kind])))]
                rows.append((video.astype(np.float32) / 255, scene, facts))
        return rows + [rendered(rng, self.outside, self.families) for _ in range(batch - len(rows))]


def scenes_to_write(rng: np.random.Generator, count: int, outside: float) -> list[Scene]:
    """Draw training scenes to write queries for, with the families' `query_weight`."""
    weights = np.asarray([FAMILIES[family].query_weight for family in world.FAMILIES])
    chosen = rng.choice(world.FAMILIES, count, p=weights / weights.sum())
    return [splits.training_scene(rng, str(family), outside) for family in chosen]
