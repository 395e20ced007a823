"""Choose the backend of an operator: C++ on the CPU, CUDA C++ or Triton on a GPU, plain torch otherwise."""

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

from vlmteacher.ops import gpus, processors
from vlmteacher.ops.manifest import OPERATORS

_CPP_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def build_record() -> dict[str, Any]:
    """The outcome of the build as setup.py recorded it: {"built", "why"} of the C++ operators and, under "cuda", of the
    GPU operators."""
    file = Path(__file__).parent.parent / "_build.json"
    missing = {"built": False, "why": "the package was never installed: pip install -e ."}
    return {"cuda": missing} | (json.loads(file.read_text()) if file.exists() else missing)


@functools.cache
def cpp_status() -> tuple[bool, str]:
    """Load the C++ operators; returns (loaded, the reason if not). Raises InputError: a wrong VLMTEACHER_CPU."""
    try:
        library = importlib.import_module("vlmteacher._C")
    except ImportError as error:
        return False, build_record()["why"] or f"the library does not load: {error}"
    if not hasattr(library, "limit"):
        return False, "the library is of an older version: build it again (pip install -e .)"
    processors.start(library)
    return True, ""


def has_avx512_bf16() -> bool:
    """Whether C++ operators that need AVX-512 BF16 can run: the processor has it, and it is in use."""
    return cpp_status()[0] and torch.ops.vlmteacher_cpp.avx512_bf16()


def _no_gpu() -> str:
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU"
    return f"torch {torch.__version__} ({kind} build) sees no GPU"


@functools.cache
def cuda_status() -> tuple[bool, str]:
    """Load the CUDA C++ operators if a GPU can run them; returns (loaded, the reason if not)."""
    if not (record := build_record()["cuda"])["built"]:
        return False, record["why"]
    if not torch.cuda.is_available():
        return False, f"built, but {_no_gpu()}"
    if torch.version.cuda is None or torch.cuda.get_device_capability() < (8, 0):
        return False, f"built for NVIDIA's Ampere and newer, but the GPU is {torch.cuda.get_device_name()}"
    try:
        # Python loads torch's libraries with local symbols: without this, ours would not resolve those of torch_cuda
        ctypes.CDLL("libtorch_cuda.so", mode=ctypes.RTLD_GLOBAL | os.RTLD_NOLOAD)
        torch.ops.load_library(Path(__file__).parent.parent / "_cuda.so")
    except OSError as error:
        return False, f"the library does not load: {error}"
    return True, ""


@functools.cache
def triton_status() -> tuple[bool, str]:
    """Whether Triton kernels can run on this machine, and the reason if not; does not import triton."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed: pip install 'vlmteacher[triton]'"
    if not torch.cuda.is_available():
        return False, f"triton is installed, but {_no_gpu()}"
    return True, ""


def without_data(x: Tensor) -> bool:
    """Whether x is a meta or fake tensor, on which neither a backend nor a reference that reads values can compute."""
    return x.is_meta or is_fake(x)


def backend(x: Tensor, operator: str, weights: Sequence[Tensor] = (), rows: float | None = None) -> Any:
    """The backend of an operator for x: a namespace with the operator's functions, or None for the reference.

    Every backend takes the reference's arguments in the same order.

    Args:
        operator: a name of `vlmteacher.ops.manifest.OPERATORS`.
        weights: the frozen weights that x is multiplied by, of an operator whose backend depends on its products.
        rows: the number of rows that they are multiplied by; None: those of x (M, K).
    """
    available = OPERATORS[operator].backends
    if x.device.type == "cpu" and x.dtype in _CPP_DTYPES and "cpp" in available and cpp_status()[0]:
        return torch.ops.vlmteacher_cpp
    if x.device.type == "cuda" and x.dtype in _GPU_DTYPES:
        products = 0.0
        if weights:
            products = (len(x) if rows is None else rows) * sum(weight.numel() for weight in weights)
        for name in gpus.order(operator, x.dtype, products, torch.cuda.is_current_stream_capturing()):
            if name == gpus.TORCH:
                return None
            if name == gpus.CUDA and name in available and cuda_status()[0]:
                return torch.ops.vlmteacher_cuda
            if name == gpus.TRITON and name in available and triton_status()[0]:
                return importlib.import_module(f"vlmteacher.kernels.{operator}")
    return None


_TRITON = triton_status()[0]  # here, for torch.compile cannot trace it


def runs_triton(x: Tensor) -> bool:
    """Whether an operator that only Triton has for GPUs runs on tensors like x; torch.compile traces the others."""
    return _TRITON and x.device.type == "cuda" and x.dtype in _GPU_DTYPES


_PLAIN = (Tensor, torch.nn.Parameter)


def plain(tensor: Tensor) -> bool:
    """Whether an operator may call its backend on `tensor` directly, without its torch.library registration.

    Tensor subclasses, torch.compile and dispatch modes (selective checkpointing, counters) need the registered one.
    """
    return type(tensor) in _PLAIN and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make an autograd function's `backward` refuse a second derivative, without `once_differentiable`'s overhead when
    gradients are off and no second derivative can follow."""
    refusing = once_differentiable(backward)

    def run(ctx: Any, *grads: Tensor | None) -> Any:
        return (refusing if torch.is_grad_enabled() else backward)(ctx, *grads)

    return run
