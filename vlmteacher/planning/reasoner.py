"""The Reasoner's share of a step, by what its blocks keep."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmteacher.lora import lora_parameters
from vlmteacher.planning.costs import META, Cost, measure, per_layer, stack
from vlmteacher.reasoners.base import Condition, Noise
from vlmteacher.reasoners.checkpointing import Keep, keep_activations


def reasoner_cost(reasoner: Any, size: tuple[int, int, int], level: Keep, depth: int) -> Cost:
    """Of a forward and backward through `reasoner.transformer`, cut to `depth` blocks; it has its LoRA."""
    network = reasoner.transformer
    blocks = network.blocks
    network.blocks = blocks[:depth]
    try:
        keep_activations(network, level)
        _, channels, _, h, w = shape = reasoner.latent_shape(*size)
        with META:
            text = torch.empty(1, reasoner.settings.max_sequence_length, network.config.text_dim, dtype=reasoner.dtype)
            first = torch.empty(1, channels, 1, h, w) if reasoner.image_conditioning else None
            noise = Noise(torch.empty(shape), ())
        condition = Condition(text, first, *size)
        return measure(lambda: [reasoner.predict_clean(condition, noise)], [network], lora_parameters(network))
    finally:
        network.blocks = blocks
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
