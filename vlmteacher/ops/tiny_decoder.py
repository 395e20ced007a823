"""The convolutions of a TAEHV-class decoder, forward and to the input, for frozen weights.

Frames stand in a bank, channels last. An output frame names the frames that it sees, so "the previous frame" is an
index and never a copy; nearest upsampling is a way of reading. Of the forward pass one bit per activation is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pack_signs(x: Tensor) -> Tensor:
    """(..., N) -> (..., ceil(N / 8)) uint8: bit n % 8 of byte n // 8 is set where x > 0."""
    n = x.shape[-1]
    bits = F.pad(x > 0, (0, -n % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, device=x.device)).sum(-1, dtype=torch.uint8)


def unpack_signs(signs: Tensor, n: int) -> Tensor:
    """The inverse of `pack_signs`: (..., n) bool."""
    return ((signs[..., None] >> torch.arange(8, device=signs.device)) & 1).flatten(-2)[..., :n].bool()


def conv3x3_reference(
    x: Tensor, taps: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, slope: float | None, upscale: int
) -> tuple[Tensor, Tensor]:
    """3x3 convolution (padding 1) with bias, residual, activation and its signs, in plain torch.

    Args:
        x: (F, H, W, C), contiguous: the bank of frames.
        taps: (G, T) int32: the frames of x that output frame g sees, T = 1, or 2 (itself and the previous one); -1 is a
            frame of zeros. A frame stands at most once in a column.
        weight: (N, 3, 3, T * C), contiguous: rows, columns, then the channels of tap 0 before those of tap 1.
        bias: (N,) or None.
        residual: add x[taps[:, 0]] before the activation (N = C, upscale 1).
        slope: of the activation below zero: 0 is ReLU, .2 LeakyReLU; None is no activation.
        upscale: 1, or 2: x is upsampled (nearest) before the convolution, that is read at (row // 2, column // 2).

    Returns:
        y (G, upscale H, upscale W, N) and the signs of what went into the activation, (G, upscale H, upscale W,
        ceil(N / 8)) uint8, see `pack_signs`; with no activation an empty tensor of uint8.
    """
    y = torch.cat([torch.where((t < 0).view(-1, 1, 1, 1), 0, x[t.clamp(min=0).long()]) for t in taps.unbind(1)], -1)
    y = y.repeat_interleave(upscale, 1).repeat_interleave(upscale, 2) if upscale > 1 else y
    y = F.conv2d(y.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), bias, padding=1).permute(0, 2, 3, 1)
    if residual:
        y = y + x[taps[:, 0].long()]
    if slope is None:
        return y.contiguous(), torch.empty(0, dtype=torch.uint8, device=x.device)
    return torch.where(y > 0, y, slope * y).contiguous(), pack_signs(y)


def conv3x3_backward_reference(
    grad: Tensor, signs: Tensor, taps: Tensor, frames: int, weight: Tensor, residual: bool, slope: float | None,
    upscale: int,
) -> Tensor:  # fmt: skip
    """The gradient of `conv3x3_reference` to x, from that of y, (G, upscale H, upscale W, N).

    Returns (frames, H, W, C): the sums over every place at which a frame stands in `taps`, the residual's included. The
    activation's slope is applied to `grad` as it is read.
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
    return out.index_add_(0, taps[:, 0].long(), grad) if residual else out
