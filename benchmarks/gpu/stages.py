"""Stages of a long benchmark: each piece of one is written at once, none begins that would end after the deadline."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlmteacher.errors import first_line
from vlmteacher.files import write_json
from vlmteacher.optimization.out_of_memory import is_out_of_memory

T = TypeVar("T")


class Clock:
    """The time until a deadline, `minutes` from now."""

    def __init__(self, minutes: float) -> None:
        self.start, self.end = time.monotonic(), time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.end - time.monotonic()


class Stage:
    """The results of a stage, in FOLDER/NAME.json; `failed`, `skipped`: pieces with an error, and for want of time."""

    def __init__(self, name: str, folder: Path, clock: Clock) -> None:
        self.name, self.clock, self.path = name, clock, folder / f"{name}.json"
        self.results: dict[str, Any] = {"stage": name}
        self.failed: list[str] = []
        self.skipped: list[str] = []
        self.save()

    def save(self) -> None:
        seconds = round(time.monotonic() - self.clock.start, 1)
        write_json(self.path, self.results | {"failed": self.failed, "skipped": self.skipped, "at_seconds": seconds})

    def piece(self, name: str, run: Callable[[], T], needs: float = 0.0) -> T | None:
        """The result of `run`, which is kept under `name`; None where it fails, or would need more time than is left.

        needs: seconds that it is expected to take.
        """
        if self.clock.left() < needs or self.clock.left() <= 0:
            self.skipped.append(name)
            self.save()
            return None
        start = time.monotonic()
        try:
            self.results[name] = result = run()
        except Exception as error:  # the other pieces are worth having
            if is_out_of_memory(error) and torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.failed.append(name)
            self.results[name] = {"error": f"{type(error).__name__}: {first_line(error)}"}
            result = None
        print(f"{self.name}, {name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        self.save()
        return result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The median time of `run`, after one call that is not measured."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def gradients(outputs: Tensor | Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of the sum of `outputs` at `inputs`."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return torch.autograd.grad(outputs, list(inputs), [torch.ones_like(output) for output in outputs])
