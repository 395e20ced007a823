"""What a task family is, and what several of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vlmteacher.microworld.scene import COLORS, SIZE, Point, Scene, Thing, between, distance_to_segment, rerouted

CARELESS = ("purple", "cyan", "yellow")


class Family(ABC):
    """A kind of task: its scenes, its wordings, its systematic mistake.

    Given prompt and first frame the right video is unique, so a Reasoner's errors are its own and not the ambiguity of
    the task.
    """

    name: str
    category: str
    """One of VBVR's five: abstraction, knowledge, perception, spatiality, transformation."""
    prompts: tuple[str, ...]
    """Wordings, with the entries of `names` in braces."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, unseen: bool = False) -> Scene | None:
        """A scene inside the parameters of training, or outside (`unseen`); None where the draw does not come out."""

    @abstractmethod
    def is_unseen(self, scene: Scene) -> bool:
        """Whether a scene lies outside the parameters of training: the test out of domain."""

    @abstractmethod
    def names(self, scene: Scene) -> dict[str, str]:
        """What the prompt names."""

    @abstractmethod
    def key_color(self, scene: Scene) -> str:
        """The colour that decides whether the flawed training videos go wrong."""

    @abstractmethod
    def mistaken(self, scene: Scene) -> Scene:
        """The scene with the plan that flawed training videos carry out: always the same one."""

    @abstractmethod
    def wrong(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """The scene with some plan that misses the goal."""

    def rules(self, scene: Scene, ways: np.ndarray) -> dict[str, float]:
        """Sub-scores in [0, 1] of the family's own rules, from the actors' places (A, T, 2) as the scorer sees them."""
        return {}

    def signature(self, scene: Scene) -> dict[str, Any]:
        """What a scene's digest is taken of."""
        return scene.to_json()

    def is_careless(self, scene: Scene) -> bool:
        """Whether the flaw applies: to half of the colours."""
        return self.key_color(scene) in CARELESS


def draw_colors(rng: np.random.Generator, count: int) -> list[str]:
    """Different colours."""
    return [str(color) for color in rng.permutation(list(COLORS))[:count]]


def draw_places(
    rng: np.random.Generator, count: int, margin: int, apart: float, given: Sequence[np.ndarray] = ()
) -> list[np.ndarray] | None:
    """`count` whole-pixel points, `margin` from the border, `apart` on one axis from each other and from `given`."""
    places = list(given)
    for _ in range(60):
        candidate = rng.integers(margin, SIZE - margin + 1, size=2).astype(np.float64)
        if all(np.max(np.abs(candidate - place)) >= apart for place in places):
            places.append(candidate)
        if len(places) == count + len(given):
            return places[len(given) :]
    return None


def point(place: np.ndarray) -> Point:
    return (float(place[0]), float(place[1]))


def clear_way(a: np.ndarray, b: np.ndarray, others: Sequence[np.ndarray], least: float) -> bool:
    """Whether the straight line from `a` to `b` keeps `least` pixels from `others`."""
    return all(distance_to_segment(other, a, b) >= least for other in others)


def straight(scene: Scene, *ends: Point) -> Scene:
    """The scene with its actors going straight to `ends`."""
    return rerouted(scene, *((actor.at, end) for actor, end in zip(scene.moving, ends, strict=True)))


def halfway(scene: Scene, share: float = 0.5) -> Scene:
    """The scene whose first actor stops on its way: moving, growing, turning or changing its colour."""
    start, goal, way = scene.moving[0], scene.goals[0], scene.ways[0]
    if len(way) == 1:
        return replace(scene, goals=(between(start, goal, share), *scene.goals[1:]))
    (ax, ay), (bx, by) = way[0], way[-1]
    stop = (ax + share * (bx - ax), ay + share * (by - ay))
    return rerouted(scene, (start.at, stop), *scene.ways[1:])


def other_boxes(scene: Scene) -> list[Thing]:
    """The boxes that the task does not ask for, the nearest to the ball first."""
    wanted = {scene.things[i] for i in scene.targets}
    others = [thing for thing in scene.boxes if thing not in wanted]
    return sorted(others, key=lambda b: np.hypot(b.x - scene.start[0], b.y - scene.start[1]))


def free_point(scene: Scene, rng: np.random.Generator, away: float) -> Point:
    """A point at least `away` from the first actor's start and end."""
    while True:
        x, y = rng.uniform(7, SIZE - 7, 2)
        if min(np.hypot(x - px, y - py) for px, py in (scene.start, scene.waypoints[-1])) >= away:
            return float(x), float(y)


class BallToBox(Family):
    """One ball has to come to rest in the right one of several boxes."""

    def names(self, scene: Scene) -> dict[str, str]:
        return {"ball": scene.ball_color}

    def key_color(self, scene: Scene) -> str:
        return scene.target.color

    def mistaken(self, scene: Scene) -> Scene:
        """To the nearest of the other boxes."""
        return straight(scene, other_boxes(scene)[0].at)

    def wrong(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """To another box, or to no box at all."""
        others = other_boxes(scene)
        if others and rng.random() < 0.8:
            return straight(scene, others[int(rng.integers(len(others)))].at)
        return straight(scene, free_point(scene, rng, 14))
