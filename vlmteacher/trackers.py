"""Trackers of experiments, by the classes of accelerate: TensorBoard, Weights & Biases, Trackio, or one's own."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from vlmteacher import arguments
from vlmteacher.errors import InputError, MissingExtra, Notice, first_line
from vlmteacher.progress import Event, also

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

NAMES = ("tensorboard", "wandb", "trackio")
PROJECT = "vlmteacher"
LOGS = "logs"  # folder of the trackers in that of a run
Trackers: TypeAlias = "str | GeneralTracker | Sequence[str | GeneralTracker] | None"


@contextmanager
def tracking(trackers: Trackers, folder: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Give the events of the block to trackers too: settings as configuration, numbers of the steps as metrics.

    trackers: names of `NAMES`, or trackers of accelerate that have not started. One that fails is left out from then
    on, with one Notice. folder: for the files of named ones, by default ``logs/TIME`` in the current directory; it is
    made when the work begins. Raises InputError for an unknown name, MissingExtra.
    """
    chosen = list(trackers) if isinstance(trackers, list | tuple) else [] if trackers is None else [trackers]
    check_names(chosen)
    path = _new_folder() if folder is None else Path(arguments.path("tracker", folder))
    with ExitStack() as ending:
        takers = [_Tracker(each, path) for each in chosen]
        for taker in takers:
            ending.callback(taker.finish)
        if takers:
            ending.enter_context(also(*takers))
        yield


def _new_folder() -> Path:
    now = time.strftime("%Y%m%d-%H%M%S")
    paths = (Path(LOGS, f"{now}-{number}" if number else now) for number in count())
    return next(path for path in paths if not path.exists())


def check_names(trackers: Sequence[Any]) -> None:
    """Raise InputError for what is no tracker, MissingExtra for one whose package is not installed."""
    for name in trackers:
        if not isinstance(name, str):
            if not all(callable(getattr(name, method, None)) for method in ("store_init_configuration", "log")):
                raise InputError(
                    f"tracker must be {' or '.join(NAMES)}, or a GeneralTracker, not {arguments.show(name)}"
                )
            continue
        arguments.one_of("tracker", name, NAMES)
        packages = (name, "tensorboardX") if name == "tensorboard" else (name,)
        if not any(map(find_spec, packages)):
            raise MissingExtra(f"tracker {name} needs the package {name}: pip install {name}, or vlmteacher[trackers]")


class _Tracker:
    """Takes events for one tracker, which starts when work with settings begins."""

    def __init__(self, tracker: str | GeneralTracker, folder: Path) -> None:
        self._folder = folder
        self._name = tracker if isinstance(tracker, str) else str(getattr(tracker, "name", type(tracker).__name__))
        self._tracker: GeneralTracker | None = None if isinstance(tracker, str) else tracker
        self._started = self._failed = False
        self._works: set[str] = set()
        self._last = self._offset = 0  # numbers of steps, which rise over several works

    def __call__(self, event: Event) -> None:
        if event.kind == "begin" and event.values:
            self._works.add(event.work)
            self._offset = self._last
            if not self._started:
                self._try(lambda: self._start(event.values))
        elif event.kind == "step" and event.work in self._works and (values := numbers(event.values)):
            own = values.pop("step", None)
            step = self._offset + event.done + event.failed if own is None else int(own)
            self._last = max(self._last, step)
            prefix = f"{event.work}/" if event.unit == "instance" else ""
            self._try(lambda: self._log({prefix + name: value for name, value in values.items()}, step))

    def _start(self, settings: Mapping[str, Any]) -> None:
        if self._tracker is None:
            self._tracker = make(self._name, self._folder)
        self._started = True
        self._tracker.start()
        self._tracker.store_init_configuration(configuration(settings))

    def _log(self, values: dict[str, float], step: int) -> None:
        assert self._tracker is not None
        self._tracker.log(values, step=step)

    def finish(self) -> None:
        """End it, also after it has failed: it may hold a connection or a file."""
        if self._started and self._tracker is not None:
            self._try(self._tracker.finish, again=True)

    def _try(self, action: Callable[[], object], again: bool = False) -> None:
        if self._failed and not again:
            return
        try:
            action()
        except Exception as error:  # of any kind: a run is worth more than its curves
            if self._failed:
                return
            self._failed = True
            why = f"{type(error).__name__}: {first_line(error)}"
            text = f"tracker {self._name} failed ({why}): the run goes on without it"
            warnings.warn(text, Notice, stacklevel=2)


def make(name: str, folder: Path) -> GeneralTracker:
    """accelerate's tracker of this name, with its files in `folder`."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # the trackers ask it which process is the main one
    folder.mkdir(parents=True, exist_ok=True)
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    path = folder.absolute()
    run = path.parent.name if path.name == LOGS else path.name
    if name == "tensorboard":
        tracker: GeneralTracker = kind(path.name, logging_dir=path.parent)
    elif name == "wandb":
        tracker = kind(PROJECT, dir=str(path), name=run)
    else:
        os.environ.setdefault("TRACKIO_DIR", str(path))  # read when it is imported
        tracker = kind(PROJECT, name=run)
    return tracker


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in `values`, those of lists and mappings as "p_yes/0" and "guards/NAME"."""
    result: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple):
            value = {str(index): each for index, each in enumerate(value)}
        if isinstance(value, Mapping):
            result |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            result[prefix + name] = value
    return result


def configuration(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings as plain values by name; those of mappings as "sampling.shift", lists as JSON."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            result |= configuration(value, f"{prefix}{name}.")
        elif isinstance(value, str | bool | int | float):
            result[f"{prefix}{name}"] = value
        else:
            result[f"{prefix}{name}"] = "none" if value is None else json.dumps(value, default=str)
    return result
