"""The bytes that the surrogate decoder moves between memory and processor, and keeps, calculated.

    python -m benchmarks.decoder_traffic [--latents 23 44 80] [--frames 24]

The plain module is counted operator by operator, as torch runs it on tensors without data: every operator reads its
inputs once and writes its output once. Ours is the sum over the plan: each convolution reads the frames that it sees,
its weights and the residual once, and writes its output and signs; the copies between them are counted too.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.traffic import WIDE, Count
from vlmteacher.decoders import SurrogateDecoder
from vlmteacher.optimization.frames import teacher_frame_indices


@dataclass
class Bytes:
    forward: float = 0
    backward: float = 0
    kept: float = 0


def plain(decoder: SurrogateDecoder, latents: tuple[int, int, int], indices: list[int]) -> Bytes:
    """Of the module that decodes every frame and then samples."""
    weights = {t.untyped_storage()._cdata for t in decoder.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in weights:
            kept[t.untyped_storage()._cdata] = t  # addresses of tensors without data are all 0
        return t

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        z = torch.empty(1, decoder.latent_channels, *latents, dtype=torch.bfloat16, requires_grad=True)
        with Count() as forward:
            frames = decoder.decode_batch(z)[0][indices]
        with Count() as backward:
            torch.autograd.grad(frames, z, torch.empty_like(frames))
    return Bytes(forward.bytes, backward.bytes, sum(t.untyped_storage().nbytes() for t in kept.values()))


def ours(decoder: SurrogateDecoder, latents: tuple[int, int, int], indices: list[int]) -> Bytes:
    """Of the plan, in chunks as the decoder chooses them."""
    _, height, width = latents
    layers, plan, total = decoder.layers(), decoder.plan((height, width), indices), Bytes()
    for first, steps in zip(plan.first, plan.steps, strict=True):
        size, fresh = height * width, len(first)
        for layer, step in zip(layers, steps, strict=True):
            channels, n = layer.channels
            frame, out = WIDE * size * channels, WIDE * size * layer.upscale**2 * n
            signs = 0 if layer.slope is None else size * layer.upscale**2 * ((n + 7) // 8)
            used = [taps for taps in step.taps if len(taps)]
            if step.carry:  # the bank is put together, and its gradient taken apart
                total.forward += 2 * frame * (fresh + 1)
                total.backward += 2 * frame
            for taps in used:
                seen, count = int((taps >= 0).sum()), len(taps)
                weights = WIDE * layer.weights[0].numel()
                residual = count * out if layer.residual is not None else 0
                total.forward += seen * frame + weights + residual + count * (out + signs)
                total.backward += seen * (out + signs) + weights + (fresh + step.carry) * frame
                total.backward += residual + count * signs if residual else 0
                total.kept += count * signs
            fresh = sum(map(len, used))
            if len(used) > 1:  # the frames of both are put together; their gradients are added up
                total.forward += 2 * fresh * out
                total.backward += 3 * (len(step.taps[0]) + step.carry) * frame
            size *= layer.upscale**2
        pixels = size * layers[-1].channels[1] * fresh
        total.forward += pixels * (2 * WIDE + 1 / 8)  # pixel shuffle, clamp and its bits, to frames or to patch rows
        total.backward += pixels * (2 * WIDE + 1 / 8)
        total.kept += pixels / 8
    return total


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoder_traffic", description=__doc__)
    parser.add_argument("--latents", type=int, nargs=3, default=(23, 44, 80), metavar=("T", "H", "W"))
    parser.add_argument("--frames", type=int, default=24, help="that the Teacher sees")
    settings = parser.parse_args()
    latents = tuple(settings.latents)
    with torch.device("meta"):
        decoder = SurrogateDecoder(48, patch=2).bfloat16().requires_grad_(False)
    indices = teacher_frame_indices(decoder.temporal_stride * (latents[0] - 1) + 1, settings.frames)
    rows = {
        "plain, all frames, then sampled": plain(decoder, latents, indices),
        "ours, all frames": ours(decoder, latents, list(range(indices[-1] + 1))),
        "ours, those wanted": ours(decoder, latents, indices),
    }
    print(f"GB, taew2_2 in bfloat16, latents {latents}, {len(indices)} of {indices[-1] + 1} frames")
    print(f"  {'':34}{'forward':>9}{'backward':>9}{'kept':>8}")
    for name, row in rows.items():
        print(f"  {name:34}{row.forward / 1e9:9.1f}{row.backward / 1e9:9.1f}{row.kept / 1e9:8.2f}")


if __name__ == "__main__":
    main()
