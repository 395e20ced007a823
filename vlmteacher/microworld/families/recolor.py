"""``recolor``: one of three shapes takes the named colour; pairs of colours that training never shows out of domain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vlmteacher.microworld.facts import NONE, Facts
from vlmteacher.microworld.families.base import Family, draw_colors, draw_places, faded, halfway, point
from vlmteacher.microworld.kinds import SCENERY, Asked, Kind, Names, has_color
from vlmteacher.microworld.scene import COLORS, Scene, Thing, Track, scene_of

SHAPE = 8.0  # radius, or half a side
_NAMES = list(COLORS)
_INSTEAD = {  # the mistaken colours per named colour: the first that the shape does not have yet
    "red": ("blue", "green"),
    "green": ("red", "blue"),
    "blue": ("green", "red"),
    "yellow": ("blue", "green"),
    "purple": ("red", "blue"),
    "cyan": ("green", "red"),
}


def _has_turned(facts: Facts, scene: Scene, a: int, b: str) -> np.ndarray:
    return (facts.count[:, a] == 1) & has_color(facts, a, b)


def _true_color(facts: Facts, scene: Scene, a: int, b: str) -> list[Names]:
    shown = int(facts.color[-1, a])
    return [(a, _NAMES[shown])] if shown != NONE else []


TURNS = Kind(
    "turns",
    ("Does the {a} shape turn {b}?", "Is the {a} shape {b} at the end?"),
    _has_turned,
    at_end=True,
    color="b",
    true_names=_true_color,
)
VISIBLE = Kind(
    "visible",
    ("Is the {a} {noun} visible all the time?", "Can the {a} {noun} be seen in every frame?"),
    lambda facts, scene, a: facts.count[:, a] == 1,
    subscore=None,
)


class Recolor(Family):
    name = "recolor"
    category = "transformation"
    prompts = (
        "Turn the {a} shape {b}.",
        "The {a} shape turns {b}.",
        "Make the {a} shape {b} and leave the others as they are.",
        "Paint the {a} shape {b}.",
    )
    noun = "shape"
    kept = "other shapes"
    goal = TURNS
    process = (VISIBLE, SCENERY)
    breaks = SCENERY
    moves = False
    without = ("near_miss",)

    def sample(self, rng: np.random.Generator, unseen: bool = False) -> Scene | None:
        colors = draw_colors(rng, 3)
        places = draw_places(rng, 3, 10, 19)
        goal = _NAMES[int(rng.integers(len(_NAMES)))]
        if places is None or goal in colors:
            return None
        shapes = ["disc" if rng.random() < 0.5 else "square" for _ in colors]
        things = [Thing(s, c, *point(p), SHAPE) for s, c, p in zip(shapes, colors, places, strict=True)]
        which = int(rng.integers(3))
        scene = scene_of("recolor", things, {which: replace(things[which], other=goal, blend=1.0)})
        return scene if self.is_unseen(scene) == unseen else None

    def is_unseen(self, scene: Scene) -> bool:
        return (_NAMES.index(scene.goals[0].other) - _NAMES.index(scene.ball_color)) % 6 == 3

    def names(self, scene: Scene) -> dict[str, str]:
        return {"a": scene.ball_color, "b": scene.goals[0].other}

    def questions(self, scene: Scene) -> list[Asked]:
        a = scene.actors[0]
        return [(TURNS, (a, scene.goals[0].other)), (VISIBLE, (a,)), (SCENERY, ())]

    def key_color(self, scene: Scene) -> str:
        return scene.goals[0].other

    def mistaken(self, scene: Scene) -> Scene:
        """Into another colour, always the same one."""
        first, second = _INSTEAD[scene.goals[0].other]
        instead = second if first == scene.ball_color else first
        return replace(scene, goals=(replace(scene.goals[0], other=instead),))

    def forbidden(self, scene: Scene) -> Track:
        """The nearest other shape fades."""
        others = [i for i in range(len(scene.things)) if i not in scene.actors]
        nearest = min(others, key=lambda i: np.hypot(*np.subtract(scene.things[i].at, scene.start)))
        return faded(scene, nearest)

    def wrong(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """Into another colour, only half of the way, or the wrong shape."""
        kind = int(rng.integers(3))
        if kind == 0:
            return halfway(scene, float(rng.uniform(0.2, 0.6)))
        if kind == 1:
            others = [c for c in COLORS if c not in (scene.ball_color, scene.goals[0].other)]
            return replace(scene, goals=(replace(scene.goals[0], other=str(rng.choice(others))),))
        which = int(rng.choice([i for i in range(3) if i not in scene.actors]))
        goal = replace(scene.things[which], other=scene.goals[0].other, blend=1.0)
        return replace(scene, actors=(which,), goals=(goal,), ways=((goal.at,),))
