"""Resize and normalise video frames and cut them into the patch rows that a vision tower reads, in one operator.

Resizing is a linear map of each axis (`vlmteacher.ops.resize`), and its gradient is the same map with transposed
matrices: one kernel serves both directions, without atomic additions.

Without resizing the rows can come straight from a decoder's last convolution: `shuffle_to_rows` is pixel shuffle, clamp
and patchify in one, without a tensor of frames in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.ops.backends import backend, without_data
from vlmteacher.ops.bits import pack_bits, unpack_bits
from vlmteacher.ops.checks import expect
from vlmteacher.ops.resize import resize_bands


def _arithmetic(frames: torch.dtype, rows: torch.dtype, resized: bool) -> torch.dtype:
    """The dtype that the plain expression computes in: torch cannot resize 16-bit frames on the CPU."""
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
    last = x[num_frames - 1 :].sum(0, keepdim=True)  # the last frame and its repetitions
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
# The operator is affine in the frames: its second derivative is the operator itself without the mean.
_patchify_backward.register_autograd(
    lambda ctx, grad: (_patchify(grad, *ctx.sizes), *[None] * 9), setup_context=_save_sizes_backward
)


def _check(
    frames: Tensor, patch: int, temporal_patch: int, merge: int, mean: Sequence[float], std: Sequence[float],
    size: Sequence[int], dtype: torch.dtype,
) -> None:  # fmt: skip
    if frames.dim() != 4 or frames.shape[1] != 3 or not len(frames) or not frames.is_floating_point():
        raise InputError(f"patchify takes floating-point frames (T, 3, H, W), got {frames.dtype} {tuple(frames.shape)}")
    if not dtype.is_floating_point or (dtype == torch.float64) != (frames.dtype == torch.float64):
        raise InputError(
            f"patchify cannot make {dtype} from {frames.dtype}: ask for float32, float16 or bfloat16, or float64 from"
            " float64"
        )
    if not frames.numel() or len(size) != 2 or min(size) < 1:
        raise InputError(
            f"frames of {tuple(frames.shape)} cannot be resized to {tuple(size)}: give (height, width) >= 1"
        )
    if min(patch, temporal_patch, merge) < 1 or len(mean) != 3 or len(std) != 3:
        raise InputError(
            f"patches of {patch} pixels and {temporal_patch} frames, merged by {merge}, with {len(mean)} means and"
            f" {len(std)} deviations: give extents >= 1 and three values each"
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
        frames: (T, 3, H, W), RGB in [0, 1], floating point, of any strides. The last frame is repeated if T is not a
            multiple of temporal_patch.
        patch, temporal_patch: extent of one patch in pixels and in frames. A patch may be the whole frame: with
            temporal_patch and merge 1 the rows are then the frames themselves, channel first.
        merge: side of the blocks of merge x merge patches whose rows are adjacent.
        mean, std: one value per colour channel.
        size: (height, width), multiples of patch * merge, that the frames are first resized to, bicubic with antialias
            as torch.nn.functional.interpolate resizes floating point: neither clamped nor rounded. None: no resizing.
        dtype: of the result; None: the dtype of frames. 16-bit frames are resized in float32 and rounded once.

    Returns:
        (N, 3 * temporal_patch * patch**2) with N = ceil(T / temporal_patch) * height / patch * width / patch.
        Rows run over (t, H block, W block, row in block, column in block), columns over (channel, t, y, x).
        Differentiable twice with respect to frames, saving no tensor.

    Raises:
        InputError: wrong rank, channel count or dtype, or a size that does not split into blocks.

    Source: `_preprocess` of transformers' Qwen2VLVideoProcessor and Qwen3VLVideoProcessor.
    """
    size, dtype = list(frames.shape[2:] if size is None else size), dtype or frames.dtype
    _check(frames, patch, temporal_patch, merge, mean, std, size, dtype)
    return _patchify(frames, patch, temporal_patch, merge, list(mean), list(std), size, dtype)


@dataclass(frozen=True)
class PatchLayout:
    """The layout of patch rows: the arguments of `patchify` without resizing."""

    patch: int
    temporal_patch: int
    merge: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype

    def rows(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """The shape of a video's rows. Raises InputError: frames that do not split into blocks, or no frames."""
        if height % (self.patch * self.merge) or width % (self.patch * self.merge) or num_frames < 1:
            block = self.patch * self.merge
            raise InputError(f"{num_frames} frames of {height}x{width} do not split into blocks of {block}x{block}")
        pairs = -(-num_frames // self.temporal_patch)
        return pairs * height * width // self.patch**2, 3 * self.temporal_patch * self.patch**2

    def of(self, frames: Tensor) -> Tensor:
        """`patchify` frames (T, 3, H, W) to this layout."""
        return patchify(frames, self.patch, self.temporal_patch, self.merge, self.mean, self.std, dtype=self.dtype)


@dataclass(frozen=True)
class PatchRows:
    """A video (K, 3, H, W) as patch rows.

    rows: of shape layout.rows(num_frames, height, width), differentiable. Raises InputError for another shape or dtype.
    """

    rows: Tensor
    layout: PatchLayout
    num_frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        shape = self.layout.rows(self.num_frames, self.height, self.width)
        if self.rows.shape != shape or self.rows.dtype != self.layout.dtype:
            raise InputError(
                f"patch rows of {self.rows.dtype} {tuple(self.rows.shape)} for {self.num_frames} frames of"
                f" {self.height}x{self.width}: they must be {self.layout.dtype} {shape}"
            )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape (K, 3, H, W) of the frames."""
        return self.num_frames, 3, self.height, self.width

    def __len__(self) -> int:
        return self.num_frames

    def to(self, device: torch.device) -> PatchRows:
        return replace(self, rows=self.rows.to(device))

    def pixels(self, stride: int = 1) -> Tensor:
        """Every `stride`-th row and column of the frames, (K, 3, ceil(H / stride), ceil(W / stride)) float32."""
        layout, block = self.layout, self.layout.patch * self.layout.merge
        device = self.rows.device
        t, c, y, x = torch.meshgrid(
            torch.arange(self.num_frames, device=device),
            torch.arange(3, device=device),
            torch.arange(0, self.height, stride, device=device),
            torch.arange(0, self.width, stride, device=device),
            indexing="ij",
        )
        rows = self.rows.view(
            *(-1, self.height // block, self.width // block, layout.merge, layout.merge),
            *(3, layout.temporal_patch, layout.patch, layout.patch),
        )
        row, column = ((z // block, z // layout.patch % layout.merge, z % layout.patch) for z in (y, x))
        values = rows[
            t // layout.temporal_patch, row[0], column[0], row[1], column[1], c, t % layout.temporal_patch, row[2],
            column[2],
        ].float()  # fmt: skip
        channels = zip(values.unbind(1), layout.mean, layout.std, strict=True)
        return torch.stack([channel * s + m for channel, m, s in channels], 1)

    def aminmax(self) -> tuple[Tensor, Tensor]:
        """The frames' minimum and maximum, drawn towards the mean by the most that rounding the rows can have added."""
        less = 1 - torch.finfo(self.rows.dtype).eps
        lows, highs = [], []
        for rows, m, s in zip(self.rows.detach().chunk(3, 1), self.layout.mean, self.layout.std, strict=True):
            low, high = rows.aminmax()
            lows.append(low.float() * (s * less) + m)
            highs.append(high.float() * (s * less) + m)
        return torch.stack(lows).amin(), torch.stack(highs).amax()


class Rows(NamedTuple):
    """The layout that `shuffle_to_rows` writes: a `PatchLayout` whose patches need not be square.

    With patches of a whole frame, temporal_patch and merge 1, a mean of 0 and a std of 1 the rows are the frames.
    """

    patch_height: int
    patch_width: int
    temporal_patch: int
    merge: int
    mean: list[float]
    std: list[float]


def shuffle_to_rows_reference(y: Tensor, slots: Tensor, rows: Tensor, upscale: int, layout: Rows) -> Tensor:
    """Pixel shuffle, clamp to [0, 1], normalise, and write to the places of patch rows, in plain torch.

    Args:
        y: (G, h, w, 3 upscale^2), contiguous: frames of height upscale h and width upscale w before the pixel shuffle,
            channels last.
        slots: (G, R) int32: the positions of frame g in the video, ascending; -1 is none.
        rows: the whole video's rows, contiguous, of any floating-point dtype; those of these frames are written.

    Returns:
        (G, 3, upscale h, ceil(upscale w / 8)) uint8: bits (`pack_bits`) that are set for pixels within [0, 1].
    """
    g, height, width, _ = y.shape
    frames = y.reshape(g, height, width, 3, upscale, upscale).permute(0, 3, 1, 4, 2, 5)
    frames = frames.reshape(g, 3, height * upscale, width * upscale)  # F.pixel_shuffle leaves empty ones as they are
    clamped = frames.clamp(0, 1).to(torch.promote_types(y.dtype, rows.dtype))
    values = (clamped - clamped.new_tensor(layout.mean).view(3, 1, 1)) / clamped.new_tensor(layout.std).view(3, 1, 1)
    video = _video(rows, layout, *frames.shape[2:])
    for at in slots.long().unbind(1):
        here = at >= 0
        place = at[here] // layout.temporal_patch, at[here] % layout.temporal_patch
        video[place] = values[here].view(-1, *video.shape[2:]).to(rows.dtype)
    return pack_bits((frames >= 0) & (frames <= 1))


def shuffle_to_rows_backward_reference(
    grad: Tensor, slots: Tensor, inside: Tensor, size: tuple[int, int], upscale: int, layout: Rows, dtype: torch.dtype
) -> Tensor:
    """The gradient of `shuffle_to_rows_reference` with respect to y, (G, *size, 3 upscale^2) of `dtype`.

    grad: the gradient of the rows, contiguous; inside: the bits that the forward returned.
    """
    height, width = size
    video = _video(grad.contiguous(), layout, height * upscale, width * upscale)
    wide = torch.promote_types(grad.dtype, dtype)
    total = torch.zeros(len(slots), *video.shape[2:], dtype=wide, device=grad.device)
    for at in slots.long().unbind(1):
        here = at >= 0
        total[here] += video[at[here] // layout.temporal_patch, at[here] % layout.temporal_patch].to(wide)
    frames = total.view(len(slots), 3, height * upscale, width * upscale) / total.new_tensor(layout.std).view(3, 1, 1)
    frames = torch.where(unpack_bits(inside, width * upscale), frames, 0)
    frames = frames.view(len(slots), 3, height, upscale, width, upscale).permute(0, 2, 4, 1, 3, 5)
    return frames.reshape(len(slots), height, width, 3 * upscale**2).to(dtype).contiguous()


def _video(rows: Tensor, layout: Rows, height: int, width: int) -> Tensor:
    """View rows as (temporal patches, frames in each, 3, blocks, merge, patch rows, blocks, merge, patch columns)."""
    high, wide, merge = layout.patch_height, layout.patch_width, layout.merge
    blocks = height // (high * merge), width // (wide * merge)
    x = rows.view(-1, *blocks, merge, merge, 3, layout.temporal_patch, high, wide)
    return x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)


def shuffle_to_rows(y: Tensor, slots: Tensor, rows: Tensor, upscale: int, layout: Rows) -> Tensor:
    """`shuffle_to_rows_reference` on the backend of y's device; y and slots may have any strides.

    Raises InputError: shapes, dtypes, devices or strides that do not fit.
    """
    expect("y", y, (len(slots), None, None, 3 * upscale**2), y.dtype, rows.device)
    _check_rows(rows, slots, y.shape[1] * upscale, y.shape[2] * upscale, layout)
    if not rows.is_contiguous():
        raise InputError("the rows that frames are written to must be contiguous")
    if without_data(y):
        return _shuffle_operator(y, slots, rows, upscale, *layout)
    if fast := _fast(y, rows):
        return fast.shuffle_to_rows(y, slots, rows, upscale, *layout)
    return shuffle_to_rows_reference(y, slots, rows, upscale, layout)


def shuffle_to_rows_backward(
    grad: Tensor, slots: Tensor, inside: Tensor, size: tuple[int, int], upscale: int, layout: Rows, dtype: torch.dtype
) -> Tensor:
    """`shuffle_to_rows_backward_reference` on the backend of grad's device; the tensors may have any strides.

    Raises InputError: shapes, dtypes or devices that do not fit.
    """
    height, width = (side * upscale for side in size)
    _check_rows(grad, slots, height, width, layout)
    expect("inside", inside, (len(slots), 3, height, (width + 7) // 8), torch.uint8, grad.device)
    if without_data(grad):
        return _unshuffle_operator(grad, slots, inside, *size, upscale, *layout, dtype)
    if fast := _fast(grad, grad.new_empty(0, dtype=dtype)):
        return fast.shuffle_to_rows_backward(grad, slots, inside, *size, upscale, *layout, dtype)
    return shuffle_to_rows_backward_reference(grad, slots, inside, size, upscale, layout, dtype)


def _check_rows(rows: Tensor, slots: Tensor, height: int, width: int, layout: Rows) -> None:
    """Raise InputError unless these are the rows of a video of height x width in this layout."""
    high, wide, pairs, merge = layout.patch_height, layout.patch_width, layout.temporal_patch, layout.merge
    if min(high, wide, pairs, merge) < 1 or len(layout.mean) != 3 or len(layout.std) != 3:
        raise InputError(f"patch rows take extents >= 1 and three means and deviations: {layout}")
    if height % (high * merge) or width % (wide * merge):
        raise InputError(f"frames of {height}x{width} do not split into blocks of {high * merge}x{wide * merge}")
    if not rows.is_floating_point():
        raise InputError(f"patch rows are floating-point, not {rows.dtype}")
    expect("rows", rows, (None, 3 * pairs * high * wide), rows.dtype, rows.device)
    patches = height // high * (width // wide)
    if len(rows) % patches if patches else len(rows):
        raise InputError(f"{len(rows)} rows are no whole frames of {patches} patches each")
    expect("slots", slots, (None, None), torch.int32, rows.device)


# Registered with torch.library for tensors without data.
@torch.library.custom_op("vlmteacher::shuffle_to_rows", mutates_args=("rows",))
def _shuffle_operator(
    y: Tensor, slots: Tensor, rows: Tensor, upscale: int, patch_height: int, patch_width: int, temporal_patch: int,
    merge: int, mean: Sequence[float], std: Sequence[float],
) -> Tensor:  # fmt: skip
    layout = Rows(patch_height, patch_width, temporal_patch, merge, list(mean), list(std))
    return shuffle_to_rows(y, slots, rows, upscale, layout)


@torch.library.custom_op("vlmteacher::shuffle_to_rows_backward", mutates_args=())
def _unshuffle_operator(
    grad: Tensor, slots: Tensor, inside: Tensor, height: int, width: int, upscale: int, patch_height: int,
    patch_width: int, temporal_patch: int, merge: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    layout = Rows(patch_height, patch_width, temporal_patch, merge, list(mean), list(std))
    return shuffle_to_rows_backward(grad, slots, inside, (height, width), upscale, layout, dtype)


@_shuffle_operator.register_fake
def _(y: Tensor, slots: Tensor, rows: Tensor, upscale: int, *layout: Any) -> Tensor:
    g, h, w, _ = y.shape
    return y.new_empty(g, 3, h * upscale, (w * upscale + 7) // 8, dtype=torch.uint8)


@_unshuffle_operator.register_fake
def _(grad: Tensor, slots: Tensor, inside: Tensor, height: int, width: int, upscale: int, *rest: Any) -> Tensor:
    return grad.new_empty(len(slots), height, width, 3 * upscale**2, dtype=rest[-1])


def _fast(x: Tensor, other: Tensor) -> Any:
    """The backend for x, or None for dtypes that no backend converts between: float64 and any other."""
    return backend(x, "patchify") if (x.dtype == torch.float64) == (other.dtype == torch.float64) else None
