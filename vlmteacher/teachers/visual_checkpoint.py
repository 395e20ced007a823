"""The visual encoder of a frozen VLM, streamed: its memory is that of one chunk, its gradients are exact.

A frame pair (of other families: a frame) attends to itself only, so chunks of them are independent. The forward keeps
the pixels and the encoder's outputs; the backward encodes one chunk again, with a graph, and goes
straight to its pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend

# Bytes of attention outputs kept for each byte of pixels: all is an eighth of stock's at benchmarks/teacher.py's `mid`.
KEPT_PER_PIXEL = 1.17

Encode = Callable[[Tensor], tuple[Tensor, ...]]


class _Kept:
    """Attention outputs of one chunk: kept by its forward within a budget of bytes, used again by its recomputation.

    Only on the CPU, where attention is slow; on a GPU it is cheap beside the products.
    """

    def __init__(self, budget: float, outputs: Sequence[Tensor] = ()) -> None:
        self.budget = budget
        self.outputs = list(outputs)  # output, log-sum-exp, output, ...
        self.replays = bool(outputs)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.replays and self.outputs:
            return _Replay.apply(q, k, v, self.outputs.pop(0), self.outputs.pop(0))
        self.budget -= q.nbytes + 4 * q[..., 0].numel()
        if self.budget < 0 or torch._fused_sdp_choice(q, k, v) != SDPBackend.FLASH_ATTENTION.value:
            self.budget = -1  # the later ones, too: a replay goes in order
            return F.scaled_dot_product_attention(q, k, v)
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        self.outputs += [output, log_sum]
        return output


_kept: ContextVar[_Kept | None] = ContextVar("kept", default=None)


def _encoded(encode: Encode, frames: Tensor, kept: _Kept) -> tuple[Tensor, ...]:
    token = _kept.set(kept if frames.device.type == "cpu" else None)
    try:
        return encode(frames)
    finally:
        _kept.reset(token)


class _Replay(torch.autograd.Function):
    """Attention whose output is known; the backward is torch's."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, output: Tensor, log_sum: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, output, log_sum)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return *backward(grad, *ctx.saved_tensors, 0.0, False), None, None


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, frames: Tensor, encode: Encode, step: int) -> tuple[Tensor, ...]:
        chunks, ctx.kept, flat = [], [], []
        for start in range(0, len(frames), step):
            piece = frames[start : start + step]
            kept = _Kept(KEPT_PER_PIXEL * piece.nbytes)
            chunks.append(_encoded(encode, piece, kept))
            ctx.kept.append(len(kept.outputs))
            flat += kept.outputs
        ctx.save_for_backward(frames, *flat)
        ctx.encode, ctx.step = encode, step
        return tuple(torch.cat(outputs) for outputs in zip(*chunks, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        frames, *flat = ctx.saved_tensors
        pieces, place = [], 0
        for start, count in zip(range(0, len(frames), ctx.step), ctx.kept, strict=True):
            outputs, flat = flat[:count], flat[count:]
            with torch.enable_grad():
                piece = frames[start : start + ctx.step].detach().requires_grad_()
                features = _encoded(ctx.encode, piece, _Kept(0, outputs))
            rows = slice(place, place := place + len(features[0]))
            pieces += torch.autograd.grad(features, piece, [grad[rows] for grad in grads])
            del features, outputs
        return torch.cat(pieces), None, None


def stream(encode: Encode, frames: Tensor, step: int) -> tuple[Tensor, ...]:
    """`encode(frames)`, computed and differentiated `step` frames at a time.

    Args:
        encode: from (k, 3, H, W) to tensors (k * rows, C), each with the same number of rows for every `step` frames
            and independent between such chunks; differentiable, and the same whenever it is called.
        frames: (K, 3, H, W).
        step: frames of one chunk.

    Returns:
        What `encode` returns. Between forward and backward only the frames and the outputs are alive (and on the CPU
        attention outputs, in bytes `KEPT_PER_PIXEL` times the frames), in the backward also the graph of one chunk;
        the price is one more forward. A video of one chunk keeps its graph instead: the peak is the same.
    """
    if len(frames) <= step:
        return encode(frames)
    if torch.is_grad_enabled() and frames.requires_grad:
        return _Stream.apply(frames, encode, step)
    chunks = [encode(frames[start : start + step]) for start in range(0, len(frames), step)]
    return tuple(torch.cat(outputs) for outputs in zip(*chunks, strict=True))


class _Rotate(torch.autograd.Function):
    """Rotary embedding in float32; saves the angles only, for its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = a.shape[-1]
    out[..., :half] = torch.addcmul(a * cos, b, sin, value=-1)
    out[..., half:] = torch.addcmul(b * cos, a, sin)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, `x cos + rotate_half(x) sin`, in float32, in the dtype of x.

    x: (..., d); cos, sin: broadcastable to (..., d / 2), float32: the first half, which the second repeats.
    """
    return _Rotate.apply(x, cos, sin)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (B, N, H, d) tensors, all segments B in one call; returns (B, N, H * d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    kept = None if torch.compiler.is_compiling() else _kept.get()  # a compiled graph is the same in both passes
    output = kept.attend(q, k, v) if kept else F.scaled_dot_product_attention(q, k, v)
    return output.transpose(1, 2).flatten(2)


def attend_segments(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """The same for rows of segments: N = sum(lengths), each segment of a row attends to itself.

    Neighbours of equal length go into one call. Returns (B, N, H * d).
    """
    if len(lengths) == 1:
        return attend(q, k, v)
    outputs, start, index = [], 0, 0
    while index < len(lengths):
        count = 1
        while index + count < len(lengths) and lengths[index + count] == lengths[index]:
            count += 1
        stop = start + count * lengths[index]
        block = [x[:, start:stop].reshape(-1, lengths[index], *x.shape[2:]) for x in (q, k, v)]
        outputs.append(attend(*block).view(len(q), stop - start, -1))
        start, index = stop, index + count
    return torch.cat(outputs, 1)


class LinearPatchEmbed(nn.Module):
    """A vision tower's patch embedding as the matrix product that it is: its convolution's stride equals its kernel.

    Conv3d is slow, on the CPU above all. Keeps the stock parameter names. patches: (N, channels * kernel).
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.proj: nn.Conv3d = stock.proj

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)
