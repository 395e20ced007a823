"""The samplers: predict x0, put noise back for the next level, predict again; or follow the ODE.

Every draw is given beforehand (`Noise`), so that the same noise means the same video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from vlmteacher.reasoners.base import Noise

Predict = Callable[[Tensor, float], Tensor]  # noisy latents and their noise level -> x0, both (B, C, T, h, w)
Velocity = Callable[[Tensor, float, float], Tensor]  # the same, the level and the next one -> v


def sample(predict: Predict, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """x0 after a prediction at each of the falling levels `sigmas`, the first of which is 1."""
    last = len(sigmas) - 1
    return predict(trajectory(predict, sigmas, noise, last), sigmas[last])


def trajectory(predict: Predict, sigmas: Sequence[float], noise: Noise, stop: int) -> Tensor:
    """The noisy latents that enter prediction number `stop` (from 0), as sampling comes to them."""
    latents = noise.z1
    for level, following, draw in zip(sigmas[:stop], sigmas[1:], noise.steps, strict=False):
        latents = (1 - following) * predict(latents, level) + following * draw
    return latents


def euler(velocity: Velocity, sigmas: Sequence[float], latents: Tensor) -> Tensor:
    """Euler steps of dx / dsigma = v over the falling levels `sigmas`, from `latents` at the first of them to 0."""
    for level, following in pairwise((*sigmas, 0.0)):
        latents = latents + (following - level) * velocity(latents, level, following)
    return latents


def relative_rms(one: Tensor, few: Tensor, known: Tensor | None) -> float:
    """RMS of the difference of two clean latents (1, C, T, h, w) over the RMS of `few`.

    0 where the one-step prediction is the few-step result; about 1.4 between unrelated latents. The known first latent
    frame, equal in both, is not counted.
    """
    first = 0 if known is None else 1
    difference, size = ((x[:, :, first:].float().square().mean().sqrt()) for x in (one - few, few))
    return float(difference / size)
