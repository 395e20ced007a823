"""Kinds of questions: their wordings and the rules that answer them; here those that several families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlmteacher.microworld.facts import COLOR_NAMES, Facts
from vlmteacher.microworld.scene import Scene, Thing

NEAR = 4.5  # pixels per axis between the centres of a ball and of the box that it is in

Name = int | str
"""What a question names: the index of a thing, or a colour."""
Names = tuple[Name, ...]


def _no_names(facts: Facts, scene: Scene, *names: Name) -> list[Names]:
    return []


@dataclass(frozen=True)
class Kind:
    """One kind of question.

    Attributes:
        name: unique among all families.
        wordings: templates of the text. {a}, {b} and {c} stand for what the question names, {noun}, {verb} and {kept}
            for words of the family.
        rule: (facts, scene, *names) -> (T,), whether the condition holds in each frame. Raises ValueError for a scene
            of another family that lacks what the question is about.
        at_end: the last two frames decide the answer; otherwise all frames do.
        subscore: the scorer's sub-score of the same rule, None if the scorer has none.
        actors: the letters that name actors; other letters name scenery.
        color: the letter that names a colour instead of a thing, if any.
        true_names: (facts, scene, *names) -> names with which the answer for this video is, or may be, Yes.
    """

    name: str
    wordings: tuple[str, ...]
    rule: Callable[..., np.ndarray]
    at_end: bool = False
    subscore: str | None = "goal"
    actors: str = "a"
    color: str = ""
    true_names: Callable[..., list[Names]] = _no_names

    @property
    def letters(self) -> str:
        """The letters that stand for names in the wordings."""
        return "".join(letter for letter in "abc" if f"{{{letter}}}" in self.wordings[0])


Asked = tuple[Kind, Names]
"""A question about a scene, before it is put into words."""


# ---------------------------------------------------------------- parts of rules: each (T,) of booleans


def has_color(facts: Facts, a: int, color: str) -> np.ndarray:
    return np.asarray(facts.color[:, a] == COLOR_NAMES.index(color))


def is_single(facts: Facts, scene: Scene, a: int) -> np.ndarray:
    """Whether exactly one of thing `a` is visible, in its own colour."""
    return (facts.count[:, a] == 1) & has_color(facts, a, scene.things[a].color)


def is_at(facts: Facts, scene: Scene, a: int, b: int, near: float = NEAR) -> np.ndarray:
    """Whether the centre of `a` is within `near` pixels of that of `b` on both axes."""
    return np.abs(facts.position[:, a] - scene.things[b].at).max(-1) <= near


def is_inside(facts: Facts, scene: Scene, a: int, b: int) -> np.ndarray:
    return is_single(facts, scene, a) & is_at(facts, scene, a, b)


def moves_smoothly(facts: Facts, scene: Scene, a: int) -> np.ndarray:
    return ~facts.jumped[:, a] & (facts.count[:, a] > 0) & has_color(facts, a, scene.things[a].color)


def outline_of(scene: Scene, a: int) -> Thing:
    """The outline that thing `a` has to fit into. Raises ValueError if there is none around it."""
    for thing in scene.things:
        if thing.outline and thing.at == scene.things[a].at:
            return thing
    raise ValueError(f"no outline around thing {a}")


def others(scene: Scene, index: int) -> list[int]:
    """Things that a question could name instead of one: actors for an actor, scenery of its kind for scenery."""
    thing, acts = scene.things[index], index in scene.actors
    return [
        i
        for i, x in enumerate(scene.things)
        if i != index and x.outline == thing.outline and x.color != "dark" and (i in scene.actors) == acts
    ]


def reached(facts: Facts, scene: Scene, a: int, b: int) -> list[Names]:
    """The names of `a` and of another target than `b` that it is at in the end."""
    return [(a, i) for i in others(scene, b) if is_at(facts, scene, a, i)[-2:].all()]


# ---------------------------------------------------------------- kinds that several families use

INSIDE = Kind(
    "inside",
    ("Is the {a} ball inside the {b} box at the end?", "Does the {a} ball end up in the {b} box?"),
    is_inside,
    at_end=True,
    true_names=reached,
)
ONE = Kind(
    "one",
    ("Is there exactly one {a} {noun} in every frame?", "Is exactly one {a} {noun} visible all the time?"),
    is_single,
    subscore="one",
)
SMOOTH = Kind(
    "smooth",
    ("Does the {a} {noun} {verb} smoothly, without jumps?", "Is the motion of the {a} {noun} smooth?"),
    moves_smoothly,
    subscore="smooth",
)
SCENERY = Kind("scenery", ("Do all {kept} stay as they are?",), lambda facts, scene: facts.intact, subscore="scenery")
