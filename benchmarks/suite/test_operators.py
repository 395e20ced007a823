"""Preprocessing and surrogate decoder, forward + backward, ours and the plain expression; see README.md here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.patchify import MEAN, SIZES, STD
from benchmarks.surrogate_decoder import PRESETS, preset_decoder
from vlmteacher.ops.patchify import patchify, patchify_reference
from vlmteacher.optimization.objective import teacher_frame_indices


@pytest.mark.parametrize("which", ["ours", "plain"])
@pytest.mark.parametrize("shape", [SIZES[0], SIZES[3]], ids=["cut", "resize"])
def test_patchify(benchmark: Any, shape: Any, which: str) -> None:
    count, height, width, patch, size = shape
    frames = torch.rand(count, 3, height, width, requires_grad=True)
    function = patchify if which == "ours" else patchify_reference
    grad = torch.randn_like(function(frames.detach(), patch, 2, 2, MEAN, STD, size))
    benchmark.group = f"patchify, {count}x{height}x{width}"
    benchmark(lambda: torch.autograd.grad(function(frames, patch, 2, 2, MEAN, STD, size), frames, grad))


@pytest.mark.parametrize("which", ["ours", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_surrogate_decoder(benchmark: Any, dtype: torch.dtype, which: str) -> None:
    frames, height, width, seen = PRESETS["tiny"]
    decoder = preset_decoder("tiny").to(dtype)
    indices = teacher_frame_indices(decoder.temporal_stride * (frames - 1) + 1, seen)
    latents = torch.randn(1, decoder.latent_channels, frames, height, width, dtype=dtype, requires_grad=True)
    stride = decoder.spatial_stride
    grad = torch.randn(seen, 3, stride * height, stride * width, dtype=dtype)
    decode = {"ours": decoder.decode, "plain": lambda z, indices: decoder.decode_batch(z)[0][indices]}[which]
    benchmark.group = f"surrogate decoder, {dtype}"
    benchmark(lambda: torch.autograd.grad(decode(latents, indices), latents, grad))
