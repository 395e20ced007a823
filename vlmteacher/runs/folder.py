"""A run on disk: videos, LoRA and its card, queries, run.json, a page to look at, and the state to resume from."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vlmteacher import arguments
from vlmteacher.errors import InputError, OutputError
from vlmteacher.files import check_text, claimed, read_json, remove, write_bytes, write_json, write_text
from vlmteacher.interruption import uninterrupted
from vlmteacher.media import write_video
from vlmteacher.runs.report import report
from vlmteacher.state import read_state, unusable, write_state
from vlmteacher.version import __version__

if TYPE_CHECKING:
    import numpy as np

    from vlmteacher.optimization.loop import Optimization

RECORD, STATE = "run.json", "state.pt"
FILES = (RECORD, STATE, "lora.safetensors", "queries.json", "before.mp4", "after.mp4", "README.md", "report.html")
FORM = "vlmteacher run 1"  # of the state; another number when its content changes
STATE_ROOM = 2**26  # bytes of a state beside its tensors of the LoRA's size: the history, the latents of a pull
WRITING_SHARE = (
    0.05  # the state of a large LoRA is not written after every step, but for at most this share of the time
)
F = TypeVar("F", bound=Callable[..., Any])


def in_its_folder(call: F) -> F:
    """A method with the keyword `run_dir` that holds this folder, if one is given, for itself (see `claimed`)."""

    @functools.wraps(call)
    def held(*arguments: Any, run_dir: str | os.PathLike[str] | None = None, **keywords: Any) -> Any:
        if run_dir is None:
            return call(*arguments, **keywords)
        with claimed(checked(run_dir)):
            return call(*arguments, run_dir=run_dir, **keywords)

    return held  # type: ignore[return-value]


def checked(path: str | os.PathLike[str]) -> Path:
    """The path of a run folder. Raises InputError: its name is no text, a file is there, it cannot be written to."""
    path = Path(check_text(arguments.path("output directory", path), "output directory"))
    try:
        existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    except OSError as error:
        raise InputError(f"output directory {path} cannot be used ({error.strerror}): give another one") from error
    if not existing.is_dir():
        raise InputError(f"output directory {path}: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"output directory {path}: {existing} is not writable")
    return path


class StepsDone(InputError):
    """A run is to be resumed with fewer steps than it has made."""


class RunFolder:
    """The folder of one run. Opening it only checks; `begin` is what first writes.

    run.json is the first file there and says how far the run has come, so that a folder can be opened in one of two
    ways whenever its process was killed: without it it holds no run, with it the run can be resumed.

    Raises InputError: the path is a file or cannot be written to; it holds a run and `resume` is not set; with
    `resume`, what it holds cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], resume: bool = False) -> None:
        self.path = checked(path)
        self.record: dict[str, Any] | None = None
        self._changed: dict[str, Any] | None = None  # what the record becomes when its state has been read
        self._next_write = 0.0
        found = [name for name in FILES if (self.path / name).exists()]
        if not found:
            return
        if not resume:
            raise InputError(
                f"output directory {self.path} already holds a run ({found[0]}): give another one, or --resume to take"
                " it up"
            )
        try:
            record = read_json(self.path / RECORD, "record")
            given = record["config"]["seed"], record["queries"]["goal"], record["stopped"]
            if not all(map(isinstance, given, (int, str, str))):
                raise TypeError
        except (InputError, KeyError, TypeError) as error:
            why = str(error) if isinstance(error, InputError) else f"{self.path / RECORD} is of no run"
            raise InputError(f"nothing to resume in {self.path} ({why}): give another --out") from error
        self.record = record

    def take_up(self, record: dict[str, Any]) -> None:
        """Resume the run that is here as the one of `record`, by `load_state`.

        The number of steps may be another one (`config.max_steps`). Raises InputError when anything else differs, and
        names it.
        """
        assert self.record is not None
        old, new = self.record, json.loads(json.dumps(record))
        different = {name: (before, now) for name, before, now in _differences(old, new)}
        changed = {"max_steps": different.pop("max_steps", None)}
        if "fingerprints" not in old:  # written by an earlier version
            changed["fingerprints"] = different.pop("fingerprints")
        if different:
            told = (
                f"{name} ({json.dumps(before, ensure_ascii=False)}, now {json.dumps(now, ensure_ascii=False)})"
                for name, (before, now) in different.items()
            )
            raise InputError(f"{self.path} holds a run with another {', another '.join(told)}")
        if any(changed.values()):
            self._changed = record

    def begin(self, record: dict[str, Any]) -> None:
        """Write what is known of the run: `prompt`, `config`, `models`, `queries` and `fingerprints` of run.json.

        Raises OutputError.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.record = record
        self._say([])  # "interrupted" is what it is for whoever finds it before it has ended

    def interrupt(self, loop: Optimization) -> None:
        """Write down how far a run has come that ends here. Raises OutputError."""
        with uninterrupted():
            if loop.stopped is None:  # else it is there, and `loop.finish` may have changed the LoRA
                self.save_state(loop, force=True)
            self._say(loop.history)

    def _say(self, history: list[dict[str, Any]]) -> None:
        assert self.record is not None
        updates = sum(row["grad_norm"] is not None for row in history)
        rest = {"steps": history, "stopped": "interrupted", "updates": updates, "seconds": {}}
        self._write_record({**self.record, **rest})

    def _write_record(self, record: dict[str, Any]) -> None:
        write_json(self.path / RECORD, {**record, "version": __version__})
        self.record = record

    def _identity(self) -> str:
        """Of the run that a state belongs to: all that is known of it but the number of its steps."""
        assert self.record is not None
        parts = {name: self.record.get(name) for name in ("prompt", "config", "queries", "fingerprints")}
        config = {name: value for name, value in (parts.pop("config") or {}).items() if name != "max_steps"}
        return hashlib.sha256(json.dumps([parts, config], sort_keys=True).encode()).hexdigest()

    def save_state(self, loop: Optimization, force: bool = False) -> None:
        """Write the loop's state, unless writing already takes more than its share of the time. Raises OutputError."""
        start = time.monotonic()
        if start < self._next_write and not force:
            return
        write_state(self.path / STATE, FORM, {"run": self._identity(), **loop.state_dict()})
        end = time.monotonic()
        self._next_write = end + (end - start) / WRITING_SHARE

    def load_state(self, loop: Optimization) -> None:
        """Let `loop` go on from the state that is here, if there is one. Raises InputError: it cannot be used."""
        path = self.path / STATE
        if path.exists() or path.is_symlink():
            sizes = sum(parameter.numel() * parameter.element_size() for parameter in loop.parameters)
            state = read_state(path, FORM, limit=8 * sizes + 8 * loop.noise.z1.numel() + STATE_ROOM)
            if state.get("run") != self._identity():
                raise unusable(path, "it belongs to another run")
            try:
                done = len(state["history"])
                if done > loop.settings.max_steps:
                    raise StepsDone(f"{self.path} holds {done} steps already: max_steps must be at least that")
                loop.load_state_dict(state)
            except StepsDone:
                raise
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                reason = str(error).splitlines()[0] if isinstance(error, InputError) else "it is damaged"
                raise unusable(path, reason) from error
        if self._changed:
            self.begin(self._changed)

    def write_lora(self, data: bytes) -> None:
        """Write lora.safetensors, what the run was for, unless it is there. Raises OutputError."""
        path = self.path / "lora.safetensors"
        if not path.exists() or path.read_bytes() != data:
            write_bytes(path, data)

    def finish(self, results: dict[str, Any], before: np.ndarray, after: np.ndarray, fps: float, lora: bytes) -> None:
        """Write the results of the run, the LoRA first. Files that the same run has written already stay.

        results: entries of run.json. before, after: the videos (F, H, W, 3) uint8. Raises OutputError for the first
        file that cannot be written, after all others are written.
        """
        from vlmteacher.runs.model_card import model_card

        assert self.record is not None
        same = self.record["stopped"] == results["stopped"] and self.record["steps"] == results["steps"]
        record = {**self.record, **results}
        writers: dict[str, Callable[[Path], object]] = {
            "queries.json": lambda path: write_json(path, results["queries"]),
            "before.mp4": lambda path: write_video(path, before, fps),
            "after.mp4": lambda path: write_video(path, after, fps),
            "README.md": lambda path: write_text(path, model_card(results, lora)),
            "report.html": lambda path: write_text(path, report(results)),
        }
        self.write_lora(lora)
        if not same:
            for name in writers:  # they are of fewer steps
                remove(self.path / name)
            self._write_record(record)
        failed: OutputError | None = None
        for name, write in writers.items():
            try:
                if not (self.path / name).exists():
                    write(self.path / name)
            except OutputError as error:
                failed = failed or error
        if failed:
            raise failed


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every entry of `new` that is not the same in `old`, with its name."""
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            yield from _differences(before, value, name + ".")
        elif before != value:
            yield (prefix + name).removeprefix("config."), before, value
