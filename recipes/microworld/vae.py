"""Stage ``vae``: a tiny ``AutoencoderKLWan`` of the Wan 2.2 kind (residual, patch 2; 4x in time, 8x in space)."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from recipes.microworld.clips import random_clip, to_video, with_noise
from recipes.microworld.training import Run, adopt, in_bfloat16, train
from vlmteacher.checkpoints.pretrained import load_network
from vlmteacher.distillation.reconstruction import reconstruction_loss
from vlmteacher.microworld import world

Z_DIM = 24


def build(base_dim: int, z_dim: int = Z_DIM) -> AutoencoderKLWan:
    """An untrained VAE; `base_dim` is its width and `z_dim` its number of latent channels."""
    return AutoencoderKLWan(
        base_dim=base_dim,
        decoder_base_dim=base_dim,
        z_dim=z_dim,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
    )


def decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents (B, C, T, h, w) without the VAE's final clamp, which has no gradient outside [-1, 1]."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    chunks = []
    for t in range(latents.shape[2]):
        vae._conv_idx = [0]
        chunks.append(
            vae.decoder(hidden[:, :, t : t + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=t == 0)
        )
    vae.clear_cache()
    return unpatchify(torch.cat(chunks, 2), patch_size=2)


def crop(clip: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """A window of `size` pixels of a clip (T, H, W, 3): of three random ones that with the most contrast."""
    best, most = clip[:, :size, :size], -1.0
    for _ in range(3):
        x, y = rng.integers(0, world.SIZE - size + 1, 2)
        window = clip[:, y : y + size, x : x + size]
        content = float(window.std())
        if content > most:
            best, most = window, content
    return best


def refine_decoder(run: Run) -> None:
    """Stage ``vae-decoder``: train the VAE's decoder further; its encoder, and so the latents, stay as they are."""
    config = run.config
    torch.manual_seed(config["seed"])
    vae = load_network(AutoencoderKLWan, run.path("vae/vae"), dtype=torch.float32).requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)

    def step(index: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        x = to_video(np.stack([random_clip(rng, world.NUM_FRAMES, config["flaws"]) for _ in range(config["batch"])]))
        with in_bfloat16():
            with torch.no_grad():
                latents = vae.encode(x).latent_dist.mode()
            y = decode_unclamped(vae, with_noise(latents, config["latent_noise"], rng))
        return reconstruction_loss(x, y.float())

    modules = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    train(modules, step, run, ema=0.99)
    vae.save_pretrained(run.out / "vae")


def train_vae(run: Run) -> None:
    """Stage ``vae``, from scratch or from the weights of the VAE in the directory ``run.start``."""
    config = run.config
    torch.manual_seed(config["seed"])
    vae = build(config["base_dim"])
    if run.start:
        adopt(vae, load_network(AutoencoderKLWan, run.start, dtype=torch.float32))

    def step(index: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        full = index >= config["steps"] * config["crop_share"]
        num_frames = (5, 5, 9, 13)[index % 4]
        batch = config["batch"] * (4 if not full else 1) * 5 // num_frames
        clips = [random_clip(rng, num_frames, config["flaws"]) for _ in range(batch)]
        if not full:
            clips = [crop(c, rng, 32) for c in clips]
        x = to_video(np.stack(clips))
        torch.manual_seed(int(rng.integers(2**31)))
        with in_bfloat16():
            posterior = vae.encode(x).latent_dist
            y = decode_unclamped(vae, posterior.sample())
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        loss, report = reconstruction_loss(x, y.float())
        return loss + config["kl_weight"] * kl, report | {"kl": float(kl.detach())}

    train({"vae": vae}, step, run)

    vae.eval()
    with torch.no_grad():
        rng = np.random.default_rng(config["seed"] + 1)
        latents = []
        for _ in range(16):
            chosen = rng.choice(world.FAMILIES, 16)
            x = to_video(np.stack([world.render(world.sample_scene(rng, str(family))) for family in chosen]))
            latents.append(vae.encode(x).latent_dist.mode())
        stack = torch.cat(latents).transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=stack.mean(1).tolist(), latents_std=stack.std(1).tolist())
    vae.save_pretrained(run.out / "vae")
