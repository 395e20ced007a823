"""Count FLOPs and live bytes of a computation while it runs, on tensors without data."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula


def attention_flops(query: Sequence[int], key: Sequence[int], causal: bool) -> int:
    """FLOPs of the attention of q (B, H, N, d) to k and v (B, h, M, d): two products, half of them if causal.

    A backward has five products.
    """
    batch, heads, n, d = query
    return 4 * batch * heads * n * key[-2] * d // (2 if causal else 1)


if torch.ops.aten._grouped_mm not in flop_registry:  # of experts: each row passes one matrix

    @register_flop_formula(torch.ops.aten._grouped_mm)
    def _(rows: Sequence[int], matrices: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * rows[0] * matrices[-2] * matrices[-1]


class Trace(TorchDispatchMode):
    """A mode that counts FLOPs and live bytes, by the name of the running stage (`at`).

    Attributes:
        flops: of products, convolutions and attention, 2 for a multiplication and an addition; element-wise work is not
            counted.
        peak: the largest number of live bytes, without the noted `weights` and `inputs`.
        live: the bytes alive now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.live = 0
        self.stage = ""
        self._storages: dict[int, Any] = {}

    def weights(self, *modules: nn.Module) -> None:
        """Note the parameters and buffers of modules, which and whose views are not counted."""
        for tensor in (t for m in modules for t in (*m.parameters(), *m.buffers())):
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage  # held, so that the address is not reused

    def inputs(self, *tensors: Tensor) -> None:
        """Note tensors that are older than the trace and outlive it, which are not counted."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage

    @contextmanager
    def at(self, stage: str) -> Iterator[None]:
        """Count under the name of a stage."""
        before, self.stage = self.stage, stage
        self._note()
        try:
            yield
        finally:
            self.stage = before

    def _note(self) -> None:
        self.peak[self.stage] = max(self.live, self.peak.get(self.stage, 0))

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            size = storage.nbytes()
            self.live += size
            self._storages[key] = weakref.ref(storage, functools.partial(self._release, key, size))

    def _release(self, key: int, size: int, _: Any) -> None:
        self.live -= size
        self._storages.pop(key, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        self._note()
        if (count := _flops(func, args, kwargs, out)) is not None:
            self.flops[self.stage] += count
        return out


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int | None:
    name = func._schema.name
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu":
        return attention_flops(
            args[0].shape, args[1].shape, (args[4] if len(args) > 4 else kwargs.get("is_causal", False))
        )
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu_backward":
        return attention_flops(args[1].shape, args[2].shape, args[7]) * 5 // 2
    if name == "vlmteacher::lora_linear":
        x, weights, _, a, b, _ = args
        return 2 * len(x) * sum(t.numel() for t in (*weights, *a, *b))
    if name == "vlmteacher::lora_linear_backward":
        x, _, weights, a, b, _, need_x, need_a, need_b = args[1:]
        frozen, down, up = (sum(t.numel() for t in part) for part in (weights, a, b))
        counted = need_x * (frozen + down) + need_a * down + need_b * up + (need_x or need_a) * up
        return 2 * len(x) * counted
    if name in ("vlmteacher::conv3x3", "vlmteacher::conv3x3_backward"):  # nine taps, four where the image is upsampled
        grows = args[-1] == 2
        pixels, weight = (out[0], args[2]) if name.endswith("conv3x3") else (args[0], args[4])
        return 2 * pixels.numel() // len(weight) * weight.numel() * (4 if grows else 9) // 9
    formula = flop_registry.get(func.overloadpacket)
    return None if formula is None else formula(*args, **kwargs, out_val=out)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as one operator that keeps its inputs, its output and a logarithm per row, as on GPUs.

    On meta tensors torch would run the plain expression, with an N x M matrix that no GPU makes.
    """
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return operator(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextmanager
def tracing() -> Iterator[Trace]:
    """A `Trace` with attention as on a GPU. (A TorchFunctionMode would not reach the recomputation in a backward.)"""
    stock = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _flash
    try:
        with Trace() as trace:
            yield trace
    finally:
        F.scaled_dot_product_attention = stock
