"""The Reasoner's share of a step, by what its blocks keep."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmteacher.lora.adapter import lora_parameters
from vlmteacher.planning.costs import META, Cost, measure, per_layer, stack
from vlmteacher.reasoners.base import Condition, Noise
from vlmteacher.reasoners.checkpointing import Keep, blocks_name, keep_activations
from vlmteacher.reasoners.hunyuan_video15 import HunyuanVideo15Reasoner
from vlmteacher.reasoners.ltx import LTXReasoner

CLIP_TOKENS = 257  # ViT-H/14 at 224 pixels, with the class token
HUNYUAN_IMAGE_TOKENS = 729  # SigLIP so400m/14 at 384 pixels
HUNYUAN_GLYPHS = 256  # ByT5's: the most that quoted words may take


def blank_instance(reasoner: Any, size: tuple[int, int, int]) -> tuple[Condition, Noise]:
    """What `encode` and `noise` make, on the meta device: with an image where the model takes one, all tokens used."""
    _, channels, frames, h, w = shape = reasoner.latent_shape(*size)
    config, length, dtype = reasoner.transformer.config, reasoner.settings.max_sequence_length, reasoner.dtype

    def text(count: int, width: int) -> tuple[Tensor, Tensor]:
        return torch.empty(1, count, width, dtype=dtype), torch.ones(1, count, dtype=torch.bool)

    with META:
        inputs = {}
        if isinstance(reasoner, LTXReasoner):
            embeds, inputs["encoder_attention_mask"] = text(length, config.caption_channels)
        elif isinstance(reasoner, HunyuanVideo15Reasoner):
            embeds, inputs["encoder_attention_mask"] = text(length, config.text_embed_dim)
            glyphs = text(HUNYUAN_GLYPHS, config.text_embed_2_dim)
            inputs["encoder_hidden_states_2"], inputs["encoder_attention_mask_2"] = glyphs
            inputs["image_embeds"], _ = text(HUNYUAN_IMAGE_TOKENS, config.image_embed_dim)
            inputs["known_latents"] = torch.empty(1, channels + 1, frames, h, w, dtype=dtype)
        else:
            embeds, _ = text(length, config.text_dim)
            if reasoner.image_channels:
                inputs["image_latents"] = torch.empty(1, config.in_channels - channels, frames, h, w)
            if config.image_dim is not None:
                inputs["encoder_hidden_states_image"], _ = text(CLIP_TOKENS, config.image_dim)
        first_as_latents = reasoner.image_conditioning and not isinstance(reasoner, HunyuanVideo15Reasoner)
        first = torch.empty(1, channels, 1, h, w) if first_as_latents else None
        condition = Condition(embeds, first, *size, inputs)
        if reasoner.settings.guided:
            condition = replace(condition, negative=condition)
        return condition, Noise(torch.empty(shape), ())


def reasoner_cost(reasoner: Any, size: tuple[int, int, int], level: Keep, depth: int) -> Cost:
    """Of a forward and backward through `reasoner.transformer`, cut to `depth` blocks; it has its LoRA."""
    network = reasoner.transformer
    where = blocks_name(network)
    blocks = getattr(network, where)
    setattr(network, where, blocks[:depth])
    try:
        keep_activations(network, level)
        condition, noise = blank_instance(reasoner, size)
        return measure(lambda: [reasoner.predict_clean(condition, noise)], [network], lora_parameters(network))
    finally:
        setattr(network, where, blocks)
        keep_activations(network, Keep.ALL)


@dataclass(frozen=True)
class ReasonerCosts:
    """(base, block) of each level, see `per_layer`, and the number of blocks."""

    levels: dict[Keep, tuple[Cost, Cost]]
    blocks: int

    @classmethod
    def of(cls, reasoner: Any, size: tuple[int, int, int], levels: Sequence[Keep] = tuple(Keep)) -> ReasonerCosts:
        found = {
            level: per_layer(functools.partial(reasoner_cost, reasoner, size, level), 1)
            for level in {Keep.ALL, *levels}
        }
        return cls(found, reasoner.transformer.config.num_layers)

    def total(self, levels: Sequence[Keep]) -> Cost:
        """Of the whole transformer, one level for each block."""
        return stack([self.levels[level] for level in levels], [self.levels[Keep.ALL]] * len(levels))
