"""The base class of task families, and helpers that several families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from vlmteacher.microworld.kinds import INSIDE, ONE, SCENERY, SMOOTH, Asked, Kind
from vlmteacher.microworld.scene import (
    COLORS,
    NUM_FRAMES,
    SIZE,
    Point,
    Scene,
    Thing,
    Track,
    between,
    distance_to_segment,
    edited,
    perform,
    rerouted,
)

FLAWS = {
    "single": dict.fromkeys(("purple", "cyan", "yellow"), "single"),
    "both": {"purple": "mistaken", "yellow": "mistaken", "blue": "forbidden", "cyan": "forbidden"},
}
"""The schemes of flawed training videos, with the flaws of key colours: one flaw (`Family.single_flaw`) for half of the
colours, or a missed goal for a third and a forbidden way to the goal for another."""

PACKAGED_FLAWS = "both"  # the scheme of the packaged Reasoner's training videos

Corruption = Callable[[Scene, np.random.Generator], Track]
"""Draws a wrong video of a scene."""


class Family(ABC):
    """A kind of task, and everything that the world knows about it: a family is one subclass, in one file.

    Scenes: `sample`, `is_unseen`. Words: `prompts`, `names`, `paraphrases`, `noun`, `verb`, `kept`, `describe`.
    Questions and their truth: `goal`, `process`, `questions`. Wrong videos: `mistaken`, `forbidden`, `breaks`, `flaw`
    (those of a Reasoner's training videos), `wrong`, `corruptions`, `without`. Rules of the scorer beside the common
    ones: `rules`.

    Prompt and first frame determine the right video, so that a Reasoner's errors are its own and no ambiguity of the
    task. After adding a family to `FAMILIES`, the packaged models must be trained again: they know neither its pictures
    nor its words (`tokenizer.check_words`).
    """

    name: str
    category: str
    """One of VBVR's five: abstraction, knowledge, perception, spatiality, transformation."""
    prompts: tuple[str, ...]
    """Wordings of the task, with the entries of `names` in braces."""
    paraphrases: tuple[str, ...] = ()
    """More wordings, for the Teacher's training only: it should understand a task that a person typed."""
    endings: tuple[str, ...] = ("",)
    """For the {ending} of `paraphrases`."""
    noun: str = "ball"
    """The noun for actors in questions."""
    verb: str = "move"
    """The verb for what actors do."""
    kept: str = "boxes"
    """The words for the scenery, which must stay as it is."""

    goal: Kind
    """The goal question: about the first actor, and the last target if its wording names two things."""
    process: tuple[Kind, ...]
    """The process questions, at most three, about the same."""
    breaks: Kind
    """The process question whose answer is No for `forbidden`."""
    single_flaw: str = "mistaken"
    """The flaw in the scheme ``single``: ``mistaken`` or ``forbidden``."""

    moves: bool = True
    """Whether actors move; otherwise they change where they are."""
    corruptions: ClassVar[Mapping[str, Corruption]] = {}
    """Its own corruptions by name, beside the general ones of ``corruptions.py`` or instead of them."""
    without: tuple[str, ...] = ()
    """General corruptions that make no sense here."""
    query_weight: float = 1.0
    """How often, relative to other families, the Teacher's training writes queries for it: more often if the right
    queries depend on the picture and not on the prompt alone."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, unseen: bool = False) -> Scene | None:
        """Draw a scene inside the parameters of training, or outside (`unseen`). Returns None if the draw fails."""

    @abstractmethod
    def is_unseen(self, scene: Scene) -> bool:
        """Whether a scene lies outside the parameters of training, in the test out of domain."""

    @abstractmethod
    def names(self, scene: Scene) -> dict[str, str]:
        """Return the words that fill the prompts' braces."""

    @abstractmethod
    def key_color(self, scene: Scene) -> str:
        """Return the colour that decides which flaw the training video of a scene has."""

    @abstractmethod
    def mistaken(self, scene: Scene) -> Scene:
        """Return the scene with the mistaken plan of flawed training videos, which misses the goal.

        Nothing about it is random.
        """

    @abstractmethod
    def forbidden(self, scene: Scene) -> Track:
        """Return a track that reaches the goal and breaks one rule on the way, that of `breaks`, without randomness."""

    @abstractmethod
    def wrong(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """Return the scene with a random plan that misses the goal."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of its questions."""
        return (self.goal, *self.process)

    def questions(self, scene: Scene) -> list[Asked]:
        """Return the task's own questions, the goal first: kinds and what they name."""
        names = (scene.actors[0], *scene.targets[-1:])
        return [(kind, names[: len(kind.letters)]) for kind in self.kinds]

    def describe(self, scene: Scene, index: int) -> str | None:
        """Return the words before the noun that single out a thing, its colour last; None if no words do."""
        thing = scene.things[index]
        if index in scene.actors:
            return thing.color
        alike = [x for x in scene.scenery if (x.color, x.outline) == (thing.color, thing.outline)]
        if len(alike) == 1:
            return thing.color
        if sum(x.shape == thing.shape for x in alike) == 1:
            return f"{'round' if thing.shape == 'disc' else 'square'} {thing.color}"
        return None

    def paraphrase(self, scene: Scene, rng: np.random.Generator) -> str:
        """Draw one of the wordings of `paraphrases`."""
        ending = self.endings[int(rng.integers(len(self.endings)))]
        text = self.paraphrases[int(rng.integers(len(self.paraphrases)))]
        return text.format(**self.names(scene), ending=ending)

    def rules(self, scene: Scene, ways: np.ndarray) -> dict[str, float]:
        """Return sub-scores in [0, 1] of the family's own rules. ways: the actors' measured positions (A, T, 2)."""
        return {}

    def signature(self, scene: Scene) -> dict[str, Any]:
        """Return the data of a scene that its digest is computed from."""
        return scene.to_json()

    def flaw(self, scene: Scene, flaws: str) -> str | None:
        """Return the flaw of a scene's training video, which depends on its key colour.

        flaws: a scheme of `FLAWS`. Returns ``mistaken``, ``forbidden`` or, for a right video, None.
        """
        kind = FLAWS[flaws].get(self.key_color(scene))
        return self.single_flaw if kind == "single" else kind


def draw_colors(rng: np.random.Generator, count: int) -> list[str]:
    """Draw `count` different colours."""
    return [str(color) for color in rng.permutation(list(COLORS))[:count]]


def draw_places(
    rng: np.random.Generator, count: int, margin: int, apart: float, given: Sequence[np.ndarray] = ()
) -> list[np.ndarray] | None:
    """Draw points at whole pixels, `margin` from the border, `apart` on one axis from each other and from `given`.

    Returns None if 60 draws are not enough.
    """
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
    """Whether the straight line from `a` to `b` keeps at least `least` pixels away from `others`."""
    return all(distance_to_segment(other, a, b) >= least for other in others)


def straight(scene: Scene, *ends: Point) -> Scene:
    """Return the scene with its actors moving straight to `ends`."""
    return rerouted(scene, *((actor.at, end) for actor, end in zip(scene.moving, ends, strict=True)))


def halfway(scene: Scene, share: float = 0.5) -> Scene:
    """Return the scene whose first actor stops after a share of its motion, growth, turn or change of colour."""
    start, goal, points = scene.moving[0], scene.goals[0], scene.ways[0]
    if len(points) == 1:
        return replace(scene, goals=(between(start, goal, share), *scene.goals[1:]))
    (ax, ay), (bx, by) = points[0], points[-1]
    stop = (ax + share * (bx - ax), ay + share * (by - ay))
    return rerouted(scene, (start.at, stop), *scene.ways[1:])


def other_boxes(scene: Scene) -> list[Thing]:
    """Return the boxes that are no targets, the nearest to the ball first."""
    wanted = {scene.things[i] for i in scene.targets}
    others = [thing for thing in scene.boxes if thing not in wanted]
    return sorted(others, key=lambda b: np.hypot(b.x - scene.start[0], b.y - scene.start[1]))


def free_point(scene: Scene, rng: np.random.Generator, away: float) -> Point:
    """Draw a point at least `away` from the first actor's start and end."""
    while True:
        x, y = rng.uniform(7, SIZE - 7, 2)
        if min(np.hypot(x - px, y - py) for px, py in (scene.start, scene.waypoints[-1])) >= away:
            return float(x), float(y)


HALFWAY = 5  # the frame from which forbidden tracks are wrong: the first of a latent frame of the VAE, as 9 is
SMALLER = 0.75  # the size of a copy, so that nothing takes it for the thing itself


def leap(scene: Scene) -> Track:
    """Return the track in which nothing happens until everything is done at once."""
    track = perform(scene)
    return [track[0]] * HALFWAY + [track[-1]] * (NUM_FRAMES - HALFWAY)


def followed(scene: Scene, actor: int) -> Track:
    """Return the track in which a smaller copy of an actor follows it for four frames, `HALFWAY` frames behind."""
    track, size = perform(scene), SMALLER * scene.things[actor].size
    copies = [replace(track[max(t - HALFWAY, 0)][actor], size=size) for t in range(NUM_FRAMES)]
    shown = range(HALFWAY, HALFWAY + 4)
    return [
        (*things, replace(copy, alpha=float(t in shown)))
        for t, (things, copy) in enumerate(zip(track, copies, strict=True))
    ]


def faded(scene: Scene, index: int) -> Track:
    """Return the track in which a thing of the scenery fades until frame `HALFWAY`."""
    return edited(perform(scene), index, lambda t, _: {"alpha": max(0.0, 1 - t / HALFWAY)})


def growth(rng: np.random.Generator) -> np.ndarray:
    """Draw shares (T,) in [0, 1] that grow from some frame on, for gradual changes."""
    return np.clip(np.linspace(-float(rng.uniform(0, 1)), 1, NUM_FRAMES), 0, 1) * float(rng.uniform(0.3, 1.0))


BALL_TO_NAMED_BOX = (
    "Move the {ball} ball into the {box} box{ending}.",
    "Bring the {ball} ball to the {box} box{ending}.",
    "The {ball} ball goes into the {box} box{ending}.",
    "Put the {ball} ball in the {box} box{ending}.",
    "Please roll the {ball} ball to the {box} box{ending}.",
    "Guide the {ball} ball into the {box} box{ending}.",
    "The {ball} ball should end in the {box} box{ending}.",
)
"""Paraphrases of tasks that name ball and box."""


class BallToBox(Family):
    """Tasks in which one ball has to come to rest in the right one of several boxes."""

    goal = INSIDE
    process = (ONE, SMOOTH, SCENERY)

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
