"""Rendered clips that the VAE and the surrogate decoder learn from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from vlmteacher.microworld import world


def random_clip(rng: np.random.Generator, num_frames: int, flaws: str) -> np.ndarray:
    """Draw a clip (T, H, W, 3) in [0, 1] of a right or flawed video, at times with faded or added things.

    flaws: the scheme of the flawed videos, one of `world.FLAWS`.
    """
    scene = world.sample_scene(rng, str(rng.choice(world.FAMILIES)))
    track = world.training_track(scene, flaws) if rng.random() < 0.3 else world.perform(scene)
    first = int(rng.integers(0, world.NUM_FRAMES - num_frames + 1))
    if rng.random() < 0.4:
        fade = np.interp(np.arange(world.NUM_FRAMES), np.sort(rng.uniform(0, 13, 3)), rng.uniform(0, 1, 3))
        track = [
            tuple(replace(x, alpha=float(fade[t])) if i in scene.actors else x for i, x in enumerate(things))
            for t, things in enumerate(track)
        ]
    if rng.random() < 0.3:
        other = world.sample_scene(rng, str(rng.choice(world.FAMILIES)))
        color, alpha = str(rng.choice(list(world.COLORS))), float(rng.uniform())
        more = (things[other.actors[0]] for things in world.perform(other))
        track = [(*things, replace(x, color=color, alpha=alpha)) for things, x in zip(track, more, strict=True)]
    return world.draw(track[first : first + num_frames])


def with_noise(latents: torch.Tensor, most: float, rng: np.random.Generator) -> torch.Tensor:
    """Add noise of 0 to `most` standard deviations to latents (B, ...).

    It makes a decoder robust to optimisation: one trained on encoded videos alone turns what an optimisation adds to
    latents into images.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    scale = most * latents.std() * torch.rand(len(latents), *[1] * (latents.ndim - 1), generator=generator)
    return latents + scale * torch.randn(latents.shape, generator=generator)


def to_video(frames: np.ndarray) -> torch.Tensor:
    """Frames (B, T, H, W, 3) in [0, 1] as a video (B, 3, T, H, W) in [-1, 1], the input of diffusers' VAEs."""
    return torch.from_numpy(np.ascontiguousarray(frames, dtype=np.float32)).permute(0, 4, 1, 2, 3) * 2 - 1
