"""The Teacher's questions about one instance (query synthesis): asking for them, parsing, checking, editing as JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vlmteacher import arguments
from vlmteacher.errors import InputError
from vlmteacher.files import check_text, parse_json, read_json, write_text

MAX_QUERIES = 8

MAX_PROCESS = 3  # that a Teacher is asked for (method, query synthesis); people may write more

QUERY_INSTRUCTION = """\
An AI model will make a video for this task: {prompt}
If there is an image, it is the first frame of that video.
Write the yes/no questions that the finished video will be checked with:
- one goal question: is the task accomplished at the end of the video?
- one to three process questions: what must hold in every frame on the way, such as where something stays, which way \
it moves, what keeps its shape or colour.
Rules for each question:
1. It is observable: looking at the frames is enough to answer it. Name things by their colour, shape and place.
2. It is positive: Yes means that all is well. Say what must be seen, in words other than "not", "no", "never", \
"without" or "avoid".
3. It asks about one thing: one question mark, and neither "and" nor "or".
4. It is independent: it asks for something that the other questions do not ask for.
5. It is plain English and short.
For the task "Drive the blue car through the maze to the flag" this is a good answer:
{"goal": "Is the blue car at the flag at the end of the video?", "process": ["Does the blue car stay on the white path \
all the way?", "Do the walls of the maze keep their places?", "Is exactly one blue car visible in every frame?"]}
Answer for the task at the top, only with JSON of this form: {"goal": "...", "process": ["...", "..."]}"""
GOAL_INSTRUCTION = "\nThe {which} image shows the goal: how the video should end."
RETRY_INSTRUCTION = "This answer cannot be used: {reason}. Mend it, and answer only with the whole JSON again."
ANSWER_INSTRUCTION = " Answer Yes or No."  # the packaged Teacher is trained on this text, character for character


@dataclass(frozen=True)
class QuerySet:
    """One goal question and M >= 0 process questions, yes/no, phrased so that "Yes" means satisfied.

    Raises InputError: a question that is empty or not a string, more than `MAX_QUERIES` in all.
    """

    goal: str
    process: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.process, str) or not isinstance(self.process, Sequence):
            raise InputError(f'queries: "process" must be a list of questions, not {self.process!r}')
        object.__setattr__(self, "process", tuple(self.process))
        for question in self.questions:
            if not isinstance(question, str) or arguments.is_blank(question):
                raise InputError(f"queries: every question must be a non-empty string, not {question!r}")
            check_text(question, f"queries: {_short(question, 60)!a}")
        if len(self.questions) > MAX_QUERIES:
            raise InputError(
                f"queries: {len(self.questions)} questions, at most {MAX_QUERIES} are allowed (goal included)"
            )

    @property
    def questions(self) -> tuple[str, ...]:
        """The goal question first, then the process questions; the order of the Teacher's losses."""
        return (self.goal, *self.process)

    def plus(self, question: str) -> QuerySet:
        """The set with one more process question, unless it has that question."""
        return self if question in self.questions else QuerySet(self.goal, (*self.process, question))

    def to_dict(self) -> dict[str, Any]:
        return {"goal": self.goal, "process": list(self.process)}

    @classmethod
    def from_dict(cls, value: object) -> QuerySet:
        if not isinstance(value, dict) or "goal" not in value:
            raise InputError('queries: no goal; expected {"goal": "...", "process": ["...", ...]}')
        if unknown := sorted(value.keys() - {"goal", "process"}, key=str):
            raise InputError(f"queries: unknown entry {unknown[0]!r:.60}: there are goal and process")
        return cls(goal=value["goal"], process=value.get("process", ()))

    @classmethod
    def of(cls, queries: object) -> QuerySet | None:
        """A query set from its dictionary, a list with the goal first, or a file; None stays. Raises InputError."""
        if queries is None or isinstance(queries, QuerySet):
            return queries
        if isinstance(queries, (str, os.PathLike)):
            return cls.load(arguments.path("queries", queries))
        if isinstance(queries, (list, tuple)) and queries:
            return cls(queries[0], tuple(queries[1:]))
        return cls.from_dict(queries)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> QuerySet:
        return cls.from_dict(parse_json(text, "queries: the text"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QuerySet:
        """Read a queries file; InputError names the file."""
        value = read_json(path, "queries file")
        try:
            return cls.from_dict(value)
        except InputError as error:
            raise InputError(f"queries file {path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the set as JSON, the whole file or none (see `files.replacing`). Raises OutputError."""
        write_text(Path(path), self.to_json() + "\n")


@dataclass(frozen=True)
class QueryStyle:
    """How a Teacher is asked for queries; a checkpoint's `teacher.json`, beside its config.json, overrides any of it.

    query_instruction: the request, with {prompt} in place of the task.
    own_wording: the model was trained to answer this request in wordings of its own. Its queries need not follow the
        rules for real VLMs (`check_written`), and the second request is not told what was wrong with the first answer.
    preservation_query: the process question that `Settings.preserve` adds.
    writer: subfolder of the checkpoint with a PEFT LoRA that is on while queries are written and off while judging.
    """

    query_instruction: str = QUERY_INSTRUCTION
    own_wording: bool = False
    preservation_query: str = "Does everything that takes no part in the task stay as it is in the first frame?"
    writer: str | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QueryStyle:
        """Read a `teacher.json`; InputError names the entry that cannot be used."""
        try:
            values = read_json(path, "file")
            if not isinstance(values, dict):
                raise ValueError("it is no JSON object")
            if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
                raise ValueError(f"unknown entry {unknown[0]!r}")
            style = cls(**values)
            if not isinstance(style.query_instruction, str) or "{prompt}" not in style.query_instruction:
                raise ValueError("query_instruction must be a text with {prompt} where the task goes")
            if not isinstance(style.preservation_query, str) or not style.preservation_query.strip():
                raise ValueError("preservation_query must be a question")
            if not isinstance(style.own_wording, bool):
                raise ValueError(f"own_wording must be true or false, not {style.own_wording!r}")
            if style.writer is not None and not (isinstance(style.writer, str) and style.writer.isidentifier()):
                raise ValueError(f"writer must be the name of a subfolder, not {style.writer!r}")
        except ValueError as error:
            raise InputError(f"{path} cannot be used: {error}") from error
        return style


def query_prompt(prompt: str, instruction: str = QUERY_INSTRUCTION) -> str:
    """The request to a Teacher for the queries of a task."""
    return instruction.replace("{prompt}", prompt)


def goal_note(after_first_frame: bool) -> str:
    """What follows the request where a picture of the goal is given, after the first frame or alone."""
    which = "second" if after_first_frame else "given"
    return GOAL_INSTRUCTION.replace("{which}", which) + ("" if after_first_frame else " There is no first frame.")


def ask_for_queries(style: QueryStyle, answer: Callable[[Sequence[str], bool], str]) -> QuerySet:
    """Ask a model for the queries of a task, and once more with the reason where its first answer cannot be used.

    answer: returns the model's answer to `style.query_instruction` and the turns after it (its first answer and the
        reply to it, or none yet). The flag asks for a sampled answer, because the greedy one has failed.
    Raises InputError when neither answer can be used.
    """
    turns: list[str] = []
    text = reason = ""
    for retry in (False, True):
        text = answer(turns, retry)
        try:
            return parse_queries(text, None if style.own_wording else check_written)
        except InputError as error:
            reason = str(error)
        if not style.own_wording:
            turns = [text, RETRY_INSTRUCTION.replace("{reason}", reason)]
    raise InputError(
        f"the teacher wrote no usable queries, twice ({reason}); give your own. It answered: {_short(text, 120)!r}"
    )


def parse_queries(text: str, check: Callable[[QuerySet], None] | None = None) -> QuerySet:
    """The queries in a model's answer: the first JSON object that holds valid ones, whatever text is around it.

    Models wrap their answer in prose or a code fence, and some repeat the empty form before the filled one. check:
    raises InputError for queries to reject. Raises InputError for the last object with a goal, or where there is none.
    """
    decoder = json.JSONDecoder()
    failure: InputError | None = None
    start = text.find("{")
    while start >= 0:
        end = start + 1
        try:
            value, stop = decoder.raw_decode(text, start)
            if isinstance(value, dict) and "goal" in value:
                end = stop
                queries = QuerySet.from_dict({key: value[key] for key in ("goal", "process") if key in value})
                if check:
                    check(queries)
                return queries
        except InputError as error:
            failure = error
        except (ValueError, RecursionError):
            pass
        start = text.find("{", end)
    raise failure or InputError("queries: the answer holds no JSON object with a goal")


# ---------------------------------------------------------------- rules for a Teacher's queries


def _words(*words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-])(?:{'|'.join(words)})(?![\w-])", re.IGNORECASE)


NEGATIONS = _words(
    "not|no|never|none|nobody|nothing|nowhere|neither|nor|without|cannot",
    r"\w+n['\u2019]t",
    "(?:avoid|fail|refrain|prevent|lack)(?:s|ed|ing)?",
)
CONJUNCTIONS = _words("and/or", "and", "or", "but", "as well as", "&")
OPEN_QUESTIONS = _words("what", "which", "who", "whose", "whom", "where", "when", "why", "how")
# Quoted text, such as that of a sign, is not the wording. An apostrophe inside of a word opens no quotation.
QUOTED = re.compile(r"\"[^\"]*\"|\u201c[^\u201d]*\u201d|(?<!\w)'[^']*'(?!\w)|\u2018[^\u2019]*\u2019(?!\w)")
BETWEEN = re.compile(r"\bbetween\b([^?]*?)\band\b", re.IGNORECASE)
QUESTION_MARKS = re.compile(r"[?\uff1f\u061f]")  # also full-width and Arabic


def check_wording(question: str) -> None:
    """Check one question of a Teacher: it must be a yes/no question about one thing, positively phrased.

    VLMs are less certain of negated questions and confuse Yes and No in them; the gradient of a compound question leads
    to neither of its parts. The rules are about English words outside of quotation marks, and allow "between A and B".
    Raises InputError, which names the question, what is wrong and the remedy.
    """
    plain = BETWEEN.sub(r"between\1", QUOTED.sub("this", question))
    about = f"queries: {_short(question, 100)!r}"
    marks = len(QUESTION_MARKS.findall(plain))
    if match := NEGATIONS.search(plain):
        raise InputError(
            f'{about} is negated ("{match[0]}"): say what must be seen instead, so that Yes means satisfied'
        )
    if marks > 1:
        raise InputError(f"{about} asks {marks} questions: make each of them a query of its own")
    if match := CONJUNCTIONS.search(plain):
        raise InputError(f'{about} is compound ("{match[0]}"): ask one thing, and make the other a query of its own')
    if not marks or not QUESTION_MARKS.match(plain.rstrip()[-1]):
        raise InputError(f"{about} is no question: make it one that ends with a question mark")
    if match := OPEN_QUESTIONS.match(plain.lstrip()):
        raise InputError(f'{about} cannot be answered by Yes ("{match[0]}"): begin it with Is, Are, Does or Do')


def check_written(queries: QuerySet) -> None:
    """Check the queries of a Teacher: 1 to `MAX_PROCESS` process questions, all different, each well worded.

    Queries of people need not follow these rules. Raises InputError.
    """
    if not 1 <= len(queries.process) <= MAX_PROCESS:
        raise InputError(
            f"queries: {len(queries.process)} process questions: write at least 1 and at most {MAX_PROCESS}"
        )
    seen = set()
    for question in queries.questions:
        check_wording(question)
        if (key := " ".join(re.findall(r"\w+", question.lower()))) in seen:
            raise InputError(f"queries: {_short(question, 100)!r} appears twice: replace one of them")
        seen.add(key)


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."
