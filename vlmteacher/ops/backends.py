"""Which backend a tensor's operator runs on: the C++ operators on the CPU, Triton on a GPU, plain torch otherwise."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CPP_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def cpp_status() -> tuple[bool, str]:
    """(whether the C++ operators are loaded, why not)."""
    try:
        importlib.import_module("vlmteacher._C")
    except ImportError as error:
        facts = Path(__file__).parent.parent / "_build.json"
        built = (
            json.loads(facts.read_text())
            if facts.exists()
            else {"why": "the package was never installed: pip install -e ."}
        )
        return False, built["why"] or f"the library does not load: {error}"
    return True, ""


@functools.cache
def triton_status() -> tuple[bool, str]:
    """(whether Triton kernels can run on this machine's GPU, why not). Asks no more than it needs to know."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed: pip install 'vlmteacher[triton]'"
    if not torch.cuda.is_available():
        kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU"
        return False, f"triton is installed, but torch {torch.__version__} ({kind} build) sees no GPU"
    return True, ""


def backend(x: Tensor, operator: str) -> Any:
    """What implements `operator` for x: a namespace with the operator's functions, or None for the reference.

    Every backend of an operator has the reference's argument order, so that the caller only looks the name up.
    """
    if x.device.type == "cpu" and x.dtype in _CPP_DTYPES and cpp_status()[0]:
        return torch.ops.vlmteacher_cpp
    if x.device.type == "cuda" and x.dtype in _TRITON_DTYPES and triton_status()[0]:
        return importlib.import_module(f"vlmteacher.kernels.{operator}")
    return None
