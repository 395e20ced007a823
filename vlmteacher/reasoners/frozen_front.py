"""Caching of the blocks before the first trained one, for inputs that stay the same."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from vlmteacher.reasoners.checkpointing import block_list, block_lists, set_blocks


class _Remembered(nn.Module):
    """Replaces the first blocks: returns their outputs of the same forward in the first pass."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks
        self.outputs: list[Any] = []  # one entry per forward of a pass (guidance makes two)
        self.forwards = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take the arguments of a block; the outputs of each block replace the first arguments of the next."""
        self.forwards += 1
        if len(self.outputs) < self.forwards:
            bound = inspect.signature(self.blocks[0].forward).bind(*args, **kwargs)
            args, kwargs = bound.args, bound.kwargs
            output = args[0]
            with torch.no_grad():
                for block in self.blocks:
                    output = block(*args, **kwargs)
                    several = output if isinstance(output, tuple) else (output,)
                    args = (*several, *args[len(several) :])
            self.outputs.append(output)
        return self.outputs[self.forwards - 1]


class FrozenFront:
    """Inside `with front:` the first `count` blocks of `transformer` return their outputs of the first pass.

    A pass is one `with`. If the forwards of all passes have the same inputs, and nothing in these blocks or before them
    is trained, results and gradients are those of the whole network to the bit. Outside, the transformer is unchanged.
    """

    def __init__(self, transformer: Any, count: int) -> None:
        self.transformer, self.own = transformer, block_lists(transformer)
        blocks = block_list(transformer)
        self.front = _Remembered(blocks[:count])
        self._some = {next(iter(self.own)): nn.ModuleList([self.front, *blocks[count:]])}

    def __enter__(self) -> None:
        self.front.forwards = 0
        set_blocks(self.transformer, self._some)

    def __exit__(self, *_: object) -> None:
        set_blocks(self.transformer, self.own)
