"""Decode latents by any video VAE of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# How the authors run decoders that take a timestep (Lightricks' published inference configs).
DECODE_TIMESTEP = 0.05
DECODE_NOISE = 0.025


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Decode the VAE's own latents (B, C, T, h, w), not normalised, to a video (B, 3, F, H, W), about in [-1, 1].

    A decoder with ``timestep_conditioning`` in its config does the last step of denoising: it is given noise and a
    timestep. All noise is drawn from a fixed seed, so that equal latents give equal videos.
    """
    if "timestep_conditioning" not in vae.config:
        return vae.decode(latents, return_dict=False)[0]
    device, timestep = latents.device, None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        if vae.config.timestep_conditioning:
            timestep = torch.full((len(latents),), DECODE_TIMESTEP, dtype=latents.dtype, device=device)
            latents = latents.lerp(torch.randn(latents.shape).to(latents), DECODE_NOISE)
        return vae.decode(latents, timestep, return_dict=False)[0]
