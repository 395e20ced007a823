"""The VAE and the surrogate decoder of the recipe."""

import numpy as np
import torch

from recipes.microworld import decoder as decoder_stage
from recipes.microworld import vae as vae_stage
from recipes.microworld.clips import random_clip, to_video
from vlmteacher.microworld import world


def test_autoencoder_and_surrogate_fit_together():
    vae = vae_stage.build(8).eval()
    x = to_video(random_clip(np.random.default_rng(5), world.NUM_FRAMES, "both")[None])
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.mode()
        assert latents.shape == (1, 24, 4, 8, 8)
        torch.testing.assert_close(vae_stage.decode_unclamped(vae, latents).clamp(-1, 1), vae.decode(latents).sample)
        decoder = decoder_stage.build([16, 8, 8, 8])
        assert decoder.decode_batch(latents).shape == (1, world.NUM_FRAMES, 3, world.SIZE, world.SIZE)
