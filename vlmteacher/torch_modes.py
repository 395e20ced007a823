"""Modes of torch: set for the package's work, and restored afterwards for the caller."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from vlmteacher.errors import InputError

CUBLAS_CONFIGS = (":4096:8", ":16:8")  # the values with which cuBLAS is deterministic


@contextmanager
def plain_torch() -> Iterator[None]:
    """Set torch's modes as in a fresh interpreter, and restore them at the end. Also a decorator.

    Gradients are on, `inference_mode` and autocast off, the default dtype is float32 and the default device the CPU.
    The default dtype belongs to the process: other threads see it change.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def keepable() -> Iterator[None]:
    """Make tensors that autograd accepts later, even inside of `inference_mode`. Also a decorator."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def deterministic(*devices: torch.device) -> Iterator[None]:
    """Make results independent of the number of threads, to the bit, on one machine with the same versions.

    On the CPU this uses one thread, because vendor libraries and torch split sums by the number of threads; on a GPU it
    selects torch's deterministic algorithms. Raises InputError where an operator has none, or where cuBLAS was not
    configured before Python started.
    """
    on_gpu = any(device.type == "cuda" for device in devices)
    if on_gpu and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in CUBLAS_CONFIGS:
        raise InputError(
            f"deterministic on a GPU needs CUBLAS_WORKSPACE_CONFIG={CUBLAS_CONFIGS[0]} in the environment before Python"
            " starts"
        )
    threads, fill = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.set_num_threads(1)
        torch.utils.deterministic.fill_uninitialized_memory = False  # our operators read only what they wrote
        torch.use_deterministic_algorithms(True)
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"deterministic is not possible here ({reason}): leave it out") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.set_num_threads(threads)


def leave_inference_mode(*parts: object) -> None:
    """Replace tensors made inside `inference_mode`, in modules and their owners, by copies for autograd."""
    made: dict[int, torch.Tensor] = {}  # by the id of the old tensor: tied weights stay tied

    def renew(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor) or not tensor.is_inference():
                continue
            if id(tensor) not in made:
                copy = tensor.detach().clone()
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
            tensors[name] = made[id(tensor)]

    for part in parts:
        renew(vars(part))
        modules = [part, *vars(part).values()]
        for owner in (owner for module in modules if isinstance(module, nn.Module) for owner in module.modules()):
            renew(vars(owner))
            renew(owner._parameters)
            renew(owner._buffers)
