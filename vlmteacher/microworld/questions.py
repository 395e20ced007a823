"""The Teacher's questions: what it is asked about each family's videos, in which words, with which true answers.

A question is of a kind (`KINDS`: its wordings, and the rule that answers it from `Facts`) and names things of the first
frame by their colours. `PLANS` tells each family's own questions, the goal first.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from vlmteacher.microworld import world
from vlmteacher.microworld.facts import NONE, Facts, facts_of, wrapped
from vlmteacher.microworld.scene import FIT, Scene
from vlmteacher.queries import QuerySet, QueryStyle

NEAR = 4.5  # pixels from the centre of a box or dot, per axis
REACHED = 6.5  # pixels from the centre of a dot on the way
FITS = 1.2  # pixels of size
LIES = 8.0  # degrees

# What the packaged Teacher is asked: it is trained on this text, character for character, and knows no other.
STYLE = QueryStyle(
    "A video must carry out this task: {prompt}\n"
    "Write questions to check the video. Each is answered yes or no by watching the video, and Yes means satisfied. "
    "Write one goal question about the final result and one to three process questions about rules that must hold "
    "all the way. "
    'Answer only with JSON: {"goal": "...", "process": ["...", "..."]}',
    own_wording=True,
    preservation_query="Do all boxes and blocks stay as they are?",
)

_COLORS = list(world.COLORS)
Name = int | str
"""What a question names: the index of a thing, or a colour that no thing of that kind has."""
Rule = Callable[..., np.ndarray]
"""(facts, scene, *things named) -> (T,) whether what is asked holds in each frame."""


@dataclass(frozen=True)
class Kind:
    """wordings: {a}, {b}, {c} are what it names, {noun}, {verb} and {kept} the family's words.

    at_end: the last two frames decide, else all.
    """

    wordings: tuple[str, ...]
    rule: Rule
    at_end: bool = False


@dataclass(frozen=True)
class Question:
    """One question about one video.

    holds: (T,) whether what it asks is so in each frame. names: the thing that each of the text's colour words names;
    None where there is none. answer: whether it is so in the last two frames (`at_end`), else in all.
    """

    kind: str
    text: str
    names: tuple[int | None, ...]
    holds: np.ndarray

    @property
    def answer(self) -> bool:
        return bool(self.holds[-2:].all() if KINDS[self.kind].at_end else self.holds.all())


# ---------------------------------------------------------------- rules


def _own(facts: Facts, scene: Scene, a: int) -> np.ndarray:
    """Whether there is one of a thing, and of its own colour."""
    return (facts.count[:, a] == 1) & (facts.color[:, a] == _COLORS.index(scene.things[a].color))


def _at(facts: Facts, scene: Scene, a: int, b: int, near: float = NEAR) -> np.ndarray:
    return np.abs(facts.position[:, a] - scene.things[b].at).max(-1) <= near


def _inside(facts: Facts, scene: Scene, a: int, b: int) -> np.ndarray:
    return _own(facts, scene, a) & _at(facts, scene, a, b)


def _smooth(facts: Facts, scene: Scene, a: int) -> np.ndarray:
    right_color = facts.color[:, a] == _COLORS.index(scene.things[a].color)
    return ~facts.jumped[:, a] & (facts.count[:, a] > 0) & right_color


def _avoid(facts: Facts, scene: Scene, a: int) -> np.ndarray:
    return ~facts.touching & np.isfinite(facts.position[:, a, 0])


def _order(facts: Facts, scene: Scene, a: int, b: int, c: int) -> np.ndarray:
    """b has been visited wherever c is, and both in the end."""
    first, second = (np.maximum.accumulate(_at(facts, scene, a, i, REACHED)) for i in (b, c))
    holds = first | ~second
    holds[-1] &= second[-1]
    return holds


def _turns(facts: Facts, scene: Scene, a: int, b: str) -> np.ndarray:
    return (facts.count[:, a] == 1) & (facts.color[:, a] == _COLORS.index(b))


def _outline(scene: Scene, a: int) -> int:
    """The outline that a thing is to fit into."""
    return next(i for i, x in enumerate(scene.things) if x.outline and x.at == scene.things[a].at)


def _fills(facts: Facts, scene: Scene, a: int) -> np.ndarray:
    end = scene.things[_outline(scene, a)].size - FIT
    return _own(facts, scene, a) & (np.abs(facts.size[:, a] - end) <= FITS)


def _lies(facts: Facts, scene: Scene, a: int) -> np.ndarray:
    end = scene.things[_outline(scene, a)].angle
    return _own(facts, scene, a) & (np.abs(wrapped(facts.angle[:, a] - end)) <= LIES)


def _shorter(facts: Facts, scene: Scene, a: int) -> np.ndarray:
    start = scene.things[a].angle
    way = np.sign(wrapped(np.asarray(scene.things[_outline(scene, a)].angle - start)))
    return ~(way * wrapped(facts.angle[:, a] - start) < -LIES)


def _sorted(facts: Facts, scene: Scene, a: int, b: int) -> np.ndarray:
    """a is the left one and b the right one."""
    x = facts.position[..., 0]
    (between,) = (i for i in range(len(scene.things)) if i not in (a, b)) if a != b else (a,)
    apart = 10.0
    row = np.abs(facts.position[..., 1] - scene.things[0].y).max(1) <= NEAR
    whole = (facts.count == 1).all(1)
    return whole & row & (x[:, between] - x[:, a] >= apart) & (x[:, b] - x[:, between] >= apart)


KINDS = {
    "inside": Kind(
        ("Is the {a} ball inside the {b} box at the end?", "Does the {a} ball end up in the {b} box?"), _inside, True
    ),
    "at": Kind(
        ("Is the {a} ball at the {b} dot at the end?", "Does the {a} ball end up at the {b} dot?"), _inside, True
    ),
    "turns": Kind(("Does the {a} shape turn {b}?", "Is the {a} shape {b} at the end?"), _turns, True),
    "fills": Kind(
        ("Does the {a} disc fill its ring at the end?", "Does the {a} disc grow to the size of its ring?"), _fills, True
    ),
    "lies": Kind(
        ("Does the {a} bar lie in its outline at the end?", "Does the {a} bar turn into its outline?"), _lies, True
    ),
    "sorted": Kind(
        (
            "Is the {a} disc on the left and the {b} disc on the right at the end?",
            "Is the {a} disc the left one and the {b} disc the right one at the end?",
        ),
        _sorted,
        True,
    ),
    "one": Kind(
        ("Is there exactly one {a} {noun} in every frame?", "Is exactly one {a} {noun} visible all the time?"), _own
    ),
    "visible": Kind(
        ("Is the {a} {noun} visible all the time?", "Can the {a} {noun} be seen in every frame?"),
        lambda facts, scene, a: facts.count[:, a] == 1,
    ),
    "smooth": Kind(
        ("Does the {a} {noun} {verb} smoothly, without jumps?", "Is the motion of the {a} {noun} smooth?"), _smooth
    ),
    "avoid": Kind(
        (
            "Does the {a} ball stay off the dark blocks all the way?",
            "Does the {a} ball avoid the dark blocks?",
        ),
        _avoid,
    ),
    "order": Kind(
        (
            "Does the {a} ball visit the {b} dot before the {c} dot?",
            "Does the {a} ball go to the {b} dot first, then to the {c} dot?",
        ),
        _order,
    ),
    "shorter": Kind(
        ("Does the {a} bar turn the shorter way?", "Does the {a} bar turn the shorter way to its outline?"), _shorter
    ),
    "scenery": Kind(("Do all {kept} stay as they are?",), lambda facts, scene: facts.intact),
}

NOUNS = {"recolor": "shape", "resize": "disc", "rotate": "bar", "sort": "disc"}  # else a ball
VERBS = {"resize": "grow", "rotate": "turn"}
KEPT = {
    "maze": "boxes and blocks",
    "connect": "dots",
    "count": "boxes and dots",
    "recolor": "other shapes",
    "resize": "other things",
    "rotate": "other things",
}  # else boxes

_SCENERY: tuple[str, tuple[Name, ...]] = ("scenery", ())


def _single(*process: str, goal: str = "inside") -> Callable[[Scene], list[tuple[str, tuple[Name, ...]]]]:
    """Questions about the one actor, and in the goal its target."""

    def plan(scene: Scene) -> list[tuple[str, tuple[Name, ...]]]:
        a = scene.actors[0]
        end = (a, scene.targets[-1]) if goal in ("inside", "at") else (a,)
        return [(goal, end), *(_SCENERY if kind == "scenery" else (kind, (a,)) for kind in process)]

    return plan


def _deliver(scene: Scene) -> list[tuple[str, tuple[Name, ...]]]:
    """Where each ball should be; the first in the picture's reading order is the goal's."""
    plan: list[tuple[str, tuple[Name, ...]]] = [
        ("inside", pair) for pair in zip(scene.actors, scene.targets, strict=True)
    ]
    return [*plan, *(("one", (a,)) for a in scene.actors)][:4]


def _recolor(scene: Scene) -> list[tuple[str, tuple[Name, ...]]]:
    a = scene.actors[0]
    return [("turns", (a, scene.goals[0].other)), ("visible", (a,)), _SCENERY]


def _sort(scene: Scene) -> list[tuple[str, tuple[Name, ...]]]:
    ranked = sorted(scene.actors, key=lambda i: scene.things[i].size)
    return [("sorted", (ranked[0], ranked[-1])), *(("one", (i,)) for i in ranked)]


def _connect(scene: Scene) -> list[tuple[str, tuple[Name, ...]]]:
    a, dots = scene.actors[0], scene.targets
    pairs = [("order", (a, *pair)) for pair in pairwise(dots)]
    return [("at", (a, dots[-1])), *pairs, *([("one", (a,))] if len(pairs) < 2 else []), _SCENERY]


PLANS: dict[str, Callable[[Scene], list[tuple[str, tuple[Name, ...]]]]] = {
    "move": _single("one", "smooth", "scenery"),
    "maze": _single("avoid", "one", "scenery"),
    "deliver": _deliver,
    "recolor": _recolor,
    "resize": _single("one", "smooth", "scenery", goal="fills"),
    "rotate": _single("shorter", "one", "smooth", goal="lies"),
    "sort": _sort,
    "connect": _connect,
    "odd": _single("one", "smooth", "scenery"),
    "count": _single("one", "smooth", "scenery"),
}


# ---------------------------------------------------------------- words

ORDINALS = ("first", "second", "third", "fourth")


def describe(scene: Scene, index: int) -> str | None:
    """What a thing is called before its noun, the colour last; None where no words of the world single it out."""
    thing = scene.things[index]
    if index in scene.actors:
        return thing.color
    like = [
        x
        for i, x in enumerate(scene.things)
        if i not in scene.actors and (x.color, x.outline) == (thing.color, thing.outline)
    ]
    if len(like) == 1:
        return thing.color
    if sum(x.shape == thing.shape for x in like) == 1:
        return f"{'round' if thing.shape == 'disc' else 'square'} {thing.color}"
    if scene.family == "count":
        return f"{ORDINALS[sorted(x.x for x in like).index(thing.x)]} {thing.color}"
    return None


def question(scene: Scene, facts: Facts, kind: str, named: tuple[Name, ...], wording: int = 0) -> Question:
    """A question of `kind` about what is `named`, with its truth in each frame."""
    words = {
        "noun": NOUNS.get(scene.family, "ball"),
        "verb": VERBS.get(scene.family, "move"),
        "kept": KEPT.get(scene.family, "boxes"),
        **{
            letter: name if isinstance(name, str) else str(describe(scene, name))
            for letter, name in zip("abc", named, strict=False)
        },
    }
    if any(isinstance(name, str) for name in (named[:1] if kind == "turns" else named)):
        holds = np.zeros(len(facts.count), bool)
    else:
        holds = KINDS[kind].rule(facts, scene, *named)
    names = tuple(None if isinstance(name, str) else name for name in named)
    return Question(kind, KINDS[kind].wordings[wording].format(**words), names, holds)


def own_questions(scene: Scene, facts: Facts) -> list[Question]:
    """The task's own, the goal first, in the words that the Teacher learns to write."""
    return [question(scene, facts, kind, named) for kind, named in PLANS[scene.family](scene)]


def right_queries(scene: Scene) -> QuerySet:
    """The queries that the Teacher learns to write for a task."""
    goal, *process = (q.text for q in own_questions(scene, facts_of(scene, [scene.things])))
    return QuerySet(goal=goal, process=tuple(process))


# ---------------------------------------------------------------- other questions


def _others(scene: Scene, index: int) -> list[int]:
    """Things that could be named in the place of one: actors for actors, the same kind of scenery for scenery."""
    thing, acts = scene.things[index], index in scene.actors
    return [
        i
        for i, x in enumerate(scene.things)
        if i != index
        and x.outline == thing.outline
        and x.color != "dark"
        and (i in scene.actors) == acts
        and describe(scene, i) is not None
    ]


def _like_seen(kind: str, scene: Scene, facts: Facts, named: tuple[Name, ...]) -> list[tuple[Name, ...]]:
    """The same question with the names that would make it true of this video."""
    a = named[0]
    assert isinstance(a, int)
    if kind in ("inside", "at") and isinstance(named[1], int):
        return [(a, i) for i in _others(scene, named[1]) if _at(facts, scene, a, i)[-2:].all()]
    if kind == "turns":
        shown = int(facts.color[-1, a])
        return [(a, _COLORS[shown])] if shown != NONE else []
    if kind == "sorted":
        order = np.argsort(np.nan_to_num(facts.position[-1, :, 0]))
        return [(int(order[0]), int(order[-1]))]
    if kind == "order":
        return [(a, named[2], named[1])]
    return []


def _variation(
    scene: Scene, facts: Facts, kind: str, named: tuple[Name, ...], rng: np.random.Generator
) -> tuple[Name, ...]:
    """Other names in a question: what would make it true, another thing of the kind, or a colour that is not there."""
    if not named:
        return named
    seen = _like_seen(kind, scene, facts, named)
    if seen and rng.random() < 0.4:
        return seen[0]
    place = int(rng.integers(len(named))) if rng.random() < 0.3 else len(named) - 1
    name, new = named[place], list(named)
    free = [c for c in _COLORS if all(c != x.color for x in scene.things)]
    if isinstance(name, str):
        new[place] = str(rng.choice([c for c in _COLORS if c != name]))
    elif (others := [i for i in _others(scene, name) if i not in named]) and rng.random() < 0.75:
        new[place] = int(rng.choice(others))
    else:
        new[place] = str(rng.choice(free))
    return tuple(new)


def ask(scene: Scene, facts: Facts, rng: np.random.Generator, count: int = 6) -> list[Question]:
    """The task's own questions, and others (other names, other wordings) to make `count`: as many No as Yes, about."""
    asked = own_questions(scene, facts)[:count]
    plan = PLANS[scene.family](scene)
    while len(asked) < count:
        found: Question | None = None
        for _ in range(3):
            kind, named = plan[0] if rng.random() < 0.5 else plan[int(rng.integers(len(plan)))]
            if rng.random() < 0.7:
                named = _variation(scene, facts, kind, named, rng)
            found = question(scene, facts, kind, named, int(rng.integers(len(KINDS[kind].wordings))))
            if found.answer == (2 * sum(q.answer for q in asked) < len(asked)):
                break
        assert found is not None
        asked.append(found)
    return asked


# ---------------------------------------------------------------- quality

RULES = {  # the scorer's sub-score that a kind of question is about; the others are about the goal
    "one": "one",
    "smooth": "smooth",
    "avoid": "avoid",
    "order": "order",
    "shorter": "direct",
    "scenery": "scenery",
    "visible": None,  # the scorer has no such rule
}


class Truth(NamedTuple):
    """rule: the scorer's sub-score that a question is about, None where it has none. answer: the right one; None where
    the question is none of the world's, which is taken for one about the goal."""

    rule: str | None
    answer: bool | None


def recognise(text: str, scene: Scene, facts: Facts) -> Question | None:
    """The question that a Teacher wrote, if it is one of the world's, about things and colours of the world."""
    for kind, entry in KINDS.items():
        for wording, form in enumerate(entry.wordings):
            pattern = re.escape(form).replace(r"\{noun\}", r"\w+").replace(r"\{verb\}", r"\w+")
            pattern = pattern.replace(r"\{kept\}", r"[\w ]+")
            found = re.fullmatch(re.sub(r"\\{([abc])\\}", r"(?P<\1>[\\w ]+?)", pattern), text)
            if found:
                named = tuple(_named(scene, kind, *item) for item in sorted(found.groupdict().items()))
                if all(isinstance(name, int) or name in _COLORS for name in named):
                    return question(scene, facts, kind, named, wording)
    return None


def _named(scene: Scene, kind: str, letter: str, words: str) -> Name:
    """The thing that a question's words name, else their colour."""
    acts = letter == "a" or kind == "sorted"
    found = [i for i in range(len(scene.things)) if describe(scene, i) == words and words.split()[-1] in _COLORS]
    found.sort(key=lambda i: (i in scene.actors) != acts)
    return words.split()[-1] if (kind == "turns" and letter == "b") or not found else found[0]


def truths(scene: Scene, facts: Facts, queries: QuerySet) -> list[Truth]:
    """What each of `queries.questions` is about and how it is to be answered."""
    found = [recognise(text, scene, facts) for text in queries.questions]
    return [Truth(RULES.get(known.kind, "goal"), known.answer) if known else Truth("goal", None) for known in found]
