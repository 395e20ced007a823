from __future__ import annotations

import pytest
import torch

from tests.planning.counting import stock_count
from vlmteacher.decoders.taehv import TinyVideoDecoder
from vlmteacher.planning.decoder import decoder_cost, frames_needed, stock_decoder_cost
from vlmteacher.planning.models import build_decoder


def test_decoder_flops_of_all_frames_are_those_of_the_plain_decoder(decoder: TinyVideoDecoder) -> None:
    latents = torch.randn(1, 8, 3, 4, 6).requires_grad_()
    planned = decoder_cost(decoder, range(12), 4, 6)
    assert planned.forward == stock_count(lambda: decoder.decode_batch(latents))
    assert planned.forward + planned.backward == stock_count(lambda: decoder.decode_batch(latents).sum().backward())
    meta = build_decoder("taew2_2")
    stock = stock_decoder_cost(meta, (1, 48, 3, 4, 6), [0, 8])
    full = decoder_cost(meta, range(12), 4, 6)
    assert (stock.forward, stock.backward) == (full.forward, full.backward)
    assert full.kept < stock.kept / 16  # bits for bfloat16, and no inputs


@pytest.mark.parametrize("frames", [[0], [3], [8], [11], [3, 11]])
def test_decoder_needs_the_frames_that_have_a_gradient(decoder: TinyVideoDecoder, frames: list[int]) -> None:
    latents = torch.randn(1, 8, 3, 4, 6).requires_grad_()
    shown = [frame - 3 for frame in frames if frame >= 3]
    needed = frames_needed(decoder, frames)
    assert needed[-1] == frames
    if shown:
        (grad,) = torch.autograd.grad(decoder.decode(latents, shown).sum(), latents)
        reached = [t for t in range(3) if grad[0, :, t].abs().sum() > 0]
        assert needed[0] == reached
    assert decoder_cost(decoder, frames, 4, 6).forward < decoder_cost(decoder, range(12), 4, 6).forward
