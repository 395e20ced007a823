"""The prompts that one LoRA for all instances is trained on, and the check that no test has one of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from vlmteacher.errors import InputError
from vlmteacher.files import append_text, parse_json, read_text
from vlmteacher.media import read_image
from vlmteacher.microworld import splits, world
from vlmteacher.queries import QuerySet

MICROWORLD = "microworld"
PROMPT, FIRST_FRAME = "prompt.txt", "first_frame.png"
QUERIES_LIMIT = 2**30  # bytes of a file of queries


@dataclass(frozen=True)
class TrainingPrompt:
    """A prompt and where its first frame is.

    Attributes:
        name: for messages: a directory, or split and index in the microworld.
        text: the prompt.
        source: the file of the first frame, or the microworld's scene that it is drawn from; None: there is none.
    """

    name: str
    text: str
    source: Path | world.Scene | None

    def image(self) -> Image.Image | None:
        """Return the first frame. Raises InputError for a file that cannot be read."""
        if isinstance(self.source, Path):
            return read_image(self.source)
        return None if self.source is None else world.first_frame(self.source)

    @cached_property
    def digest(self) -> str:
        """A hash of the prompt, in which white space counts as one space, and of the first frame's pixels."""
        image = self.image()
        pixels = b"" if image is None else np.asarray(image).tobytes()
        size = None if image is None else image.size
        return hashlib.sha256(f"{' '.join(self.text.split())}\n{size}\n".encode() + pixels).hexdigest()


def load_prompts(data: str, count: int, seed: int) -> list[TrainingPrompt]:
    """Return the first `count` prompts of a folder (see `read_folder`), or of the microworld's train split.

    data: a folder, or "microworld", whose scenes `seed` draws. Raises InputError.
    """
    if data == MICROWORLD:
        return list(_scenes("train", seed, count))
    return read_folder(Path(data))[:count]


def read_folder(folder: Path) -> list[TrainingPrompt]:
    """Return the prompts of the directories in `folder`, at any depth, that hold a prompt.txt, sorted.

    The first frame is first_frame.png, where it exists. Raises InputError: no folder, no prompt, or a first frame
    without a prompt.
    """
    if not folder.is_dir():
        raise InputError(f"data folder {folder} does not exist: give a folder in VBVR's layout, or {MICROWORLD}")
    places = sorted({path.parent for name in (PROMPT, FIRST_FRAME) for path in folder.rglob(name)})
    if not places:
        raise InputError(f"data folder {folder} holds no instance: an instance is a directory with a {PROMPT}")
    prompts = []
    for place in places:
        text, frame = read_text(place / PROMPT, "prompt"), place / FIRST_FRAME
        prompts.append(TrainingPrompt(str(place), text.strip(), frame if frame.is_file() else None))
    return prompts


def check_disjoint(prompts: Sequence[TrainingPrompt], tests: Iterable[str]) -> None:
    """Raise InputError if one of `prompts`, with the same first frame, is an instance of a test.

    The tests are the microworld's frozen splits (``id``, ``ood`` and ``validation``) and the folders in `tests`.
    """
    tested = _frozen() + [one for folder in tests for one in read_folder(Path(folder))]
    texts = [{" ".join(one.text.split()) for one in group} for group in (prompts, tested)]
    both = texts[0] & texts[1]  # only their first frames need be read
    digests = {one.digest: one.name for one in tested if " ".join(one.text.split()) in both}
    shared = [one for one in prompts if " ".join(one.text.split()) in both and one.digest in digests]
    if shared:
        raise InputError(
            f"{len(shared)} of {len(prompts)} training prompts are instances of a test, first {shared[0].name}"
            f" ({digests[shared[0].digest]}): train on other instances"
        )


@cache
def _frozen() -> list[TrainingPrompt]:
    return [one for split in ("id", "ood", "validation") for one in _scenes(split, splits.SEED, splits.COUNT)]


def _scenes(split: str, seed: int, count: int) -> Iterator[TrainingPrompt]:
    for index in range(count):
        scene, text = world.instance(index, seed, split)
        yield TrainingPrompt(f"{MICROWORLD} {split} {index}", text, scene)


class QueryFile:
    """The Teacher's queries of the prompts that were drawn so far, kept in a file.

    Raises InputError for a file of other content; a last line that was cut off is dropped.
    """

    def __init__(self, path: Path, write: bool) -> None:
        self.path, self.write = path, write
        self.queries: dict[str, QuerySet | None] = {}
        if not path.exists():
            return
        for line in read_text(path, "queries", QUERIES_LIMIT).splitlines():
            if not line.endswith("}"):
                continue
            row = parse_json(line, f"a line of {path}")
            try:
                self.queries[row["digest"]] = QuerySet.of(row["queries"])
            except (KeyError, TypeError) as error:
                raise InputError(f"{path}: {line[:40]!r}... has no queries: remove that line") from error

    def __contains__(self, prompt: TrainingPrompt) -> bool:
        return prompt.digest in self.queries

    def __getitem__(self, prompt: TrainingPrompt) -> QuerySet | None:
        return self.queries[prompt.digest]

    def __setitem__(self, prompt: TrainingPrompt, queries: QuerySet | None) -> None:
        """Keep the queries of a prompt; None: the Teacher writes none. Raises OutputError."""
        self.queries[prompt.digest] = queries
        if self.write:
            row = {"digest": prompt.digest, "prompt": prompt.text, "queries": queries and queries.to_dict()}
            append_text(self.path, json.dumps(row) + "\n")
