"""Caching of the blocks before the first trained one, for inputs that stay the same."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from vlmteacher.reasoners.checkpointing import block_list, block_lists, set_blocks


class _Remembered(nn.Module):
    """Replaces a block of the front: computes it in the first pass.

    Later, the last block returns its outputs of the same forward in the first pass. The others return their inputs,
    which nothing reads; they stay in their places, because some transformers do something between certain blocks.
    """

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__()
        self.block, self.last = block, last
        self.outputs: list[Any] = []  # of the last block: one entry per forward of a pass (guidance makes two)
        self.count: int | None = None  # of outputs, which replace the first arguments of the next block
        self.known = 0  # forwards of a pass, as the first pass had them
        self.forwards = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take the arguments of a block."""
        self.forwards += 1
        if self.known < self.forwards:
            with torch.no_grad():
                output = self.block(*args, **kwargs)
            self.known = self.forwards
            self.count = len(output) if isinstance(output, tuple) else None
            if self.last:
                self.outputs.append(output)
            return output
        if self.last:
            return self.outputs[self.forwards - 1]
        inputs = inspect.signature(self.block.forward).bind(*args, **kwargs).args
        return inputs[0] if self.count is None else inputs[: self.count]


class FrozenFront:
    """Inside `with front:` the first `count` blocks of `transformer` return their outputs of the first pass.

    A pass is one `with`. If the forwards of all passes have the same inputs, and nothing in these blocks or before them
    is trained, results and gradients are those of the whole network to the bit. Outside, the transformer is unchanged.
    """

    def __init__(self, transformer: Any, count: int) -> None:
        self.transformer, self.own = transformer, block_lists(transformer)
        blocks = block_list(transformer)
        self.front = [_Remembered(block, last=n == count) for n, block in enumerate(blocks[:count], 1)]
        self._some = {next(iter(self.own)): nn.ModuleList([*self.front, *blocks[count:]])}

    def __enter__(self) -> None:
        for block in self.front:
            block.forwards = 0
        set_blocks(self.transformer, self._some)

    def __exit__(self, *_: object) -> None:
        set_blocks(self.transformer, self.own)
