"""Resize and normalise video frames and cut them into the patch rows that a vision tower reads, in one operator.

Resizing is a linear map of each axis, X -> Y X Z^T, whose two banded matrices (`Band`) depend on the sizes alone. Its
gradient is the same map with the transposed bands: one kernel serves both directions, and every element is written by
whoever owns it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.ops.backends import backend


class Band(NamedTuple):
    """The rows of a banded matrix: row i has `weight[i]` at columns start[i], start[i] + 1, ..., zeros elsewhere.

    start: (rows) int32, ascending; weight: (rows, taps). start[i] + taps is never more than the matrix has columns.
    """

    start: Tensor
    weight: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Band:
        """Those of a dense matrix."""
        columns = matrix.shape[1]
        present = matrix != 0
        first = present.int().argmax(1).where(present.any(1), columns - 1)
        last = columns - 1 - present.flip(1).int().argmax(1)
        last = last.where(present.any(1), 0)
        first, last = first.flip(0).cummin(0).values.flip(0), last.cummax(0).values  # a weight within may be zero
        taps = int((last - first).max()) + 1
        start = first.clamp(max=columns - taps)
        return cls(start.int(), matrix.gather(1, start[:, None] + torch.arange(taps, device=matrix.device)))


def resize_matrix(size_in: int, size_out: int) -> Tensor:
    """(size_out, size_in) float64: how torch's antialiased bicubic interpolation maps one axis.

    The cubic with a = -0.5 of the distance in output pixels where the axis shrinks, in input pixels where it grows;
    weights add up to one, also at the borders. Source: `HelperInterpBase` and `HelperInterpCubic` in torch's
    aten/src/ATen/native/cpu/UpSampleKernel.cpp (align_corners=False).
    """
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    to, of = (torch.arange(n, dtype=torch.float64, device="cpu") + 0.5 for n in (size_out, size_in))
    x = (of - scale * to[:, None]).abs() / stretch
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)).where(x < 2, 0.0)
    return weight / weight.sum(1, keepdim=True)


@functools.lru_cache(maxsize=64)
def _bands(size_in: int, size_out: int, backward: bool, dtype: torch.dtype, device: torch.device) -> Band:
    matrix = resize_matrix(size_in, size_out)
    start, weight = Band.of(matrix.T if backward else matrix)
    return Band(start.to(device), weight.to(device, dtype))


def resize_bands(x: Tensor, size_in: Sequence[int], size_out: Sequence[int], backward: bool) -> list[Tensor]:
    """What a backend reads to resize like x: start and weight of the vertical band, then of the horizontal one.

    Empty where there is nothing to resize. float64 where x is, else float32.
    """
    if list(size_in) == list(size_out):
        return []
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [t for a, b in zip(size_in, size_out, strict=True) for t in _bands(a, b, backward, dtype, x.device)]


def _arithmetic(frames: torch.dtype, rows: torch.dtype, resized: bool) -> torch.dtype:
    """What the plain expression computes in: torch resizes no 16-bit frames on the CPU."""
    wide = torch.promote_types(frames, rows)
    return torch.promote_types(wide, torch.float32) if resized else wide


def patchify_reference(
    frames: Tensor, patch: int, temporal_patch: int, merge: int, mean: Sequence[float], std: Sequence[float],
    size: Sequence[int] | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The definition of `patchify`, in plain differentiable torch."""
    dtype, size = dtype or frames.dtype, list(size or frames.shape[2:])
    resized = size != list(frames.shape[2:])
    frames = frames.to(_arithmetic(frames.dtype, dtype, resized))
    if resized:
        frames = F.interpolate(frames, size=size, mode="bicubic", align_corners=False, antialias=True)
    frames = (frames - frames.new_tensor(mean).view(3, 1, 1)) / frames.new_tensor(std).view(3, 1, 1)
    missing = -len(frames) % temporal_patch
    frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)]) if missing else frames
    t, _, h, w = frames.shape
    grid_h, grid_w = h // patch // merge, w // patch // merge
    x = frames.reshape(t // temporal_patch, temporal_patch, 3, grid_h, merge, patch, grid_w, merge, patch)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * temporal_patch * patch * patch).to(dtype)


def patchify_backward_reference(
    grad: Tensor, num_frames: int, height: int, width: int, patch: int, temporal_patch: int, merge: int,
    std: Sequence[float], size: Sequence[int] | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of `patchify_reference` with respect to its frames, (num_frames, 3, height, width) of `dtype`."""
    dtype, size = dtype or grad.dtype, list(size or (height, width))
    resized = size != [height, width]
    grad = grad.to(_arithmetic(dtype, grad.dtype, resized))
    grid_h, grid_w = size[0] // patch // merge, size[1] // patch // merge
    x = grad.reshape(-1, grid_h, grid_w, merge, merge, 3, temporal_patch, patch, patch)
    x = x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(-1, 3, *size)
    last = x[num_frames - 1 :].sum(0, keepdim=True)  # with the slots that the last frame was repeated into
    x = torch.cat([x[: num_frames - 1], last]) / grad.new_tensor(std).view(3, 1, 1)
    if resized:
        x = torch.ops.aten._upsample_bicubic2d_aa_backward(x, size, [num_frames, 3, height, width], False)
    return x.to(dtype)


@torch.library.custom_op("vlmteacher::patchify", mutates_args=())
def _patchify(
    frames: Tensor, patch: int, temporal_patch: int, merge: int, mean: Sequence[float], std: Sequence[float],
    size: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    args = (frames, patch, temporal_patch, merge, mean, std)
    if fast := backend(frames, "patchify"):
        return fast.patchify(*args, dtype, resize_bands(frames, frames.shape[2:], size, backward=False))
    return patchify_reference(*args, size, dtype)


@torch.library.custom_op("vlmteacher::patchify_backward", mutates_args=())
def _patchify_backward(
    grad: Tensor, num_frames: int, height: int, width: int, patch: int, temporal_patch: int, merge: int,
    std: Sequence[float], size: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    sizes = (num_frames, height, width, patch, temporal_patch, merge)
    if fast := backend(grad, "patchify"):
        bands = resize_bands(grad, (height, width), size, backward=True)
        return fast.patchify_backward(grad, *sizes, std, *size, dtype, bands)
    return patchify_backward_reference(grad, *sizes, std, size, dtype)


@_patchify.register_fake
def _(
    frames: Tensor, patch: int, temporal_patch: int, merge: int, mean: Any, std: Any, size: Any, dtype: torch.dtype
) -> Tensor:
    rows = -(-frames.shape[0] // temporal_patch) * (size[0] // patch) * (size[1] // patch)
    return frames.new_empty(rows, 3 * temporal_patch * patch * patch, dtype=dtype)


@_patchify_backward.register_fake
def _(grad: Tensor, num_frames: int, height: int, width: int, *rest: Any) -> Tensor:
    return grad.new_empty(num_frames, 3, height, width, dtype=rest[-1])


def _save_sizes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    frames, patch, temporal_patch, merge, _, std, size, _ = inputs
    num_frames, _, height, width = frames.shape
    ctx.sizes = (num_frames, height, width, patch, temporal_patch, merge, std, size, frames.dtype)


def _save_sizes_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, *_, patch, temporal_patch, merge, std, size, _ = inputs
    ctx.sizes = (patch, temporal_patch, merge, [0.0] * 3, std, size, grad.dtype)


_patchify.register_autograd(
    lambda ctx, grad: (_patchify_backward(grad, *ctx.sizes), *[None] * 7), setup_context=_save_sizes
)
# The operator is affine in the frames: the gradient of its gradient is itself without the mean.
_patchify_backward.register_autograd(
    lambda ctx, grad: (_patchify(grad, *ctx.sizes), *[None] * 9), setup_context=_save_sizes_backward
)


def _check(frames: Tensor, patch: int, merge: int, size: Sequence[int], dtype: torch.dtype) -> None:
    if frames.dim() != 4 or frames.shape[1] != 3 or not len(frames) or not frames.is_floating_point():
        raise InputError(f"patchify takes floating-point frames (T, 3, H, W), got {frames.dtype} {tuple(frames.shape)}")
    if not dtype.is_floating_point or (dtype == torch.float64) != (frames.dtype == torch.float64):
        raise InputError(
            f"patchify makes no {dtype} of {frames.dtype}: ask for float32, float16 or bfloat16 (float64 of float64)"
        )
    if not frames.numel() or len(size) != 2 or min(size) < 1:
        raise InputError(
            f"frames of {tuple(frames.shape)} cannot be resized to {tuple(size)}: give (height, width) >= 1"
        )
    block = patch * merge
    if size[0] % block or size[1] % block:
        raise InputError(
            f"frames of {size[0]}x{size[1]} do not split into blocks of {block}x{block} pixels: resize them (size=...)"
        )


def patchify(
    frames: Tensor, patch: int, temporal_patch: int, merge: int, mean: Sequence[float], std: Sequence[float],
    size: Sequence[int] | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Patch rows of a video, (resize(f) - mean) / std, in the layout of Qwen-VL's processors.

    Args:
        frames: (T, 3, H, W), RGB in [0, 1], floating point, of any strides. When T is not a multiple of temporal_patch
            the last frame is repeated.
        patch, temporal_patch: extent of one patch in pixels and in frames. A patch may be the whole frame: with
            temporal_patch and merge 1 the rows are then the frames themselves, channel first.
        merge: patches of one merge x merge block stand next to each other in the output.
        mean, std: one value per colour channel.
        size: (height, width) that the frames are resized to first, bicubic with antialias, as
            torch.nn.functional.interpolate does on floating point: not clamped, not rounded. Multiples of patch *
            merge. Default: the frames' own, where nothing is resized.
        dtype: of the result; default that of frames. 16-bit frames are resized in float32 and rounded once.

    Returns:
        (N, 3 * temporal_patch * patch**2); N = ceil(T / temporal_patch) * height / patch * width / patch.
        Rows run over (t, H block, W block, row in block, column in block), columns over (channel, t, y, x).
        Differentiable with respect to frames, twice; nothing is saved for it.

    Raises:
        InputError: wrong rank, channel count or dtype, or a size that the blocks do not divide.

    Source: `_preprocess` of transformers' Qwen2VLVideoProcessor and Qwen3VLVideoProcessor.
    """
    size, dtype = list(frames.shape[2:] if size is None else size), dtype or frames.dtype
    _check(frames, patch, merge, size, dtype)
    return _patchify(frames, patch, temporal_patch, merge, list(mean), list(std), size, dtype)
