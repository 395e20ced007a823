"""The surrogate decoder's share of a step: fused by formulas, in plain torch by a trace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vlmteacher.decoders.taehv import TinyVideoDecoder
from vlmteacher.planning.costs import META, Cost, measure


def frames_needed(decoder: TinyVideoDecoder, frames: Sequence[int]) -> list[list[int]]:
    """For every layer of `decoder.decoder`, the frames of its output that `frames` of the last one's depend on.

    Frames are numbered as the layers have them: the first `temporal_stride - 1` of the last are never shown.
    """
    needed, wanted = [], set(frames)
    for layer in reversed(decoder.decoder):
        needed.append(sorted(wanted))
        name = type(layer).__name__
        if name == "MemBlock":
            wanted |= {frame - 1 for frame in wanted if frame}
        elif name == "TGrow":
            stride = layer.conv.out_channels // layer.conv.in_channels
            wanted = {frame // stride for frame in wanted}
    return needed[::-1]


def decoder_cost(decoder: TinyVideoDecoder, frames: Sequence[int], height: int, width: int) -> Cost:
    """Of the fused decoder on latents of height x width cells, for some raw `frames` (see `frames_needed`).

    Frozen weights: the backward is the products to the input. Kept: one bit per ReLU and the clamped latents. Alive at
    most: a convolution's input, its output and a residual, for all frames at once.
    """
    itemsize = decoder.decoder[1].weight.element_size()
    flops = kept = most = 0
    before = 0  # bytes of the frames that a layer reads
    for layer, needed in zip(decoder.decoder, frames_needed(decoder, frames), strict=True):
        count, cells, name = len(needed), height * width, type(layer).__name__
        if name == "MemBlock":
            convolutions = [m for m in layer.conv if isinstance(m, nn.Conv2d)]
            channels = convolutions[0].out_channels
            kept += 3 * count * cells * -(-channels // 8)
        elif name in ("Conv2d", "TGrow"):
            convolutions = [layer if name == "Conv2d" else layer.conv]
            channels = convolutions[0].out_channels
            if name == "TGrow":
                channels = convolutions[0].in_channels
        else:
            convolutions = []
            if name == "Upsample":
                height, width = height * int(layer.scale_factor), width * int(layer.scale_factor)
                continue  # a way of reading: no bytes
            channels = decoder.latent_channels if name == "SoftClamp" else channels
            if name == "ReLU":
                kept += count * cells * -(-channels // 8)
            else:
                kept += count * cells * channels * itemsize
        # a growing 1x1 convolution makes several frames of one: per frame that is needed, the weights of that frame
        flops += sum(
            2 * count * cells * c.weight[: channels if name == "TGrow" else None].numel() for c in convolutions
        )
        now = count * cells * channels * itemsize
        most = max(most, before + now * (2 if name == "MemBlock" else 1))
        before = now
    return Cost(flops, flops, 0, kept, kept + most, kept + most)


def stock_decoder_cost(decoder: TinyVideoDecoder, shape: Sequence[int], frames: Sequence[int]) -> Cost:
    """Of `decoder` in plain torch: all frames, of which some are looked at."""
    with META:
        latents = torch.empty(tuple(shape), requires_grad=True)
    return measure(lambda: [decoder.decode_batch(latents)[0][list(frames)]], [decoder], [latents])
