"""A Teacher whose texts are written beforehand and whose losses are a video's brightness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.tiny_pair import QUERIES
from vlmteacher.queries import QuerySet
from vlmteacher.teachers.base import Teacher


class ScriptedTeacher(Teacher):
    """Answers by the next of `texts`; records requests, and the queries and losses of judged videos."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)
        self.requests: list[tuple[str, list[Any], int]] = []
        self.judged: list[tuple[QuerySet, float]] = []

    def write_queries(self, prompt: str, image: Any = None) -> QuerySet:
        self.written_for = prompt
        return QuerySet.from_dict(QUERIES)

    def answer(self, text: str, images: Sequence[Any] = (), max_tokens: int = 512) -> str:
        self.requests.append((text, list(images), max_tokens))
        return self.texts[len(self.requests) - 1]

    def losses(self, frames: Any, frame_indices: Any, fps: float, queries: QuerySet, check: bool = True) -> Tensor:
        losses = frames.mean().float().expand(len(queries.questions))
        self.judged.append((queries, losses[0].item()))
        return losses

    def to(self, device: Any = None, dtype: Any = None) -> ScriptedTeacher:
        return self

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")
