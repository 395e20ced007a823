"""Attention of diffusers' transformers by our own operator, unless another backend is chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmteacher.errors import InputError, first_line
from vlmteacher.ops import sdpa
from vlmteacher.ops.attention import attention, is_native
from vlmteacher.reasoners.own_tokens import exchange
from vlmteacher.settings import Attention


def attend(processor: Any, q: Tensor, k: Tensor, v: Tensor, *, to_self: bool = False) -> Tensor:
    """Attention of q (B, N, H, d) to k and v (B, M, H, d), returned as (B, N, H, d).

    processor: the diffusers attention processor that calls, for its backend and its context parallelism. to_self: k and
    v are of q's tokens, which context parallelism shares among the ranks; of other tokens every rank has all.
    """
    if not to_self or processor._parallel_config is None:
        return _attend(processor, q, k, v)
    # Not by diffusers' own attention for it, which computes every attention again in the backward.
    output = _attend(processor, *(exchange(processor, x) for x in (q, k, v)))
    return exchange(processor, output, back=True)


def describe(choice: Attention, device: torch.device, dtype: torch.dtype) -> str:
    """The attention of a transformer of this dtype: "native", "torch", or those of torch in the order of its tries."""
    if names := sdpa.order(choice, device):
        return ", ".join(names)
    return "native" if is_native(torch.empty(1, 1, 1, 2, dtype=dtype, device=device)) else "torch"


def check_backward(transformer: Any) -> None:
    """Raise InputError where the attention of a diffusers transformer has no backward, or one that is not finite.

    Without one the residual passes the gradient on, and no loss shows that q, k and v get none.
    """
    if transformer.device.type == "meta":
        return
    processors = (module.processor for module in transformer.modules() if hasattr(module, "processor"))
    dim = transformer.config.attention_head_dim
    processor = next(
        (each for each in processors if hasattr(each, "_attention_backend")), None
    )  # not of a text refiner
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 64, 1, dim, generator=generator) for _ in range(4)]
    *qkv, grad = (x.to(transformer.device, transformer.dtype) for x in inputs)
    qkv = [x.requires_grad_() for x in qkv]
    try:
        with torch.enable_grad():
            grads = torch.autograd.grad(_attend(processor, *qkv), qkv, grad)
    except (RuntimeError, NotImplementedError) as error:
        why = first_line(error)
    else:
        if all(bool(x.isfinite().all()) for x in grads):
            return
        why = "its gradient is not finite"
    backend = getattr(processor, "_attention_backend", None)
    name = getattr(backend, "value", backend) or "of torch"
    raise InputError(
        f"the attention backend {name} has no backward ({why}): choose another one (--attention, or"
        " transformer.set_attention_backend)"
    )


def _attend(processor: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    backend = getattr(processor, "_attention_backend", None)
    if backend is None and is_native(q):
        return attention(q, k, v)
    output: Tensor = dispatch_attention_fn(q, k, v, backend=backend)
    return output
