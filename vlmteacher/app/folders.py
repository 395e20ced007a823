"""The folder of the page's runs: what is in it, and which of its files a browser may have."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from vlmteacher.app.jobs import FIRST_FRAME
from vlmteacher.errors import InputError
from vlmteacher.files import read_json
from vlmteacher.media import read_image
from vlmteacher.runs.folder import RECORD
from vlmteacher.runs.verdict import Verdict

DEPTH = 3  # of folders in which runs and sweeps are found, as in `vlmteacher report`
SHOWN = 60  # runs at most in the list, the newest first
RESULTS = "results.json"
PUBLIC = {
    "before.mp4": "video/mp4",
    "after.mp4": "video/mp4",
    "lora.safetensors": "application/octet-stream",
    "report.html": "text/html",
    "queries.json": "application/json",
    RECORD: "application/json",
    "README.md": "text/markdown",
}
"""The files of a run that a browser may have, with their types."""


@dataclass(frozen=True)
class Entry:
    """A run in the list. name: its folder, relative to that of all runs; outcome: of the verdict, or "unfinished"."""

    name: str
    prompt: str
    outcome: str
    steps: int
    goal: tuple[float, float] | None
    changed: datetime


class Runs:
    """The folder of all runs."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._entries: dict[str, tuple[int, Entry]] = {}

    def new(self, prompt: str, taken: Sequence[Path] = ()) -> Path:
        """The path of a folder for a run, which is neither there yet nor `taken` by one that waits."""
        words = re.findall(r"[a-z0-9]+", prompt.lower())
        name = "-".join([datetime.now().strftime("%Y%m%d-%H%M%S"), *words])[:60].rstrip("-")
        path, number = self.root / name, 1
        while path.exists() or path in taken:
            number += 1
            path = self.root / f"{name}-{number}"
        return path

    def name(self, folder: Path) -> str:
        """The name of a run's folder in this one."""
        return folder.relative_to(self.root).as_posix()

    def folder(self, name: str) -> Path:
        """The folder of a run. Raises InputError for one that is not in this folder."""
        path = self._inside(name)
        if path is None or not (path / RECORD).is_file():
            raise InputError(f"there is no run {name!r:.80}: it was moved or deleted")
        return path

    def file(self, name: str, file: str) -> Path | None:
        """A file of a run for a browser, or None: one of `PUBLIC`, and no link that leads out of the folder."""
        path = self._inside(f"{name}/{file}") if file in PUBLIC else None
        return path if path is not None and path.is_file() and (path.parent / RECORD).is_file() else None

    def _inside(self, name: str) -> Path | None:
        parts = name.split("/")
        if "\0" in name or any(part in ("", ".", "..") for part in parts):
            return None
        try:
            path = self.root.joinpath(*parts).resolve()
            path.exists()
        except OSError:  # the name is too long
            return None
        return path if path.is_relative_to(self.root) and path != self.root else None

    def record(self, name: str) -> dict[str, Any]:
        """run.json of a run. Raises InputError where it cannot be read or is not that of a run."""
        folder = self.folder(name)
        record = read_json(folder / RECORD, "record")
        try:
            entries = (record["prompt"], record["config"]["seed"], record["queries"]["goal"], record["stopped"])
            if not all(map(isinstance, entries, (str, int, str, str))) or not isinstance(record["steps"], list):
                raise TypeError
        except (KeyError, TypeError) as error:
            raise InputError(f"run {name} cannot be shown: its {RECORD} is not that of a run") from error
        return dict(record)

    def first_frame(self, name: str) -> Image.Image | None:
        """The first frame of a run of the page, or None where it had none. Raises InputError where it is missing."""
        folder = self.folder(name)
        if (folder / FIRST_FRAME).is_file():
            return read_image(folder / FIRST_FRAME)
        if self.record(name)["config"].get("image") is not None:
            raise InputError(
                f"run {name} had a first frame that its folder does not hold: go on with vlmteacher solve --resume"
            )
        return None

    def entries(self) -> list[Entry]:
        """The newest runs, the latest first; a folder that cannot be read is left out."""
        places = [path for path in self._holding(RECORD) if self._inside(self.name(path)) is not None]
        stamps = {path: (path / RECORD).stat().st_mtime_ns for path in places}
        newest = sorted(places, key=lambda path: -stamps[path])[:SHOWN]
        entries = []
        for path in newest:
            name, stamp = self.name(path), stamps[path]
            if self._entries.get(name, (0, None))[0] != stamp:
                try:
                    self._entries[name] = stamp, self._entry(name, stamp)
                except InputError:
                    continue
            entries.append(self._entries[name][1])
        return entries

    def _entry(self, name: str, stamp: int) -> Entry:
        record = self.record(name)
        outcome, goal = "unfinished", None
        if "p_yes_after" in record:
            try:
                outcome = Verdict.of(record).outcome
                goal = record["p_yes_before"][0], record["p_yes_after"][0]
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise InputError(f"run {name} is not of this version") from error
        changed = datetime.fromtimestamp(stamp / 1e9)
        return Entry(name, record["prompt"], outcome, len(record["steps"]), goal, changed)

    def sweeps(self) -> list[str]:
        """The names of the folders of sweeps, in order."""
        return sorted(self.name(path) for path in self._holding(RESULTS))

    def sweep_folders(self, names: list[str]) -> list[Path]:
        """The folders of sweeps by name. Raises InputError for none, and for one that is not in this folder."""
        known = self.sweeps()
        if not names:
            raise InputError("choose one sweep or more")
        for name in names:
            if name not in known:
                raise InputError(f"there is no sweep {name!r:.80}: it was moved or deleted")
        return [self.root / name for name in names]

    def _holding(self, file: str) -> list[Path]:
        """The folders below this one that hold a file of this name; links to folders are not followed."""
        result: list[Path] = []
        levels = [self.root]
        for _ in range(DEPTH):
            inner = [
                Path(each.path)
                for level in levels
                if os.access(level, os.R_OK | os.X_OK) and level.is_dir()
                for each in os.scandir(level)
                if each.is_dir(follow_symlinks=False)
            ]
            result += [path for path in inner if (path / file).is_file()]
            levels = [path for path in inner if path not in result]
        return result
