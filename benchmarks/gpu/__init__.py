"""What has to be measured where a GPU is: `python -m benchmarks.gpu.NAME [--json]`. Numbers first, then time."""

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
    """The GPU backends of an operator that can run here, by name; stderr says why one cannot."""
    found: dict[str, Any] = {}
    for name, (usable, why) in {"cuda": cuda_status(), "triton": triton_status()}.items():
        if not usable:
            print(f"{name} is left out: {why}", file=sys.stderr)
        elif name == "cuda":
            found[name] = torch.ops.vlmteacher_cuda
        else:
            found[name] = importlib.import_module(f"vlmteacher.kernels.{operator}")
    return found


@contextmanager
def forced(operator: ModuleType, namespace: Any) -> Iterator[None]:
    """Inside, `operator` (a module of vlmteacher.ops) runs on `namespace`, or in plain torch on None."""
    with mock.patch.object(operator, "backend", lambda x, name, *_: namespace):
        yield
