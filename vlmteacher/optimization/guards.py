"""Cheap statistics of frames that show reward hacking and collapse."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vlmteacher.ops.patchify import PatchRows

GUARDS = ("brightness", "dark_fraction", "edge_density", "colour_entropy", "temporal_jump")
DRIFT = dict(zip(GUARDS, (0.1, 0.1, 0.1, 0.75, 0.05), strict=True))
"""The change from the first step on that is a sign of a video that pleases only the Teacher."""


def small_frames(frames: Tensor | PatchRows) -> Tensor:
    """Frames (K, 3, H, W), or their patch rows, with every n-th pixel kept: about 128x128 pixels, float32."""
    stride = max(1, max(frames.shape[-2:]) // 128)
    return frames.pixels(stride) if isinstance(frames, PatchRows) else frames[..., ::stride, ::stride].float()


def drifted(first: Mapping[str, float], last: Mapping[str, float]) -> list[str]:
    """The names of the guards that differ by more than `DRIFT` between two steps."""
    return [name for name, most in DRIFT.items() if abs(last[name] - first[name]) > most]


@torch.no_grad()
def frame_contrast(frames: Tensor | PatchRows) -> Tensor:
    """Standard deviation over all frames and pixels of the channel with the most contrast; a scalar tensor.

    frames: (K, 3, H, W) in [0, 1], or their patch rows.
    """
    return small_frames(frames).std((0, 2, 3), correction=0).amax()


def frame_statistics(frames: Tensor) -> Tensor:
    """Measure low-level statistics that the motion of things leaves as they are; differentiable.

    frames: (K, 3, H, W) in [0, 1]. Returns (K, 4, 3) float32, per frame and channel: the mean, the standard deviation,
    and the mean absolute difference of neighbouring pixels in a column and in a row.
    """
    x = frames.float()
    down, across = (x.diff(dim=dim).abs().mean((2, 3)) for dim in (2, 3))
    return torch.stack([x.mean((2, 3)), x.std((2, 3), correction=0), down, across], 1)


def statistics_change(now: Tensor, before: Tensor) -> Tensor:
    """The mean squared relative change of `frame_statistics` (K, 4, 3), each relative to its mean over the frames."""
    return ((now - before) / (before.mean(0) + 0.01)).square().mean()


@torch.no_grad()
def frame_guards(frames: Tensor | PatchRows) -> Tensor:
    """Measure cheap signs of reward hacking, to be compared over the steps (the detectors of UniRL#407).

    frames: (K, 3, H, W) in [0, 1], or their patch rows. Returns (5,) float32 on their device, in the order of `GUARDS`:
    brightness (mean luma), dark_fraction (share of pixels with luma below 0.1), edge_density (share of pixels whose
    luma differs from a neighbour's by more than 0.1), colour_entropy (in bits, over 64 colour bins: 0 to 6) and
    temporal_jump (largest mean absolute change between two neighbouring frames), measured on about 128x128 pixels.
    """
    frames = small_frames(frames)
    red, green, blue = frames.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    edges = torch.maximum(
        luma[:, 1:, :-1].sub(luma[:, :-1, :-1]).abs(),
        luma[:, :-1, 1:].sub(luma[:, :-1, :-1]).abs(),
    )
    levels = (frames * 4).long().clamp(0, 3)
    bins = (levels[:, 0] * 16 + levels[:, 1] * 4 + levels[:, 2]).flatten()
    # not bincount, which waits for the device to learn the number of bins
    share = frames.new_zeros(64).index_add_(0, bins, frames.new_ones(()).expand(len(bins))) / len(bins)
    jumps = frames.diff(dim=0).abs().mean((1, 2, 3))
    return torch.stack(
        [
            luma.mean(),
            (luma < 0.1).float().mean(),
            (edges > 0.1).float().mean(),
            torch.special.entr(share).sum() / math.log(2),
            jumps.max() if len(jumps) else luma.new_zeros(()),
        ]
    )
