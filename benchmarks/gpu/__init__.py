"""Benchmarks for GPUs: `python -m benchmarks.gpu.NAME [--json]`. Each first checks numbers, then measures time."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from vlmteacher.ops.backends import cuda_status, triton_status


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
