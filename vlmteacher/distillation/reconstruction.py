"""The loss that autoencoders and surrogate decoders learn from."""

from __future__ import annotations

import torch

from vlmteacher.microworld.world import BACKGROUND


def reconstruction_loss(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """Weighted error of `y` against `x` (B, 3, T, H, W) in [-1, 1]: objects count more than ground, the ball most."""
    background = x.new_tensor(BACKGROUND).view(1, 3, 1, 1, 1) * 2 - 1
    content = (x - background).abs().amax(1, True) > 0.1
    moving = (x - x.median(2, True).values).abs().amax(1, True) > 0.1
    weight = 1 + 3 * content + 6 * moving
    error = (y - x).abs()
    seen = error.detach()
    return (weight * (error + error**2)).mean(), {
        "l1": float(seen.mean()),
        "psnr": float(10 * torch.log10(4 / (seen**2).mean())),
        "moving_l1": float(seen[moving.expand_as(seen)].mean()),
    }
