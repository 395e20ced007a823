"""The cost of the Reasoner in a step, by the activation levels of its blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vlmteacher.lora.adapter import lora_parameters
from vlmteacher.planning.costs import META, Cost, measure, per_layer, stack
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.checkpointing import Keep, block_list, blocks_name, keep_activations
from vlmteacher.reasoners.condition import Condition, Noise


def blank_instance(reasoner: Reasoner, size: tuple[int, int, int]) -> tuple[Condition, Noise]:
    """A condition and a noise on the meta device, with the images that the model takes."""
    with META:
        condition = reasoner.blank_condition(*size)
        if reasoner.settings.guided:
            condition = replace(condition, negative=condition)
        return condition, Noise(torch.empty(reasoner.latent_shape(*size)), ())


def reasoner_cost(reasoner: Any, size: tuple[int, int, int], level: Keep, depth: int) -> Cost:
    """The cost of a one-step prediction and its backward by a transformer with a LoRA, cut to `depth` blocks."""
    network = reasoner.transformer
    where, blocks = blocks_name(network), block_list(network)
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
    """The costs (base, block) of each activation level (`per_layer`), and the number of blocks."""

    levels: dict[Keep, tuple[Cost, Cost]]
    blocks: int

    @classmethod
    def of(cls, reasoner: Any, size: tuple[int, int, int], levels: Sequence[Keep] = tuple(Keep)) -> ReasonerCosts:
        """Trace the blocks of a Reasoner with a LoRA at a size of video (frames, height, width)."""
        costs = {
            level: per_layer(functools.partial(reasoner_cost, reasoner, size, level), 1)
            for level in {Keep.ALL, *levels}
        }
        return cls(costs, len(block_list(reasoner.transformer)))

    def total(self, levels: Sequence[Keep]) -> Cost:
        """The cost of the whole transformer with one level for each block."""
        return stack([self.levels[level] for level in levels], [self.levels[Keep.ALL]] * len(levels))
