from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.planning.counting import saved_bytes, stock_count
from vlmteacher.decoders.taehv import SurrogateDecoder
from vlmteacher.ops import surrogate_decoder as operator
from vlmteacher.ops.backends import has_avx512_bf16
from vlmteacher.planning.decoder import decoder_cost, stock_decoder_cost
from vlmteacher.planning.models import build_decoder

SHAPE = (1, 8, 3, 4, 6)


@pytest.mark.parametrize("frames", [range(9), [0], [8], [2, 7], [0, 8]], ids=str)
def test_products_and_kept_bytes_are_those_of_the_real_decoder(
    decoder: SurrogateDecoder, frames: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "_fast", lambda *work: None)  # torch's convolutions, whose products torch can count
    latents = torch.randn(SHAPE, requires_grad=True)
    layers, steps = decoder.layers(), decoder.plan(SHAPE[-2:], frames).steps
    height, width = SHAPE[-2:]
    folded = 0  # torch has nine products behind an upsampling, the operator four
    for i, layer in enumerate(layers):
        height, width = height * layer.upscale, width * layer.upscale
        count = sum(len(taps) for chunk in steps for taps in chunk[i].taps)
        wide = layer.upscale == 2
        folded += wide * 2 * 5 * count * height * width * layer.channels[0] * layer.channels[1]
    assert folded
    real = stock_count(lambda: decoder.decode(latents, frames))
    both = stock_count(lambda: decoder.decode(latents, frames).sum().backward())
    saved, seen = saved_bytes(lambda: decoder.decode(latents, frames), decoder)

    planned = decoder_cost(decoder.to("meta"), SHAPE, frames)
    assert (planned.forward, planned.forward + planned.backward) == (real - folded, both - 2 * folded)
    assert saved + seen.nbytes <= planned.kept <= 1.02 * saved + seen.nbytes + latents.nbytes


@pytest.mark.skipif(not has_avx512_bf16(), reason="the C++ operator is for AVX-512")
@pytest.mark.parametrize("backward", [False, True])
def test_the_operator_has_four_products_behind_an_upsampling(backward: bool) -> None:
    weight = torch.randn(64, 3, 3, 64, dtype=torch.bfloat16)
    nine, sixteen = (torch.ops.vlmteacher_cpp.conv3x3_pack(weight, 1, up, backward).numel() for up in (1, 2))
    assert sixteen * 9 == nine * 16  # four for each of the 2x2 pixels that one becomes


def test_leaving_frames_out_and_keeping_signs_cost_less_than_stock() -> None:
    meta = build_decoder("taew2_2")
    shape = (1, 48, 3, 4, 6)
    full, some = (decoder_cost(meta, shape, frames) for frames in (range(9), [2, 7]))
    stock = stock_decoder_cost(meta, shape, [0, 8])
    assert some.forward < full.forward < stock.forward
    assert full.kept < stock.kept / 16  # bits for bfloat16, and no inputs
