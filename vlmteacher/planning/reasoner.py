"""The cost of the Reasoner in a step, by the activation levels of its blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vlmteacher.lora.adapter import lora_parameters
from vlmteacher.planning.costs import META, Cost, measure, per_layers, stack
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.checkpointing import Keep, block_lists, keep_activations, set_blocks
from vlmteacher.reasoners.condition import Condition, Noise


def blank_instance(reasoner: Reasoner, size: tuple[int, int, int]) -> tuple[Condition, Noise]:
    """A condition and a noise on the meta device, with the images that the model takes."""
    with META:
        condition = reasoner.blank_condition(*size)
        if reasoner.settings.guided:
            condition = replace(condition, negative=condition)
        return condition, Noise(torch.empty(reasoner.noise_shape(*size)), ())


def reasoner_cost(reasoner: Any, size: tuple[int, int, int], level: Keep, *depths: int) -> Cost:
    """The cost of a one-step prediction and its backward by a transformer with a LoRA.

    depths: to how many blocks each list of them is cut.
    """
    network = reasoner.transformer
    lists = block_lists(network)
    set_blocks(network, {name: blocks[:depth] for (name, blocks), depth in zip(lists.items(), depths, strict=True)})
    try:
        keep_activations(network, level)
        condition, noise = blank_instance(reasoner, size)
        return measure(lambda: [reasoner.predict_clean(condition, noise)], [network], lora_parameters(network))
    finally:
        set_blocks(network, lists)
        keep_activations(network, Keep.ALL)


@dataclass(frozen=True)
class ReasonerCosts:
    """The costs (base, block) of each activation level (`per_layer`), for each block; blocks of one list cost alike."""

    levels: list[dict[Keep, tuple[Cost, Cost]]]

    @property
    def blocks(self) -> int:
        return len(self.levels)

    @classmethod
    def of(cls, reasoner: Any, size: tuple[int, int, int], levels: Sequence[Keep] = tuple(Keep)) -> ReasonerCosts:
        """Trace the blocks of a Reasoner with a LoRA at a size of video (frames, height, width)."""
        counts = [len(blocks) for blocks in block_lists(reasoner.transformer).values()]
        costs: list[dict[Keep, tuple[Cost, Cost]]] = [{} for _ in counts]
        for level in {Keep.ALL, *levels}:
            base, blocks = per_layers(functools.partial(reasoner_cost, reasoner, size, level), len(counts), 1)
            for by_level, block in zip(costs, blocks, strict=True):
                by_level[level] = (base, block)
        return cls([by_level for by_level, count in zip(costs, counts, strict=True) for _ in range(count)])

    def total(self, levels: Sequence[Keep]) -> Cost:
        """The cost of the whole transformer with one level for each block."""
        return stack(
            [costs[level] for costs, level in zip(self.levels, levels, strict=True)],
            [costs[Keep.ALL] for costs in self.levels],
        )
