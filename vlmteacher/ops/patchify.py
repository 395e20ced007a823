"""Normalise video frames and cut them into the patch rows that a Qwen-VL vision tower reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.ops.backends import backend


def patchify_reference(
    frames: Tensor, patch: int, temporal_patch: int, merge: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """The definition of `patchify`, in plain differentiable torch."""
    frames = (frames - frames.new_tensor(mean).view(3, 1, 1)) / frames.new_tensor(std).view(3, 1, 1)
    missing = -len(frames) % temporal_patch
    frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)]) if missing else frames
    t, _, h, w = frames.shape
    grid_h, grid_w = h // patch // merge, w // patch // merge
    x = frames.reshape(t // temporal_patch, temporal_patch, 3, grid_h, merge, patch, grid_w, merge, patch)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * temporal_patch * patch * patch)


def patchify_backward_reference(
    grad: Tensor, num_frames: int, height: int, width: int, patch: int, temporal_patch: int, merge: int,
    std: Sequence[float],
) -> Tensor:  # fmt: skip
    """The gradient of `patchify_reference` with respect to its frames, (num_frames, 3, height, width)."""
    grid_h, grid_w = height // patch // merge, width // patch // merge
    x = grad.reshape(-1, grid_h, grid_w, merge, merge, 3, temporal_patch, patch, patch)
    x = x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(-1, 3, height, width)
    last = x[num_frames - 1 :].sum(0, keepdim=True)  # with the slots that the last frame was repeated into
    return torch.cat([x[: num_frames - 1], last]) / grad.new_tensor(std).view(3, 1, 1)


@torch.library.custom_op("vlmteacher::patchify", mutates_args=())
def _patchify(
    frames: Tensor, patch: int, temporal_patch: int, merge: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    fast = backend(frames, "patchify")
    return (fast.patchify if fast else patchify_reference)(frames, patch, temporal_patch, merge, mean, std)


@torch.library.custom_op("vlmteacher::patchify_backward", mutates_args=())
def _patchify_backward(
    grad: Tensor, num_frames: int, height: int, width: int, patch: int, temporal_patch: int, merge: int,
    std: Sequence[float],
) -> Tensor:  # fmt: skip
    fast = backend(grad, "patchify")
    run = fast.patchify_backward if fast else patchify_backward_reference
    return run(grad, num_frames, height, width, patch, temporal_patch, merge, std)


@_patchify.register_fake
def _(frames: Tensor, patch: int, temporal_patch: int, merge: int, mean: Any, std: Any) -> Tensor:
    t, _, h, w = frames.shape
    rows = -(-t // temporal_patch) * (h // patch) * (w // patch)
    return frames.new_empty(rows, 3 * temporal_patch * patch * patch)


@_patchify_backward.register_fake
def _(grad: Tensor, num_frames: int, height: int, width: int, *_: Any) -> Tensor:
    return grad.new_empty(num_frames, 3, height, width)


def _save_sizes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    frames, patch, temporal_patch, merge, _, std = inputs
    num_frames, _, height, width = frames.shape
    ctx.sizes = (num_frames, height, width, patch, temporal_patch, merge, std)


_patchify.register_autograd(
    lambda ctx, grad: (_patchify_backward(grad, *ctx.sizes), *[None] * 5), setup_context=_save_sizes
)
# The operator is affine in the frames: the gradient of its gradient is itself without the mean.
_patchify_backward.register_autograd(
    lambda ctx, grad: (_patchify(grad, *ctx.sizes[:3], [0.0] * 3, ctx.sizes[3]), *[None] * 7),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "sizes", inputs[4:]),
)


def _check(frames: Tensor, patch: int, merge: int) -> None:
    if frames.dim() != 4 or frames.shape[1] != 3 or not len(frames) or not frames.is_floating_point():
        raise InputError(f"patchify takes floating-point frames (T, 3, H, W), got {frames.dtype} {tuple(frames.shape)}")
    height, width = frames.shape[2:]
    if height % (patch * merge) or width % (patch * merge):
        size = patch * merge
        raise InputError(f"frames of {height}x{width} do not split into blocks of {size}x{size} pixels: resize them")


def patchify(
    frames: Tensor, patch: int, temporal_patch: int, merge: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Patch rows of a video, (f - mean) / std, in the layout of Qwen-VL's processors.

    Args:
        frames: (T, 3, H, W), RGB in [0, 1], floating point; H and W are multiples of patch * merge. When T is not a
            multiple of temporal_patch the last frame is repeated.
        patch, temporal_patch: extent of one patch in pixels and in frames.
        merge: patches of one merge x merge block stand next to each other in the output.
        mean, std: one value per colour channel.

    Returns:
        (N, 3 * temporal_patch * patch**2) in the dtype of frames; N = ceil(T / temporal_patch) * H / patch * W / patch.
        Rows run over (t, H block, W block, row in block, column in block), columns over (channel, t, y, x).
        Differentiable with respect to frames, twice.

    Raises:
        InputError: wrong rank, channel count or dtype, or a size that the blocks do not divide.

    Source: `_preprocess` of transformers' Qwen2VLVideoProcessor and Qwen3VLVideoProcessor.
    """
    _check(frames, patch, merge)
    return _patchify(frames, patch, temporal_patch, merge, list(mean), list(std))
