"""Recognise errors that say that memory is full, whoever raises them."""

from __future__ import annotations

import re

import torch

# The messages of torch's allocators, C++, the CUDA runtime, cuBLAS and cuDNN, and oneDNN. Our own operators pass on the
# message of the error within them (csrc/operator.h).
_FULL = re.compile(r"can't allocate memory|out of memory|std::bad_alloc|_ALLOC_FAILED|could not create a memory object")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory is full: a GPU's or the CPU's, raised by torch, an operator or Python."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and _FULL.search(str(error)) is not None
    )
