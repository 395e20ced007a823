"""The cost of the surrogate decoder in a step, by our operator and in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmteacher.decoders.taehv import SurrogateDecoder
from vlmteacher.planning.costs import META, Cost, measure


def decoder_cost(decoder: SurrogateDecoder, shape: Sequence[int], frames: Sequence[int]) -> Cost:
    """The cost of decoding `frames` of latents of `shape` (1, C, T, h, w) by our operator, on the meta device."""
    decoder.layers()  # folded once, not at every step
    latents = _latents(shape)
    return measure(lambda: [decoder.decode(latents, frames)], [decoder], [latents])


def stock_decoder_cost(decoder: SurrogateDecoder, shape: Sequence[int], frames: Sequence[int]) -> Cost:
    """The same in plain torch, which decodes all frames and selects some."""
    latents = _latents(shape)
    return measure(lambda: [decoder.decode_batch(latents)[0][list(frames)]], [decoder], [latents])


def _latents(shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), requires_grad=True, device=META)
