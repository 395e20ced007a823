"""``sort``: two of three discs change places until all stand by size; out of domain all three do."""

from __future__ import annotations

from itertools import permutations

import numpy as np

from vlmteacher.microworld.facts import Facts
from vlmteacher.microworld.families.base import Family, draw_colors, followed
from vlmteacher.microworld.kinds import NEAR, ONE, Asked, Kind, Names
from vlmteacher.microworld.scene import Point, Scene, Thing, Track, rerouted, scene_of

RADII = (4.0, 6.0, 8.0)
SPACING = 20.0
HEIGHT = 16.0  # of the arcs: discs pass without touching
STEPS = 16  # corners of an arc
APART = 10.0  # pixels between discs that stand side by side

_EXCHANGED = ((1, 0, 2), (0, 2, 1), (2, 1, 0))
_ROTATED = ((1, 2, 0), (2, 0, 1))


def _arc(start: Point, x: float) -> tuple[Point, ...]:
    """Return the path to another place in the row: over other discs to the right, under them to the left."""
    if x == start[0]:
        return (start,)
    s = np.linspace(0, 1, STEPS + 1)
    height = np.sign(x - start[0]) * HEIGHT * np.sin(np.pi * s)
    arc = [
        (round(float(start[0] + (x - start[0]) * a), 3), round(float(start[1] - h), 3))
        for a, h in zip(s, height, strict=True)
    ]
    return (*arc[:-1], (x, start[1]))


def _arcs(discs: tuple[Thing, ...], largest_first: bool = False) -> list[tuple[Point, ...]]:
    places = sorted(d.x for d in discs)
    ranked = sorted(discs, key=lambda d: d.size, reverse=largest_first)
    return [_arc(d.at, places[ranked.index(d)]) for d in discs]


def _sorted(facts: Facts, scene: Scene, a: int, b: int) -> np.ndarray:
    """Whether `a` is the left one and `b` the right one of three in a row."""
    x = facts.position[..., 0]
    (between,) = (i for i in range(len(scene.things)) if i not in (a, b)) if a != b else (a,)
    row = np.abs(facts.position[..., 1] - scene.things[0].y).max(1) <= NEAR
    whole = (facts.count == 1).all(1)
    return whole & row & (x[:, between] - x[:, a] >= APART) & (x[:, b] - x[:, between] >= APART)


def _outer_discs(facts: Facts, scene: Scene, a: int, b: int) -> list[Names]:
    order = np.argsort(np.nan_to_num(facts.position[-1, :, 0]))
    return [(int(order[0]), int(order[-1]))]


SORTED = Kind(
    "sorted",
    (
        "Is the {a} disc on the left and the {b} disc on the right at the end?",
        "Is the {a} disc the left one and the {b} disc the right one at the end?",
    ),
    _sorted,
    at_end=True,
    actors="ab",
    true_names=_outer_discs,
)


class Sort(Family):
    name = "sort"
    category = "abstraction"
    prompts = (
        "Sort the discs by size, the smallest on the left.",
        "Put the discs in order of size, the largest on the right.",
        "The discs change places until they grow from left to right.",
        "Order the discs from small to large.",
    )
    noun = "disc"
    goal = SORTED
    process = (ONE,)
    breaks = ONE
    without = ("eroded_scenery",)
    query_weight = 4.0

    def sample(self, rng: np.random.Generator, unseen: bool = False) -> Scene | None:
        colors = draw_colors(rng, 3)
        left, y = float(rng.integers(9, 16)), float(rng.integers(25, 40))
        orders = _ROTATED if unseen else _EXCHANGED
        order = orders[int(rng.integers(len(orders)))]
        discs = tuple(
            Thing("disc", color, left + SPACING * place, y, RADII[rank])
            for place, (color, rank) in enumerate(zip(colors, order, strict=True))
        )
        return scene_of("sort", discs, dict(enumerate(_arcs(discs))))

    def is_unseen(self, scene: Scene) -> bool:
        return all(len(way) > 1 for way in scene.ways)

    def names(self, scene: Scene) -> dict[str, str]:
        return {}

    def questions(self, scene: Scene) -> list[Asked]:
        ranked = sorted(scene.actors, key=lambda i: scene.things[i].size)
        return [(SORTED, (ranked[0], ranked[-1])), *((ONE, (i,)) for i in ranked)]

    def key_color(self, scene: Scene) -> str:
        """Return the colour of the smallest disc."""
        return min(scene.things, key=lambda d: d.size).color

    def mistaken(self, scene: Scene) -> Scene:
        """The largest on the left."""
        return rerouted(scene, *_arcs(scene.things, largest_first=True))

    def forbidden(self, scene: Scene) -> Track:
        """A copy follows the largest disc that moves."""
        moving = [i for i, way in zip(scene.actors, scene.ways, strict=True) if len(way) > 1]
        return followed(scene, max(moving, key=lambda i: scene.things[i].size))

    def wrong(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """Into some other order."""
        places = sorted(d.x for d in scene.things)
        right = tuple(goal.x for goal in scene.goals)
        orders = [p for p in permutations(places) if p != right]
        chosen = orders[int(rng.integers(len(orders)))]
        return rerouted(scene, *(_arc(d.at, x) for d, x in zip(scene.things, chosen, strict=True)))
