"""The folder of a run: videos, LoRA and model card, queries, run.json, report.html, and the state to resume from."""

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
from vlmteacher.media import STRIP, film_strip, write_strips, write_video
from vlmteacher.runs.command import command_line
from vlmteacher.runs.report import run_report
from vlmteacher.state import read_state, unusable, write_state
from vlmteacher.version import __version__

if TYPE_CHECKING:
    import numpy as np

    from vlmteacher.optimization.loop import Optimization

RECORD, STATE = "run.json", "state.pt"
FILES = (
    RECORD,
    STATE,
    "lora.safetensors",
    "queries.json",
    "before.mp4",
    "after.mp4",
    "README.md",
    "frames.webp",
    "report.html",
)
FREE = ("max_steps", "before", "memory", "attention")  # settings that a resumed run may have others of
FORM = "vlmteacher run 1"  # of the state; the number changes with its content
STATE_ROOM = 2**26  # bytes of a state beside its tensors of the LoRA's size: the history, the latents of a pull
WRITING_SHARE = 0.05  # of the time at most is spent on writing states: those of large LoRAs take long
F = TypeVar("F", bound=Callable[..., Any])


def in_its_folder(call: F) -> F:
    """Decorate a method with the keyword `run_dir`: the folder is locked for the time of the call (see `claimed`)."""

    @functools.wraps(call)
    def held(*arguments: Any, run_dir: str | os.PathLike[str] | None = None, **keywords: Any) -> Any:
        if run_dir is None:
            return call(*arguments, **keywords)
        with claimed(checked(run_dir)):
            return call(*arguments, run_dir=run_dir, **keywords)

    return held  # type: ignore[return-value]


def checked(path: str | os.PathLike[str]) -> Path:
    """The path of a run folder. Raises InputError for a name that is no text, a file, and a read-only folder."""
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
    """A run cannot be resumed with fewer steps than it has made."""


class RunFolder:
    """The folder of one run. Opening it only checks; `begin` writes the first file.

    run.json is written first and says how far the run has come. So a folder can be opened whenever its process was
    killed: without run.json it holds no run, with it the run can be resumed.

    record: the content of run.json, or None in a new folder. Raises InputError when the path is a file or is not
    writable, when it holds a run and `resume` is not set, and when the run to resume cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], resume: bool = False) -> None:
        self.path = checked(path)
        self.record: dict[str, Any] | None = None
        self._changed: dict[str, Any] | None = None  # the record to write once the state has been read
        self._next_write = 0.0
        files = [name for name in FILES if (self.path / name).exists()]
        if not files:
            return
        if not resume:
            raise InputError(
                f"output directory {self.path} already holds a run ({files[0]}): give another one, or --resume to take"
                " it up"
            )
        try:
            record = read_json(self.path / RECORD, "record")
            entries = record["config"]["seed"], record["queries"]["goal"], record["stopped"]
            if not all(map(isinstance, entries, (int, str, str))):
                raise TypeError
        except (InputError, KeyError, TypeError) as error:
            why = str(error) if isinstance(error, InputError) else f"{self.path / RECORD} is not that of a run"
            raise InputError(f"nothing to resume in {self.path} ({why}): give another --out") from error
        self.record = record

    def take_up(self, record: dict[str, Any]) -> None:
        """Check that the run in the folder is the one of `record`, before `load_state` resumes it.

        Only `FREE` settings may differ. Raises InputError, which names every other difference.
        """
        assert self.record is not None
        old, new = self.record, json.loads(json.dumps(record))
        different = {name: (before, now) for name, before, now in _differences(old, new)}
        changed = {name: different.pop(name, None) for name in FREE}
        if "fingerprints" not in old:  # written by an earlier version
            changed["fingerprints"] = different.pop("fingerprints")
        if different:
            texts = (
                f"{name} ({json.dumps(before, ensure_ascii=False)}, now {json.dumps(now, ensure_ascii=False)})"
                for name, (before, now) in different.items()
            )
            raise InputError(f"{self.path} holds a run with another {', another '.join(texts)}")
        if any(changed.values()):
            self._changed = record | {
                name: old[name] for name in ("cut_tokens", "teacher_frame_indices") if name in old
            }

    def frame_indices(self, num_frames: int, count: int) -> list[int] | None:
        """The frames that the run to resume has chosen for the Teacher, if it has. Raises InputError."""
        indices = self.record.get("teacher_frame_indices") if self.record else None
        if indices is None:
            return None
        whole = isinstance(indices, list) and all(type(index) is int for index in indices)
        if not whole or len(indices) != count or sorted({*indices} & {*range(num_frames)}) != indices:
            raise InputError(
                f"{self.path / RECORD}: teacher_frame_indices are not {count} frames of {num_frames} in rising order"
            )
        return list(indices)

    def begin(self, record: dict[str, Any]) -> None:
        """Write run.json with `prompt`, `config`, `models`, `queries` and `fingerprints` of a new run.

        Raises OutputError.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        command = command_line.get()
        self.record = record if command is None else {"command": command, **record}
        self._write_progress([])

    def interrupt(self, loop: Optimization) -> None:
        """Write how far an interrupted run has come. Raises OutputError."""
        with uninterrupted():
            if loop.stopped is None:  # else its state is written, and `loop.finish` may have changed the LoRA
                self.save_state(loop, force=True)
            self._write_progress(loop.history)

    def _write_progress(self, history: list[dict[str, Any]]) -> None:
        """Write run.json of a run that has not ended, which is "interrupted" to a reader."""
        assert self.record is not None
        updates = sum(row["grad_norm"] is not None for row in history)
        rest = {"steps": history, "stopped": "interrupted", "updates": updates, "seconds": {}}
        self._write_record({**self.record, **rest})

    def _write_record(self, record: dict[str, Any]) -> None:
        write_json(self.path / RECORD, {**record, "version": __version__})
        self.record = record

    def _identity(self) -> str:
        """A hash of the inputs of the run, without the number of steps; a state belongs to the run of the same hash."""
        assert self.record is not None
        parts = {name: self.record.get(name) for name in ("prompt", "config", "queries", "fingerprints")}
        config = {name: value for name, value in (parts.pop("config") or {}).items() if name not in FREE}
        return hashlib.sha256(json.dumps([parts, config], sort_keys=True).encode()).hexdigest()

    def save_state(self, loop: Optimization, force: bool = False) -> None:
        """Write the loop's state, unless that took more than `WRITING_SHARE` of the time so far. Raises OutputError."""
        start = time.monotonic()
        if start < self._next_write and not force:
            return
        write_state(self.path / STATE, FORM, {"run": self._identity(), **loop.state_dict()})
        end = time.monotonic()
        self._next_write = end + (end - start) / WRITING_SHARE

    def load_state(self, loop: Optimization) -> None:
        """Load the state in the folder, if any, into `loop`. Raises InputError for a state that cannot be used."""
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
        """Write lora.safetensors, unless it has this content. Raises OutputError."""
        path = self.path / "lora.safetensors"
        if not path.exists() or path.read_bytes() != data:
            write_bytes(path, data)

    def finish(
        self,
        results: dict[str, Any],
        before: np.ndarray | None,
        after: np.ndarray,
        fps: float,
        lora: bytes,
        predictions: dict[int, np.ndarray],
    ) -> None:
        """Write the results of the run, the LoRA first. Files that the same run has written already stay.

        results: entries of run.json. before, after: the videos (F, H, W, 3) uint8; None is a video that was not made.
        predictions: film strips by step.
        Raises OutputError for the first file that cannot be written, after all others are written.
        """
        from vlmteacher.runs.model_card import model_card

        assert self.record is not None
        columns = min(STRIP, results["config"]["teacher_frames"])
        first = [] if before is None else [film_strip(before, columns)]
        strips = [*first, *predictions.values(), film_strip(after, columns)]
        same = self.record["stopped"] == results["stopped"] and self.record["steps"] == results["steps"]
        record = {**self.record, **results}
        writers: dict[str, Callable[[Path], object]] = {
            "queries.json": lambda path: write_json(path, results["queries"]),
            "after.mp4": lambda path: write_video(path, after, fps),
            "README.md": lambda path: write_text(path, model_card(results, lora)),
            "frames.webp": lambda path: write_strips(path, strips),
            "report.html": lambda path: write_text(path, run_report(self.path, record)),
        }
        if before is not None:
            writers = {"before.mp4": lambda path: write_video(path, before, fps), **writers}
        self.write_lora(lora)
        if not same:
            for name in writers:  # those of a run with fewer steps
                remove(self.path / name)
            self._write_record(record)
        failed: OutputError | None = None
        for name, write in writers.items():
            try:
                if not (self.path / name).exists():
                    remove(self.path / "report.html")  # it shows the other files
                    write(self.path / name)
            except OutputError as error:
                failed = failed or error
        if failed:
            raise failed


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of every entry of `new` that differs in `old`."""
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            yield from _differences(before, value, name + ".")
        elif before != value:
            yield (prefix + name).removeprefix("config."), before, value
