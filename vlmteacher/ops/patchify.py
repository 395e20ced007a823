"""Normalise video frames and cut them into the patch rows that a Qwen-VL vision tower reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmteacher.errors import InputError


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


def _check(frames: Tensor, patch: int, temporal_patch: int, merge: int) -> None:
    if frames.dim() != 4 or frames.shape[1] != 3 or not len(frames) or not frames.is_floating_point():
        raise InputError(f"patchify takes floating-point frames (T, 3, H, W), got {frames.dtype} {tuple(frames.shape)}")
    if frames.shape[2] % (patch * merge) or frames.shape[3] % (patch * merge):
        h, w = frames.shape[2:]
        raise InputError(f"frames of {h}x{w} do not split into blocks of {patch * merge}x{patch * merge} pixels: resize")


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
        (N, 3 * temporal_patch * patch * patch) in the dtype of frames; N = ceil(T / temporal_patch) * H/patch * W/patch.
        Rows run over (t, H block, W block, row in block, column in block), columns over (channel, t, y, x).
        Differentiable with respect to frames.

    Raises:
        InputError: wrong rank, channel count or dtype, or a size that the blocks do not divide.

    Source: Qwen2VLVideoProcessor / Qwen3VLVideoProcessor `_preprocess` of transformers.
    """
    _check(frames, patch, temporal_patch, merge)
    return patchify_reference(frames, patch, temporal_patch, merge, mean, std)
