"""The tokens of this rank where several GPUs share those of a video (see `context_parallel.py`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def own_tokens(network: Any, x: Tensor, dim: int) -> Tensor:
    """The tokens of this rank, of all tokens of x along `dim`, where `network` shares them."""
    ranks = _config(network)
    return x if ranks is None else x.chunk(ranks._world_size, dim)[ranks._rank]


def own_count(network: Any, first: int, tokens: int) -> int:
    """How many of the first `first` of all `tokens` are this rank's, where `network` shares them."""
    ranks = _config(network)
    if ranks is None:
        return first
    own = tokens // ranks._world_size
    return min(max(first - ranks._rank * own, 0), own)


def exchange(processor: Any, x: Tensor, *, back: bool = False) -> Tensor:
    """From (B, N / ranks, H, d) to (B, N, H / ranks, d), all tokens of the rank's heads; `back`: the reverse."""
    from diffusers.models.attention_dispatch import SeqAllToAllDim

    group = processor._parallel_config.context_parallel_config._ulysses_mesh.get_group()
    exchanged: Tensor = SeqAllToAllDim.apply(group, x, *((1, 2) if back else (2, 1)))
    return exchanged


def _config(network: Any) -> Any:
    return network._parallel_config and network._parallel_config.context_parallel_config
