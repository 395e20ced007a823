"""Which backend a tensor's operator runs on: C++ on the CPU, CUDA C++ or Triton on a GPU, plain torch otherwise."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.function import once_differentiable

from vlmteacher.ops.manifest import OPERATORS

_CPP_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of a product with frozen weights, by the bytes of an element: from so many multiply-adds on torch's own are faster on
# a GPU. Below that the launches are the time, of which CUDA C++ has the least (H200, benchmarks/NEGATIVE.md).
_TORCH_FROM = {2: 2**33, 4: 2**31}


def build_facts() -> dict[str, Any]:
    """What setup.py recorded: {"built", "why"} of the C++ operators, and of those for GPUs under "cuda"."""
    file = Path(__file__).parent.parent / "_build.json"
    missing = {"built": False, "why": "the package was never installed: pip install -e ."}
    return {"cuda": missing} | (json.loads(file.read_text()) if file.exists() else missing)


@functools.cache
def cpp_status() -> tuple[bool, str]:
    """(whether the C++ operators are loaded, why not)."""
    try:
        importlib.import_module("vlmteacher._C")
    except ImportError as error:
        return False, build_facts()["why"] or f"the library does not load: {error}"
    return True, ""


@functools.cache
def has_avx512_bf16() -> bool:
    """Whether the C++ operators that need it can run: of the processor, and of the compiler that built them."""
    return cpp_status()[0] and torch.ops.vlmteacher_cpp.avx512_bf16()


def _no_gpu() -> str:
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU"
    return f"torch {torch.__version__} ({kind} build) sees no GPU"


@functools.cache
def cuda_status() -> tuple[bool, str]:
    """(whether the operators in CUDA C++ are loaded, why not). Loads them where there is a GPU for them."""
    if not (facts := build_facts()["cuda"])["built"]:
        return False, facts["why"]
    if not torch.cuda.is_available():
        return False, f"built, but {_no_gpu()}"
    if torch.version.cuda is None or torch.cuda.get_device_capability() < (8, 0):
        return False, f"built for NVIDIA's Ampere and newer, but the GPU is {torch.cuda.get_device_name()}"
    try:
        # Python loads torch's libraries each for itself: what ours takes of this one would be found nowhere.
        ctypes.CDLL("libtorch_cuda.so", mode=ctypes.RTLD_GLOBAL | os.RTLD_NOLOAD)
        torch.ops.load_library(Path(__file__).parent.parent / "_cuda.so")
    except OSError as error:
        return False, f"the library does not load: {error}"
    return True, ""


@functools.cache
def triton_status() -> tuple[bool, str]:
    """(whether Triton kernels can run on this machine's GPU, why not). Asks no more than it needs to know."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed: pip install 'vlmteacher[triton]'"
    if not torch.cuda.is_available():
        return False, f"triton is installed, but {_no_gpu()}"
    return True, ""


def without_data(x: Tensor) -> bool:
    """Whether x has a shape alone: no backend, and no reference that looks at values, can compute on it."""
    return x.is_meta or is_fake(x)


def backend(x: Tensor, operator: str, weights: Sequence[Tensor] = ()) -> Any:
    """What implements `operator` for x: a namespace with the operator's functions, or None for the reference.

    Every backend of an operator has the reference's argument order, so that the caller only looks the name up.
    weights: what the rows of x are multiplied by, where the reference is little else than torch's products. Those in
    Triton were never ahead of them.
    """
    available = OPERATORS[operator].backends
    if x.device.type == "cpu" and x.dtype in _CPP_DTYPES and "cpp" in available and cpp_status()[0]:
        return torch.ops.vlmteacher_cpp
    if x.device.type == "cuda" and x.dtype in _GPU_DTYPES:
        if weights and len(x) * sum(weight.numel() for weight in weights) >= _TORCH_FROM[x.itemsize]:
            return None
        if "cuda" in available and cuda_status()[0]:
            return torch.ops.vlmteacher_cuda
        if "triton" in available and not weights and triton_status()[0]:
            return importlib.import_module(f"vlmteacher.kernels.{operator}")
    return None


_PLAIN = (Tensor, torch.nn.Parameter)


def plain(tensor: Tensor) -> bool:
    """Whether nobody looks on, so that an operator's backend can be called without the registration around it.

    A dispatch mode (selective checkpointing, counters) wants to see one operator, whatever the backend launches.
    """
    return type(tensor) in _PLAIN and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """An autograd function's `backward` that refuses a second derivative; where none can follow, asking costs time."""
    refusing = once_differentiable(backward)

    def run(ctx: Any, *grads: Tensor | None) -> Any:
        return (refusing if torch.is_grad_enabled() else backward)(ctx, *grads)

    return run
