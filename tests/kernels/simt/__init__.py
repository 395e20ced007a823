"""Execute CUDA sources on the CPU: compile them with g++ against simt.h, and call their exports on tensors."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
FLAGS = (
    *("-std=c++20", "-O2", "-march=native", "-shared", "-fPIC"),
    "-U_FORTIFY_SOURCE",  # a fortified longjmp does not leave a fiber
    *("-fsanitize=bounds,alignment", "-fsanitize-undefined-trap-on-error"),
)


class Fault(RuntimeError):
    """A kernel did something that a GPU leaves undefined."""


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="simt-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def build(source: str) -> ctypes.CDLL:
    """Compile tests/kernels/simt/`source` as a library, once per session."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++: CUDA sources are not executed on the CPU")
    library = _folder() / f"{Path(source).stem}.so"
    command = [compiler, *FLAGS, f"-I{HERE}", str(HERE / source), str(HERE / "simt.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    built = ctypes.CDLL(str(library))
    built.simt_allocate.restype = ctypes.c_void_p
    built.simt_allocate.argtypes, built.simt_release.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    built.simt_seed.argtypes = [ctypes.c_uint64]
    return built


class Memory:
    """Tensors that end at an inaccessible page, so that an access beyond them is a Fault; freed on exit."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._blocks: list[int] = []

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for block in self._blocks:
            self._library.simt_release(block)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Full of NaN (-1 in an integer type)."""
        count = torch.Size(shape).numel()
        if not count:
            return torch.empty(shape, dtype=dtype)
        size = count * dtype.itemsize
        self._blocks.append(self._library.simt_allocate(size))
        return torch.frombuffer((ctypes.c_char * size).from_address(self._blocks[-1]), dtype=dtype).view(shape)

    def put(self, values: Tensor) -> Tensor:
        return self.empty(*values.shape, dtype=values.dtype).copy_(values)


def call(function: Callable[..., Any], *arguments: Any) -> None:
    """Call an exported function with tensors (as pointers), None, lists of these, bools, ints and ctypes values."""
    function.restype = ctypes.c_char_p  # type: ignore[attr-defined]
    if fault := function(*(_as_c(argument) for argument in arguments)):
        raise Fault(fault.decode())


def _as_c(argument: Any) -> Any:
    if argument is None or isinstance(argument, Tensor):
        assert argument is None or argument.is_contiguous()
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    if isinstance(argument, list):
        values = [_as_c(value) for value in argument]
        return (type(values[0]) * len(values))(*values)
    if isinstance(argument, bool):
        return ctypes.c_bool(argument)
    return ctypes.c_int(argument) if isinstance(argument, int) else argument
