"""The surrogate decoder, forward and backward to the latents, against the plain parallel module in the same dtype, which
decodes every frame and then samples K of them.

python -m benchmarks.surrogate_decoder [--json] [--preset tiny|mid] [--pairs 3]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.patchify import peak_bytes
from benchmarks.timing import argument_parser, compare, parsed, publish
from vlmteacher.decoders import TinyVideoDecoder
from vlmteacher.optimization import teacher_frame_indices
from vlmteacher.pipeline import PACKAGED_PAIR


class Preset(NamedTuple):
    """A decoder (None: the packaged one), the latents (T, h, w), how many frames the Teacher sees, the dtype."""

    config: dict[str, Any] | None
    latents: tuple[int, int, int]
    frames: int
    dtype: torch.dtype


WAN22 = {"latent_channels": 48, "patch": 2}
PRESETS = {
    "tiny": Preset(None, (4, 8, 8), 12, torch.float32),
    "mid": Preset(WAN22, (9, 24, 24), 24, torch.bfloat16),
}
PAPER = (23, 44, 80), 24  # 89 frames of 704x1280: only counted


def saved_bytes(run: Callable[[], Tensor], frozen: TinyVideoDecoder) -> int:
    """What the forward pass keeps for the backward pass, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in frozen.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def multiply_adds(config: dict[str, Any], latents: tuple[int, int, int], k: int) -> dict[str, int]:
    """Of a forward pass: the plain module's as torch counts them, ours for every frame and for the K."""
    t, height, width = latents
    with torch.device("meta"):
        decoder = TinyVideoDecoder(**config).requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            decoder.decode_batch(torch.empty(1, config["latent_channels"], *latents))
        count = decoder.temporal_stride * (t - 1) + 1
        plans = {"every_frame": list(range(count)), "wanted": teacher_frame_indices(count, k)}
        ours = {
            name: decoder.plan((height, width), wanted).multiply_adds(decoder.layers(), height, width)
            for name, wanted in plans.items()
        }
    return {"plain": counter.get_total_flops() // 2} | ours


def measure(name: str, device: str, pairs: int) -> dict[str, Any]:
    config, latents, k, dtype = PRESETS[name]
    torch.manual_seed(0)
    if config is None:
        decoder = TinyVideoDecoder.from_checkpoint(PACKAGED_PAIR / "decoder.safetensors", dtype)
    else:
        decoder = TinyVideoDecoder(**config).to(dtype).requires_grad_(False)
        decoder.decoder[22].bias.fill_(0.5)  # the middle of the range: gradients pass the clamp
    decoder.to(device)
    z = torch.randn(1, decoder.latent_channels, *latents, device=device).to(dtype).requires_grad_()
    indices = teacher_frame_indices(decoder.temporal_stride * (latents[0] - 1) + 1, k)

    def ours() -> Tensor:
        return decoder.decode(z, indices)

    def plain() -> Tensor:
        return decoder.decode_batch(z)[0][indices]

    grad = torch.randn_like(ours())

    def both(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(forward(), z, grad)[0]

    _, _, height, width = ours().shape
    case = f"{name}: {k} of {decoder.temporal_stride * (latents[0] - 1) + 1} frames of {width}x{height}"
    row = compare(f"{case}, {str(dtype)[6:]}", both(ours), both(plain), pairs, device)
    row["saved_ratio"] = saved_bytes(ours, decoder) / saved_bytes(plain, decoder)
    if device == "cpu":
        row["memory_ratio"] = peak_bytes(both(ours)) / peak_bytes(both(plain))
    row["multiply_adds"] = multiply_adds(decoder.config, latents, k)
    return row


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--preset", choices=PRESETS, action="append", help="default: all of them")
    parser.set_defaults(pairs=3)
    settings = parsed(parser)
    rows = [measure(name, settings.device, settings.pairs) for name in settings.preset or PRESETS]
    settings.dtype = "each preset's"
    paper = multiply_adds(WAN22, *PAPER)
    for label, counted in [(row["case"], row["multiply_adds"]) for row in rows] + [("24 of 89 frames, 1280x704", paper)]:
        plain, every, wanted = (counted[key] / 1e9 for key in ("plain", "every_frame", "wanted"))
        print(
            f"{label}: {plain:.1f} G multiply-adds in the plain decoder; ours {every:.1f} for every frame,"
            f" {wanted:.1f} ({wanted / plain:.0%} of the plain, {wanted / every:.0%} of ours) for those wanted"
        )
    for row in rows:
        memory = f", peak memory {row['memory_ratio']:.1%}" if "memory_ratio" in row else ""
        print(f"{row['case']}: saved for the backward pass {row['saved_ratio']:.2%}{memory} of the plain decoder's")
    publish("surrogate_decoder", settings, rows)


if __name__ == "__main__":
    main()
