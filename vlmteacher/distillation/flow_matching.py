"""What the trainings share of flow matching: x = (1 - sigma) x0 + sigma noise, v = noise - x0."""

from __future__ import annotations

import torch
from torch import Tensor


def noised(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise with one `sigma` for each sample: x0 (B, ...), sigma (B,)."""
    sigma = sigma.view(-1, *[1] * (x0.ndim - 1))
    return (1 - sigma) * x0 + sigma * noise


def counted(latents: Tensor, first_frame: Tensor | None) -> Tensor:
    """The latents that a loss may count: all but the known first latent frame."""
    return latents if first_frame is None else latents[:, :, 1:]


def flow_matching_loss(velocity: Tensor, x0: Tensor, noise: Tensor, first_frame: Tensor | None) -> Tensor:
    """Mean square of v - (noise - x0) over what counts."""
    return counted(velocity - (noise - x0), first_frame).square().mean()


def grid_levels(sigmas: tuple[float, ...], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Levels (count,) of the grid drawn evenly, and the level after each: the next of the grid, or 0 after its last."""
    levels = torch.tensor((*sigmas, 0.0))
    index = torch.randint(len(sigmas), (count,), generator=generator)
    return levels[index], levels[index + 1]
