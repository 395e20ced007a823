"""The surrogate decoder's last layer into the Teacher's patch rows, and their gradient back, against frames in between.

    python -m benchmarks.hand_over [--json] [--dtype bfloat16]

Stock of the first rows, which are of that step alone: pixel shuffle, clamp and its bits in torch, then `patchify`, then
back. Of the last ones, which are of a whole decoder forward and backward: its frames, as for a Teacher that resizes,
and `patchify`. `memory_ratio` is of the most bytes that tensors take at one time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.patchify import peak_bytes
from benchmarks.surrogate_decoder import PRESETS, preset_decoder
from benchmarks.timing import arguments, compare, publish
from vlmteacher.decoders import SurrogateDecoder
from vlmteacher.ops.bits import pack_bits, unpack_bits
from vlmteacher.ops.patchify import PatchLayout, Rows, shuffle_to_rows, shuffle_to_rows_backward
from vlmteacher.optimization.frames import teacher_frame_indices

SIZES = [(12, 64, 64, 8, 1), (12, 352, 640, 16, 2), (24, 704, 1280, 16, 2)]  # frames, height, width, patch, upscale


def in_two_steps(y: Tensor, grad: Tensor, upscale: int, layout: PatchLayout) -> tuple[Tensor, Tensor]:
    """Rows and the gradient of y, with the frames and theirs."""
    inside = pack_bits((y >= 0) & (y <= 1))
    with torch.enable_grad():
        frames = F.pixel_shuffle(y.permute(0, 3, 1, 2), upscale).clamp_(0, 1).requires_grad_()
        rows = layout.of(frames)
    (back,) = torch.autograd.grad(rows, frames, grad)
    dy = F.pixel_unshuffle(back, upscale).permute(0, 2, 3, 1)
    return rows, torch.where(unpack_bits(inside, dy.shape[-1]), dy, 0).contiguous()


def in_one(y: Tensor, grad: Tensor, upscale: int, layout: PatchLayout) -> tuple[Tensor, Tensor]:
    how = Rows(layout.patch, layout.patch, layout.temporal_patch, layout.merge, [*layout.mean], [*layout.std])
    slots = torch.arange(len(y), dtype=torch.int32, device=y.device)[:, None]
    rows = torch.empty_like(grad)
    inside = shuffle_to_rows(y, slots, rows, upscale, how)
    return rows, shuffle_to_rows_backward(grad, slots, inside, (y.shape[1], y.shape[2]), upscale, how, y.dtype)


def main() -> None:
    settings = arguments(__doc__ or "", "bfloat16")
    dtype = getattr(torch, settings.dtype)
    rows: list[dict[str, Any]] = []

    def row(case: str, ours: Any, stock: Any) -> None:
        times = compare(case, ours, stock, settings.pairs, settings.device)
        times["memory_ratio"] = peak_bytes(ours) / peak_bytes(stock)
        rows.append(times)

    for frames, height, width, patch, upscale in SIZES:
        layout = PatchLayout(patch, 2, 2, (0.5,) * 3, (0.5,) * 3, dtype)
        y = torch.rand(frames, height // upscale, width // upscale, 3 * upscale**2, device=settings.device).to(dtype)
        grad = torch.randn(layout.rows(frames, height, width), device=settings.device).to(dtype)
        for mine, theirs in zip(*(f(y.clone(), grad, upscale, layout) for f in (in_one, in_two_steps)), strict=True):
            assert torch.equal(mine, theirs)
        row(
            f"{frames}x{height}x{width} patch {patch}, the step alone",
            lambda args=(y, grad, upscale, layout): in_one(*args),
            lambda args=(y, grad, upscale, layout): in_two_steps(*args),
        )
    for preset, (count, height, width, seen) in PRESETS.items():
        decoder: SurrogateDecoder = preset_decoder(preset).to(settings.device, dtype)
        layout = PatchLayout(8 if preset == "tiny" else 16, 2, 2, (0.5,) * 3, (0.5,) * 3, dtype)
        indices = teacher_frame_indices(decoder.temporal_stride * (count - 1) + 1, seen)
        z = torch.randn(1, decoder.latent_channels, count, height, width, device=settings.device).to(dtype)
        z.requires_grad_()
        shape = layout.rows(seen, height * decoder.spatial_stride, width * decoder.spatial_stride)
        grad = torch.randn(shape, device=settings.device).to(dtype)

        def ours(d=decoder, z=z, i=indices, grad=grad, layout=layout) -> Any:  # type: ignore[no-untyped-def]
            return torch.autograd.grad(d.decode_rows(z, layout, i).rows, z, grad)

        def stock(d=decoder, z=z, i=indices, grad=grad, layout=layout) -> Any:  # type: ignore[no-untyped-def]
            return torch.autograd.grad(layout.of(d.decode(z, i)), z, grad)

        row(f"{preset}: the decoder, {seen} frames", ours, stock)
    publish("hand_over", settings, rows)


if __name__ == "__main__":
    main()
