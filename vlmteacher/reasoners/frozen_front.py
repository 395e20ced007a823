"""The part of a transformer that no LoRA touches, computed once for an input that stays the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Remembered(nn.Module):
    """Stands in the place of some blocks: what they gave at the first call."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks
        self.output: Tensor | None = None

    def forward(self, hidden: Tensor, *args: Any) -> Tensor:
        if self.output is None:
            with torch.no_grad():
                for block in self.blocks:
                    hidden = block(hidden, *args)
            self.output = hidden
        return self.output


class FrozenFront:
    """Inside `with front:` the first `count` blocks of `transformer` give what they gave in the first forward there.

    For forwards with the same inputs, while nothing in these blocks, nor before them, is trained: then results and
    gradients are those of the whole network, to the bit. Outside, the transformer is as it was.
    """

    def __init__(self, transformer: Any, count: int) -> None:
        self.transformer = transformer
        self.blocks: nn.ModuleList = transformer.blocks
        self._some = nn.ModuleList([_Remembered(self.blocks[:count]), *self.blocks[count:]])

    def __enter__(self) -> None:
        self.transformer.blocks = self._some

    def __exit__(self, *_: object) -> None:
        self.transformer.blocks = self.blocks
