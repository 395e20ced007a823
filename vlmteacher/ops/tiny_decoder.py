"""The convolutions of a TAEHV-class decoder, forward and to the input, for frozen weights.

Frames stand in a bank, channels last. An output frame names the frames that it sees, so "the previous frame" is an
index and never a copy; nearest upsampling is a way of reading. Of the forward pass one bit per activation is kept.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmteacher.ops.backends import backend, cpp_status


def pack_signs(x: Tensor) -> Tensor:
    """(..., N) -> (..., ceil(N / 8)) uint8: bit n % 8 of byte n // 8 is set where x > 0."""
    n = x.shape[-1]
    bits = F.pad(x > 0, (0, -n % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, device=x.device)).sum(-1, dtype=torch.uint8)


def unpack_signs(signs: Tensor, n: int) -> Tensor:
    """The inverse of `pack_signs`: (..., n) bool."""
    return ((signs[..., None] >> torch.arange(8, device=signs.device)) & 1).flatten(-2)[..., :n].bool()


def conv3x3_reference(
    x: Tensor,
    taps: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: Tensor | None,
    slope: float | None,
    upscale: int,
) -> tuple[Tensor, Tensor]:
    """3x3 convolution (padding 1) with bias, residual, activation and its signs, in plain torch.

    Args:
        x: (F, H, W, C), contiguous: the bank of frames.
        taps: (G, T) int32: the frames of x that output frame g sees, T = 1, or 2 (itself and the previous one); -1 is a
            frame of zeros, which only the last tap may be. A frame stands at most once in a column.
        weight: (N, 3, 3, T * C), contiguous: rows, columns, then the channels of tap 0 before those of tap 1.
        bias: (N,) or None.
        residual, rows: another bank (R, upscale H, upscale W, N), contiguous, and (G,) int32: residual[rows[g]] is added
            before the activation. A memory block adds the input of its first convolution after its third. Both or
            neither.
        slope: of the activation below zero: 0 is ReLU, .2 LeakyReLU; None is no activation.
        upscale: 1, or 2: x is upsampled (nearest) before the convolution, that is read at (row // 2, column // 2).
            A backend may sum the weights that meet the same pixel and take four taps for each output instead of nine.

    Returns:
        y (G, upscale H, upscale W, N) and the signs of what went into the activation, (G, upscale H, upscale W,
        ceil(N / 8)) uint8, see `pack_signs`; with no activation an empty tensor of uint8.
    """
    y = torch.cat([torch.where((t < 0).view(-1, 1, 1, 1), 0, x[t.clamp(min=0).long()]) for t in taps.unbind(1)], -1)
    y = y.repeat_interleave(upscale, 1).repeat_interleave(upscale, 2) if upscale > 1 else y
    y = F.conv2d(y.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), bias, padding=1).permute(0, 2, 3, 1)
    if residual is not None and rows is not None:
        y = y + residual[rows.long()]
    if slope is None:
        return y.contiguous(), torch.empty(0, dtype=torch.uint8, device=x.device)
    return torch.where(y > 0, y, slope * y).contiguous(), pack_signs(y)


def conv3x3_backward_reference(
    grad: Tensor,
    signs: Tensor,
    taps: Tensor,
    frames: int,
    weight: Tensor,
    residual: Tensor | None,
    residual_signs: Tensor | None,
    slope: float | None,
    upscale: int,
) -> Tensor:
    """The gradient of `conv3x3_reference` to x, from that of y, (G, upscale H, upscale W, N), contiguous.

    residual, residual_signs: what comes back through the residual of a memory block, whose bank is this x: the gradient
    (G, H, W, C) of the block's output and the signs of its activation, of the same slope. It is added, masked like
    `grad`, to the frames taps[:, 0]. Both or neither; upscale 1.

    Returns (frames, H, W, C): the sums over every place at which a frame stands in `taps`; zeros where in none. The
    activation's slope is applied to `grad` as it is read. As a frame stands at most once in a column of `taps`, this is
    a convolution too: frame f sees the at most T output frames that saw it, with the weight turned around.
    """
    if slope is not None:
        grad = torch.where(unpack_signs(signs, grad.shape[-1]), grad, slope * grad)
    g, height, width, _ = grad.shape
    channels = weight.shape[-1] // taps.shape[1]
    size = (g, weight.shape[-1], height, width)
    dx = torch.nn.grad.conv2d_input(size, weight.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2), padding=1)
    dx = dx.unflatten(2, (-1, upscale)).unflatten(4, (-1, upscale)).sum((3, 5)).permute(0, 2, 3, 1)
    out = dx.new_zeros(frames, height // upscale, width // upscale, channels)
    for t, part in zip(taps.unbind(1), dx.split(channels, -1), strict=True):
        out.index_add_(0, t[t >= 0].long(), part[t >= 0])
    if residual is None or residual_signs is None:
        return out
    if slope is not None:
        residual = torch.where(unpack_signs(residual_signs, channels), residual, slope * residual)
    return out.index_add_(0, taps[:, 0].long(), residual)


def _fast(x: Tensor) -> Any:
    """The backend for x: a namespace with `conv3x3` and `conv3x3_backward` of the arguments above, or None.

    The C++ one has its own kernels for AVX-512 with bfloat16; elsewhere on the CPU torch's convolutions are as good.
    """
    if x.device.type == "cpu" and not (x.dtype in (torch.float32, torch.bfloat16) and _avx512()):
        return None
    return backend(x, "tiny_decoder")


@functools.cache
def _avx512() -> bool:
    return cpp_status()[0] and importlib.import_module("vlmteacher._C").cpu_features().get("avx512bf16", False)


def conv3x3(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`conv3x3_reference` by the backend of x's device."""
    fast = _fast(x)
    return (fast.conv3x3 if fast else conv3x3_reference)(x, *rest)


def conv3x3_backward(grad: Tensor, *rest: Any) -> Tensor:
    """`conv3x3_backward_reference` by the backend of grad's device."""
    fast = _fast(grad)
    return (fast.conv3x3_backward if fast else conv3x3_backward_reference)(grad, *rest)
