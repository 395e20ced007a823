"""The reconstruction loss of autoencoders and surrogate decoders."""

from __future__ import annotations

import torch

from vlmteacher.microworld.world import BACKGROUND


def reconstruction_loss(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """Weighted L1 and L2 error of a reconstruction `y` of videos `x`, both (B, 3, T, H, W) in [-1, 1], and metrics.

    A pixel has a weight of 1, plus 3 where it differs from the microworld's background colour, plus 6 where it moves.
    Metrics: mean absolute error `l1`, `psnr` in dB, and `moving_l1`, which is NaN where nothing moves.
    """
    background = x.new_tensor(BACKGROUND).view(1, 3, 1, 1, 1) * 2 - 1
    content = (x - background).abs().amax(1, True) > 0.1
    moving = (x - x.median(2, True).values).abs().amax(1, True) > 0.1
    weight = 1 + 3 * content + 6 * moving
    error = (y - x).abs()
    measured = error.detach()
    return (weight * (error + error**2)).mean(), {
        "l1": float(measured.mean()),
        "psnr": float(10 * torch.log10(4 / (measured**2).mean())),
        "moving_l1": float(measured[moving.expand_as(measured)].mean()),
    }
