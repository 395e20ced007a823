"""Stage ``decoder``: the surrogate decoder, a narrow TAEHV, from the VAE's latents to pixels."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from recipes.microworld.clips import random_clip, to_video, with_noise
from recipes.microworld.training import Run, adopt, in_bfloat16, train
from vlmteacher.checkpoints.pretrained import load_network
from vlmteacher.decoders.taehv import SurrogateDecoder
from vlmteacher.distillation.reconstruction import reconstruction_loss
from vlmteacher.microworld import world


def build(widths: list[int], latent_channels: int = 24) -> SurrogateDecoder:
    """An untrained decoder of the Wan 2.2 layout (patch 2) with one spatial doubling less: 8x in space, 4x in time."""
    return SurrogateDecoder(latent_channels, widths, patch=2, space_upscale=(True, True, False))


def train_decoder(run: Run) -> None:
    """Stage ``decoder``, from scratch or from the weights of the surrogate decoder in the file ``run.start``."""
    config = run.config
    torch.manual_seed(config["seed"])
    vae = load_network(AutoencoderKLWan, run.path("vae/vae"), dtype=torch.float32).eval().requires_grad_(False)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    decoder = build(config["widths"], vae.config.z_dim)
    if run.start:
        adopt(decoder, SurrogateDecoder.from_checkpoint(run.start).float())

    def step(index: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        clips = [random_clip(rng, world.NUM_FRAMES, config["flaws"]) for _ in range(config["batch"])]
        x = to_video(np.stack(clips))
        with in_bfloat16():
            with torch.no_grad():
                latents = (vae.encode(x).latent_dist.mode().float() - mean) / std
            y = decoder.decode_batch(with_noise(latents, config["latent_noise"], rng), clamp=False)
        return reconstruction_loss(x, y.float().transpose(1, 2) * 2 - 1)

    train({"decoder": decoder}, step, run, ema=0.99)
    decoder.save(run.out / "decoder.safetensors")
