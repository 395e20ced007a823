"""Benchmarks for GPUs: `python -m benchmarks.gpu.NAME [--json]`. Each first checks numbers, then measures time.

Numbers are compared with the definition in float64, within what tests/rounding.py derives from the types.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.timing import parsed
from tests.rounding import excess, expected
from vlmteacher.ops.backends import cuda_status, triton_status


def parsed_on_gpu(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """Parse the command line of `benchmarks.gpu.NAME`, with `--check`; ends the program where there is no GPU."""
    parser.add_argument("--check", action="store_true", help="check the numbers only")
    settings = parsed(parser)
    if not torch.cuda.is_available():
        print(f"benchmarks.gpu.{name}: torch sees no GPU: run it on a machine with one", file=sys.stderr)
        raise SystemExit(2)
    return settings


def backends(operator: str) -> dict[str, Any]:
    """The usable GPU backends of an operator, by name; the reason for leaving one out goes to stderr."""
    available: dict[str, Any] = {}
    for name, (usable, why) in {"cuda": cuda_status(), "triton": triton_status()}.items():
        if not usable:
            print(f"{name} is left out: {why}", file=sys.stderr)
        elif name == "cuda":
            available[name] = torch.ops.vlmteacher_cuda
        else:
            available[name] = importlib.import_module(f"vlmteacher.kernels.{operator}")
    return available


@contextmanager
def forced(operator: ModuleType, namespace: Any) -> Iterator[None]:
    """Make `operator` (a module of vlmteacher.ops) run on the backend `namespace`, or in plain torch for None."""
    with mock.patch.object(operator, "backend", lambda x, name, *_: namespace):
        yield


def share(ours: Sequence[Tensor], definition: Callable[..., Sequence[Any]], *args: Any) -> float:
    """The largest part of the bound of tests/rounding.py that an error takes up: at most 1 where a backend is right.

    definition: returns, for `args`, what the tensors `ours` should be; it runs in float64 with modelled errors.
    """
    return max(excess(mine, each) for mine, each in zip(ours, expected(definition, *args), strict=True))


def gate(case: str, name: str, error: float) -> None:
    """End the program where a backend of ours is further from float64 than rounding takes it, or NaN.

    The vendor's are only reported: they may add up in fewer bits.
    """
    if name not in ("torch", "vendor") and not error <= 1:
        raise SystemExit(f"{case}: {name} has {error:.2f} times the error that rounding explains")
