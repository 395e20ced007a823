"""A second device on a machine that has only one: its tensors hold real values, and mix with the CPU's as a GPU's do.

Torch knows the device "meta", and autograd runs on it without a driver. `other_device()` makes it compute: its tensors
are `There`, wrappers around CPU tensors, and an operator that gets tensors of both devices raises as on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

META = torch.device("meta")
aten = torch.ops.aten
CROSSING = (aten._to_copy.default, aten.copy_.default)
CPU_INDICES = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class There(Tensor):
    """A tensor on the other device; `here` holds its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        self = Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            layout=here.layout,
            device=META,
        )
        self.here = here
        return self

    def __repr__(self, **_: Any) -> str:
        return f"There({self.here})"

    def tolist(self) -> Any:  # torch refuses it for wrappers
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Constructors(TorchFunctionMode):
    """Where torch would itself put Python's numbers on "meta", which leaves them out, they go by way of the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if func is Tensor.new_tensor and isinstance(args[0], There):
            return torch.tensor(*args[1:], dtype=args[0].dtype).to(args[0].device)
        if func is Tensor.__getitem__ and isinstance(args[1], list):
            return func(args[0], torch.tensor(args[1]))
        return func(*args, **kwargs)


@contextmanager
def other_device() -> Iterator[None]:
    """Within it the device "meta" computes."""
    with Constructors(), Operators():
        yield


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    if there and func not in CROSSING:
        # As on a GPU: numbers of the CPU may take part, and index tensors.
        mixed = [t for t in tensors if not isinstance(t, There) and t.dim()]
        if mixed and not (
            func in CPU_INDICES and isinstance(args[0], There) and all(t.dtype == torch.long for t in mixed)
        ):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found meta and cpu")
    device = kwargs.get("device")
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    lands = torch.device(device) == META if device is not None else bool(there)
    if func is aten.copy_.default:
        lands = isinstance(args[0], There)
    plain_args, plain_kwargs = tree_map_only(There, lambda t: t.here, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if not lands:
        return out
    out = tree_map_only(Tensor, There, out)
    return return_and_correct_aliasing(func, args, kwargs, out)
