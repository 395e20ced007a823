"""The visual encoder of a frozen VLM, streamed: its memory is that of one chunk, its gradients are exact.

A frame pair (of other families: a frame) attends to itself only, so chunks of them are independent. The forward keeps
the pixels and the encoder's outputs; the backward encodes one chunk after the other again, with a graph, and
differentiates it to its pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlmteacher.ops.attention import Spans, attention

Encode = Callable[[Tensor], tuple[Tensor, ...]]


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, frames: Tensor, encode: Encode, step: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(frames)
        ctx.encode, ctx.step = encode, step
        return _in_chunks(frames, encode, step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (frames,) = ctx.saved_tensors
        pieces, place = [], 0
        for chunk in frames.split(ctx.step):
            with torch.enable_grad():
                piece = chunk.detach().requires_grad_()
                features = ctx.encode(piece)
            rows = slice(place, place := place + len(features[0]))
            pieces += torch.autograd.grad(features, piece, [grad[rows] for grad in grads])
            del features
        return torch.cat(pieces), None, None


def _in_chunks(frames: Tensor, encode: Encode, step: int) -> tuple[Tensor, ...]:
    chunks = [encode(chunk) for chunk in frames.split(step)]
    return tuple(torch.cat(outputs) for outputs in zip(*chunks, strict=True))


def stream(encode: Encode, frames: Tensor, step: int) -> tuple[Tensor, ...]:
    """Compute and differentiate `encode(frames)`, `step` frames at a time.

    Args:
        encode: from (k, 3, H, W) to tensors (k * rows, C), each with the same number of rows for every `step` frames
            and independent between such chunks; differentiable, and the same whenever it is called.
        frames: (K, 3, H, W).
        step: frames of one chunk.

    Returns:
        The outputs of `encode`. Between forward and backward only the frames and the outputs are alive, in the backward
        also the graph of one chunk; the cost is one more forward. A video of one chunk keeps its graph instead: the
        peak is the same.
    """
    if len(frames) <= step:
        return encode(frames)
    if torch.is_grad_enabled() and frames.requires_grad:
        return _Stream.apply(frames, encode, step)
    return _in_chunks(frames, encode, step)


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Tensor:
    """Attention of (B, N, H, d) tensors over N; returns (B, N, H * d). See `ops.attention`."""
    return attention(q, k, v, backend=backend).flatten(2)


def attend_segments(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], backend: str | None = None) -> Tensor:
    """Attention of rows of segments, N = sum(lengths): each segment attends to itself. Returns (B, N, H * d).

    Neighbours of equal length are computed in one call; with a backend for unequal lengths all are.
    """
    if len(lengths) == 1:
        return attend(q, k, v, backend)
    if backend in ("flex", "xformers", "flash"):
        return attention(q, k, v, Spans.segments(lengths, q.device), backend).flatten(2)
    outputs, start = [], 0
    for length, group in groupby(lengths):
        stop = start + length * len(list(group))
        some_q, some_k, some_v = (x[:, start:stop].reshape(-1, length, *x.shape[2:]) for x in (q, k, v))
        outputs.append(attend(some_q, some_k, some_v, backend).view(len(q), stop - start, -1))
        start = stop
    return torch.cat(outputs, 1)


class LinearPatchEmbed(nn.Module):
    """A vision tower's patch embedding as a matrix product: the stride of its convolution equals the kernel.

    Conv3d is slow, above all on the CPU. The parameters keep their stock names. patches: (N, channels * kernel).
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.proj: nn.Conv3d = stock.proj

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)
