"""The surrogate decoder, forward + backward for the frames that the Teacher sees, against the plain torch decoder that
decodes all frames at once and samples.

python -m benchmarks.surrogate_decoder [--json] [--preset tiny|mid] [--channels-last]
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.memory import saved_bytes
from benchmarks.patchify import peak_bytes
from benchmarks.timing import argument_parser, compare, parsed, publish
from vlmteacher.decoders import SurrogateDecoder
from vlmteacher.optimization.frames import teacher_frame_indices
from vlmteacher.pipeline import PACKAGED_PAIR

PRESETS = {  # latent frames, h, w, frames that the Teacher sees
    "tiny": (4, 8, 8, 12),  # the packaged pair: 13 frames of 64x64
    "mid": (9, 24, 24, 24),  # Wan 2.2's decoder at full width: 33 frames of 384x384
}


def preset_decoder(preset: str) -> SurrogateDecoder:
    if preset == "tiny":
        return SurrogateDecoder.from_checkpoint(PACKAGED_PAIR / "decoder.safetensors")
    decoder = SurrogateDecoder(48, patch=2)
    with torch.no_grad():  # as trained ones do, it gives frames within the range, where the clamp passes gradients
        decoder.decoder[22].bias.fill_(0.5)
    return decoder.eval().requires_grad_(False)


def table_multiply_adds(decoder: SurrogateDecoder, frames: int, height: int, width: int) -> int:
    """Of the published layers one by one, on all frames."""
    total, pixels = 0, frames * height * width
    for layer in decoder.decoder.modules():
        if isinstance(layer, torch.nn.Upsample):
            pixels *= int(layer.scale_factor) ** 2
        if isinstance(layer, torch.nn.Conv2d):
            total += pixels * layer.weight.numel()
            if layer.kernel_size == (1, 1):  # TGrow
                pixels *= layer.out_channels // layer.in_channels
    return total


def processor_seconds(function: Callable[[], object]) -> float:
    """Of all threads; on a busy machine steadier than the clock on the wall."""
    start = time.process_time()
    function()
    return time.process_time() - start


def suite_case(dtype: torch.dtype, side: str) -> Callable[[], object]:
    """Forward + backward of the packaged decoder for the Teacher's frames, by the operator or the plain modules."""
    frames, height, width, count = PRESETS["tiny"]
    decoder = preset_decoder("tiny").to(dtype)
    indices = teacher_frame_indices(decoder.temporal_stride * (frames - 1) + 1, count)
    latents = torch.randn(1, decoder.latent_channels, frames, height, width, dtype=dtype, requires_grad=True)
    stride = decoder.spatial_stride
    grad = torch.randn(count, 3, stride * height, stride * width, dtype=dtype)
    if side == "ours":
        return lambda: torch.autograd.grad(decoder.decode(latents, indices), latents, grad)
    return lambda: torch.autograd.grad(decoder.decode_batch(latents)[0][indices], latents, grad)


SUITE = {name: functools.partial(suite_case, getattr(torch, name)) for name in ("float32", "bfloat16")}


def main() -> None:
    parser = argument_parser(__doc__ or "", "bfloat16")
    parser.add_argument("--preset", choices=PRESETS, action="append", help="only this one (default: all)")
    parser.add_argument(
        "--channels-last", action="store_true", help="time the plain decoder in torch's channels-last format too"
    )
    parser.set_defaults(pairs=5)
    settings = parsed(parser)
    dtype = getattr(torch, settings.dtype)
    rows = []
    for preset in settings.preset or PRESETS:
        torch.manual_seed(0)
        frames, height, width, seen = PRESETS[preset]
        decoder = preset_decoder(preset).to(settings.device, dtype)
        indices = teacher_frame_indices(decoder.temporal_stride * (frames - 1) + 1, seen)
        z = torch.randn(1, decoder.latent_channels, frames, height, width, device=settings.device).to(dtype)
        z.requires_grad_()
        sides = height * decoder.spatial_stride, width * decoder.spatial_stride
        grad = torch.randn(len(indices), 3, *sides, device=settings.device).to(dtype)

        def ours(decoder: SurrogateDecoder = decoder, z: Tensor = z, indices: list[int] = indices) -> Tensor:
            return decoder.decode(z, indices)

        def plain(decoder: SurrogateDecoder = decoder, z: Tensor = z, indices: list[int] = indices) -> Tensor:
            return decoder.decode_batch(z)[0][indices]

        def both(function, z: Tensor = z, grad: Tensor = grad):  # type: ignore[no-untyped-def]
            return lambda: torch.autograd.grad(function(), z, grad)

        case = f"{preset}: {len(indices)} of {frames * 4 - 3} frames, {sides[1]}x{sides[0]}"
        row = compare(case, both(ours), both(plain), settings.pairs, settings.device)
        row["cpu_time_speedup"] = processor_seconds(both(plain)) / processor_seconds(both(ours))
        row["memory_ratio"] = peak_bytes(both(ours)) / peak_bytes(both(plain))
        weights = list(decoder.parameters())
        row["saved_ratio"] = saved_bytes(ours, weights)[0] / saved_bytes(plain, weights)[0]
        layers = decoder.layers()
        some = decoder.plan((height, width), indices).multiply_adds(layers, height, width)
        full = decoder.plan((height, width), range(decoder.temporal_stride * (frames - 1) + 1))
        table = table_multiply_adds(decoder, frames, height, width)
        row["multiply_adds"], row["multiply_adds_ratio"] = some, some / table
        row["gflops"] = 4e-9 * some / (1e-3 * row["ours_ms"])
        print(
            f"  {preset}: forward {some / 1e9:.2f} G multiply-adds, all frames"
            f" {full.multiply_adds(layers, height, width) / 1e9:.2f}, the plain decoder {table / 1e9:.2f} (ours"
            f" {row['multiply_adds_ratio']:.2f}); keeps {row['saved_ratio']:.3f} of its bytes, peak"
            f" {row['memory_ratio']:.3f}; {row['gflops']:.0f} GFLOP/s;"
            f" {row['cpu_time_speedup']:.2f} times the plain decoder in processor time"
        )
        if settings.channels_last:
            decoder.to(memory_format=torch.channels_last)
            row["vs_best_stock"] = compare(case, both(ours), both(plain), settings.pairs, settings.device)["speedup"]
            print(f"  {preset}: {row['vs_best_stock']:.2f} against channels-last weights")
        rows.append(row)
    wan, wanted = preset_decoder("mid"), teacher_frame_indices(89, 24)
    work = wan.plan((44, 80), wanted).multiply_adds(wan.layers(), 44, 80) / table_multiply_adds(wan, 23, 44, 80)
    print(f"  24 of 89 frames at 704x1280: {work:.2f} of the plain decoder's multiply-adds")
    publish("surrogate_decoder", settings, rows)


if __name__ == "__main__":
    main()
