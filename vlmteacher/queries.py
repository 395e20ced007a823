"""The Teacher's questions about one instance (query synthesis): asking for them, parsing, checking, editing as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmteacher.errors import InputError

MAX_QUERIES = 8

# The packaged tiny Teacher is trained on these two texts, character for character: a change asks for a new training.
QUERY_INSTRUCTION = (
    "A video must carry out this task: {prompt}\n"
    "Write questions to check the video. Each is answered yes or no by watching the video, and Yes means satisfied. "
    "Write one goal question about the final result and one to three process questions about rules that must hold "
    "all the way. "
    'Answer only with JSON: {{"goal": "...", "process": ["...", "..."]}}'
)
ANSWER_INSTRUCTION = " Answer Yes or No."


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
            if not isinstance(question, str) or not question.strip():
                raise InputError(f"queries: every question must be a non-empty string, not {question!r}")
        if len(self.questions) > MAX_QUERIES:
            raise InputError(
                f"queries: {len(self.questions)} questions, at most {MAX_QUERIES} are allowed (goal included)"
            )

    @property
    def questions(self) -> tuple[str, ...]:
        """The goal question first, then the process questions; the order of the Teacher's losses."""
        return (self.goal, *self.process)

    def to_dict(self) -> dict[str, Any]:
        return {"goal": self.goal, "process": list(self.process)}

    @classmethod
    def from_dict(cls, value: object) -> QuerySet:
        if not isinstance(value, dict) or "goal" not in value:
            raise InputError('queries: no goal; expected {"goal": "...", "process": ["...", ...]}')
        return cls(goal=value["goal"], process=value.get("process", ()))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> QuerySet:
        try:
            value = json.loads(text)
        except ValueError as error:
            raise InputError(f"queries: not JSON ({error})") from error
        return cls.from_dict(value)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QuerySet:
        """Read a queries file; InputError names the file."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"queries file {path}: cannot be read ({error})") from error
        except InputError as error:
            raise InputError(f"queries file {path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the set as JSON; a reader never sees half a file."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise InputError(f"queries file {path}: cannot be written ({error})") from error


def query_prompt(prompt: str) -> str:
    """The text that asks a Teacher for the queries of a task."""
    return QUERY_INSTRUCTION.format(prompt=prompt)


def parse_queries(text: str) -> QuerySet:
    """Find the queries in a model's answer: the first JSON object with a goal, whatever stands around it.

    Raises InputError when there is none, or when it is not a valid `QuerySet`.
    """
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            value, _ = decoder.raw_decode(text, start)
        except ValueError:
            value = None
        if isinstance(value, dict) and "goal" in value:
            return QuerySet.from_dict(value)
        start = text.find("{", start + 1)
    raise InputError("queries: the answer holds no JSON object with a goal")
