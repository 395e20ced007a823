"""Many-step sampling of a Reasoner: the probability-flow ODE with classifier-free guidance."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vlmteacher.errors import InputError
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.condition import Condition, Noise, with_first_frame
from vlmteacher.reasoners.sampling import euler, even_timesteps


def guided_velocity(
    reasoner: Reasoner,
    condition: Condition,
    empty: Tensor | None,
    latents: Tensor,
    sigma: float | Tensor,
    guidance: float,
    transformer: nn.Module | None = None,
) -> Tensor:
    """Predict v_empty + guidance (v - v_empty) (B, C, T, h, w) at the noise level `sigma`, a number or (B,).

    empty: (1 or B, L, D) embeddings of the empty prompt, which a guidance of 1 does not need. transformer: a network of
    the same class that runs instead of the Reasoner's own. Raises InputError for guidance without `empty`.
    """
    velocity = reasoner.velocity(condition, latents, sigma, transformer=transformer)
    if guidance == 1:
        return velocity
    if empty is None:
        raise InputError(f"a guidance of {guidance} needs the embeddings of the empty prompt")
    unprompted = replace(condition, prompt_embeds=empty.expand(len(condition.prompt_embeds), -1, -1))
    without = reasoner.velocity(unprompted, latents, sigma, transformer=transformer)
    return without.lerp(velocity, guidance)


def ode_step(
    reasoner: Reasoner,
    condition: Condition,
    empty: Tensor | None,
    latents: Tensor,
    sigma: Tensor,
    until: Tensor,
    *,
    guidance: float,
    substeps: int,
    transformer: nn.Module | None = None,
) -> Tensor:
    """Integrate dx / dsigma = v from `sigma` (B,) to `until` (B,) in `substeps` Euler steps, per sample.

    A known first latent frame is put back. Returns latents (B, C, T, h, w).
    """
    for k in range(substeps):
        here, there = (sigma.lerp(until, (k + j) / substeps) for j in (0, 1))
        velocity = guided_velocity(reasoner, condition, empty, latents, here, guidance, transformer)
        latents = latents + (there - here).view(-1, 1, 1, 1, 1) * velocity
    return with_first_frame(latents, condition.first_frame)


@torch.no_grad()
def sample_many(
    reasoner: Reasoner, condition: Condition, empty: Tensor | None, noise: Noise, *, steps: int, guidance: float
) -> Tensor:
    """Sample latents (B, C, T, h, w) from `noise.z1` by Euler steps at `steps` evenly spaced timesteps, shifted."""
    sigmas = replace(reasoner.settings, timesteps=even_timesteps(steps)).sigmas

    def velocity(latents: Tensor, sigma: float, until: float) -> Tensor:
        return guided_velocity(reasoner, condition, empty, latents, sigma, guidance)

    latents = with_first_frame(euler(velocity, sigmas, noise.z1), condition.first_frame)
    return reasoner.video(latents, condition)
