"""Flow matching: x = (1 - sigma) x0 + sigma noise, v = noise - x0."""

from __future__ import annotations

import torch
from torch import Tensor


def noised(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise for x0 and noise (B, ...), with one sigma for each sample, (B,)."""
    sigma = sigma.view(-1, *[1] * (x0.ndim - 1))
    return (1 - sigma) * x0 + sigma * noise


def counted(latents: Tensor, first_frame: Tensor | None) -> Tensor:
    """The latents (B, C, T, h, w) that a loss is taken over: without the first frame where that is given."""
    return latents if first_frame is None else latents[:, :, 1:]


def flow_matching_loss(velocity: Tensor, x0: Tensor, noise: Tensor, first_frame: Tensor | None) -> Tensor:
    """Mean square of v - (noise - x0), without the first frame where that is given."""
    return counted(velocity - (noise - x0), first_frame).square().mean()


def grid_levels(sigmas: tuple[float, ...], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise levels (count,) drawn uniformly from the grid, and the level after each: the next one, 0 after the last."""
    levels = torch.tensor((*sigmas, 0.0))
    index = torch.randint(len(sigmas), (count,), generator=generator)
    return levels[index], levels[index + 1]
