"""The questions that the Teacher is asked about a video of any family, in words, with their true answers.

A family says which questions its task has (`Family.questions`); here they are worded, answered from `Facts`, varied
for training, and recognised in what a Teacher wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vlmteacher.microworld.facts import COLOR_NAMES, Facts, facts_of
from vlmteacher.microworld.families import FAMILIES
from vlmteacher.microworld.kinds import Kind, Name, Names, others
from vlmteacher.microworld.scene import Scene
from vlmteacher.queries import QuerySet, QueryStyle

# What the packaged Teacher is asked. It is trained on this text, character for character, and on no other.
STYLE = QueryStyle(
    "A video must carry out this task: {prompt}\n"
    "Write questions to check the video. Each is answered yes or no by watching the video, and Yes means satisfied. "
    "Write one goal question about the final result and one to three process questions about rules that must hold "
    "all the way. "
    'Answer only with JSON: {"goal": "...", "process": ["...", "..."]}',
    own_wording=True,
    preservation_query="Do all boxes and blocks stay as they are?",
)


@dataclass(frozen=True)
class Question:
    """One question about one video.

    Attributes:
        kind: name of its `Kind`.
        text: the question in words.
        names: for each colour word of the text the index of the thing that it names, None if it names none.
        holds: (T,) whether the condition holds in each frame.
        at_end: the last two frames decide the answer; otherwise all frames do.
    """

    kind: str
    text: str
    names: tuple[int | None, ...]
    holds: np.ndarray
    at_end: bool

    @property
    def answer(self) -> bool:
        return bool(self.holds[-2:].all() if self.at_end else self.holds.all())


def kinds() -> dict[str, Kind]:
    """The kinds of all families by name."""
    return {kind.name: kind for family in FAMILIES.values() for kind in family.kinds}


def describe(scene: Scene, index: int) -> str | None:
    """The words before the noun that single out a thing, its colour last; None if no words of the family do."""
    return FAMILIES[scene.family].describe(scene, index)


def question(scene: Scene, facts: Facts, kind: Kind, named: Names, wording: int = 0) -> Question:
    """The question of `kind` about what is `named`, with its truth in each frame.

    A colour in the place of a thing means that no such thing exists: the condition then holds in no frame.
    """
    family = FAMILIES[scene.family]
    letters = {
        letter: name if isinstance(name, str) else str(describe(scene, name))
        for letter, name in zip("abc", named, strict=False)
    }
    text = kind.wordings[wording].format(noun=family.noun, verb=family.verb, kept=family.kept, **letters)
    if any(isinstance(name, str) and letter != kind.color for letter, name in zip("abc", named, strict=False)):
        holds = np.zeros(len(facts.count), bool)
    else:
        holds = kind.rule(facts, scene, *named)
    names = tuple(None if isinstance(name, str) else name for name in named)
    return Question(kind.name, text, names, holds, kind.at_end)


def own_questions(scene: Scene, facts: Facts) -> list[Question]:
    """The task's own questions, the goal first, in the words that the Teacher learns to write."""
    return [question(scene, facts, kind, named) for kind, named in FAMILIES[scene.family].questions(scene)]


def right_queries(scene: Scene) -> QuerySet:
    """The queries that the Teacher learns to write for a task."""
    goal, *process = (q.text for q in own_questions(scene, facts_of(scene, [scene.things])))
    return QuerySet(goal=goal, process=tuple(process))


def texts(scene: Scene) -> Iterator[str]:
    """Every prompt and every wording of every own question that a scene can have."""
    family = FAMILIES[scene.family]
    for prompt in family.prompts:
        yield prompt.format(**family.names(scene))
    facts = facts_of(scene, [scene.things])
    for kind, named in family.questions(scene):
        for wording in range(len(kind.wordings)):
            yield question(scene, facts, kind, named, wording).text


# ---------------------------------------------------------------- questions for training


def _variation(scene: Scene, facts: Facts, kind: Kind, named: Names, rng: np.random.Generator) -> Names:
    """Other names for a question: those that make it true of this video, another thing's, or an absent colour."""
    if not named:
        return named
    true_names = [names for names in kind.true_names(facts, scene, *named) if _can_be_described(scene, names)]
    if true_names and rng.random() < 0.4:
        return true_names[0]
    place = int(rng.integers(len(named))) if rng.random() < 0.3 else len(named) - 1
    name, new = named[place], list(named)
    free = [c for c in COLOR_NAMES if all(c != x.color for x in scene.things)]
    if isinstance(name, str):
        new[place] = str(rng.choice([c for c in COLOR_NAMES if c != name]))
    elif (instead := _instead(scene, name, named)) and rng.random() < 0.75:
        new[place] = int(rng.choice(instead))
    else:
        new[place] = str(rng.choice(free))
    return tuple(new)


def _can_be_described(scene: Scene, names: Names) -> bool:
    return all(isinstance(name, str) or describe(scene, name) is not None for name in names)


def _instead(scene: Scene, index: int, named: Names) -> list[int]:
    """Things that a question which names `named` could name instead of one of them."""
    return [i for i in others(scene, index) if i not in named and describe(scene, i) is not None]


def ask(scene: Scene, facts: Facts, rng: np.random.Generator, count: int = 6) -> list[Question]:
    """The task's own questions, and variations (other names, other wordings) up to `count` questions in all.

    About as many answers are No as Yes.
    """
    asked = own_questions(scene, facts)[:count]
    plan = FAMILIES[scene.family].questions(scene)
    while len(asked) < count:
        new: Question | None = None
        for _ in range(3):
            kind, named = plan[0] if rng.random() < 0.5 else plan[int(rng.integers(len(plan)))]
            if rng.random() < 0.7:
                named = _variation(scene, facts, kind, named, rng)
            new = question(scene, facts, kind, named, int(rng.integers(len(kind.wordings))))
            if new.answer == (2 * sum(q.answer for q in asked) < len(asked)):
                break
        assert new is not None
        asked.append(new)
    return asked


# ---------------------------------------------------------------- truth of a Teacher's queries


class Truth(NamedTuple):
    """What a query is about, and its true answer.

    rule: the scorer's sub-score that the query is about, None if the scorer has none. answer: None if the query is none
    of the world's questions; it is then taken for one about the goal.
    """

    rule: str | None
    answer: bool | None


def recognise(text: str, scene: Scene, facts: Facts) -> Question | None:
    """The question that a Teacher wrote, if it is one of the world's and this scene has what it is about."""
    for kind in kinds().values():
        for wording, template in enumerate(kind.wordings):
            pattern = re.escape(template).replace(r"\{noun\}", r"\w+").replace(r"\{verb\}", r"\w+")
            pattern = pattern.replace(r"\{kept\}", r"[\w ]+")
            match = re.fullmatch(re.sub(r"\\{([abc])\\}", r"(?P<\1>[\\w ]+?)", pattern), text)
            if match:
                named = tuple(_find(scene, kind, *item) for item in sorted(match.groupdict().items()))
                if all(isinstance(name, int) or name in COLOR_NAMES for name in named):
                    try:
                        return question(scene, facts, kind, named, wording)
                    except ValueError:  # another family's question
                        return None
    return None


def _find(scene: Scene, kind: Kind, letter: str, words: str) -> Name:
    """The index of the thing that the words of a question name; their colour if they name none."""
    acts, color = letter in kind.actors, words.split()[-1]
    things = [i for i in range(len(scene.things)) if describe(scene, i) == words and color in COLOR_NAMES]
    things.sort(key=lambda i: (i in scene.actors) != acts)
    return color if letter == kind.color or not things else things[0]


def truths(scene: Scene, facts: Facts, queries: QuerySet) -> list[Truth]:
    """What each of `queries.questions` is about, and its true answer by these facts."""
    questions, known = [recognise(text, scene, facts) for text in queries.questions], kinds()
    return [Truth(known[q.kind].subscore, q.answer) if q else Truth("goal", None) for q in questions]
