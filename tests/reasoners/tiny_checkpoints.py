"""Random-weight checkpoints of every supported family, in the layout that its pipeline has on the hub.

One function for each family: it saves the family's own diffusers pipeline class by ``save_pretrained`` and returns the
directory. As on the hub there is no reasoner.json. All take 5 frames of `HEIGHT` x `WIDTH` pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny_models import tiny_tokenizer

FRAMES, HEIGHT, WIDTH = 5, 32, 48
SIZE = (FRAMES, HEIGHT, WIDTH)
TEXT_DIM, IMAGE_DIM, LATENTS = 32, 16, 8


def wan21_t2v(path: Path) -> Path:
    """As Wan-AI/Wan2.1-T2V-1.3B-Diffusers: a text-only model, UniPC."""
    return _wan(path, "WanPipeline", _wan_transformer(LATENTS))


def wan21_i2v(path: Path) -> Path:
    """As Wan-AI/Wan2.1-I2V-14B-480P-Diffusers: image latents and mask as channels, CLIP's image features."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        image_encoder = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=IMAGE_DIM,
                intermediate_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            )
        )
    return _wan(
        path,
        "WanImageToVideoPipeline",
        _wan_transformer(2 * LATENTS + 4, image_dim=IMAGE_DIM, added_kv_proj_dim=2 * 16),
        image_encoder=image_encoder,
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    )


def wan22_ti2v(path: Path) -> Path:
    """As Wan-AI/Wan2.2-TI2V-5B-Diffusers: a timestep for each token, the residual VAE with patches."""
    return _wan(path, "WanPipeline", _wan_transformer(LATENTS), vae=_wan_vae(residual=True), expand_timesteps=True)


def wan22_t2v_a14b(path: Path) -> Path:
    """As Wan-AI/Wan2.2-T2V-A14B-Diffusers: two experts."""
    experts = (_wan_transformer(LATENTS, seed=seed) for seed in (1, 2))
    return _wan(path, "WanPipeline", *experts, boundary_ratio=0.875)


def wan22_i2v_a14b(path: Path) -> Path:
    """As Wan-AI/Wan2.2-I2V-A14B-Diffusers: two experts that take the image as channels only."""
    experts = (_wan_transformer(2 * LATENTS + 4, seed=seed) for seed in (1, 2))
    return _wan(path, "WanImageToVideoPipeline", *experts, boundary_ratio=0.9)


def _wan_transformer(in_channels: int, seed: int = 1, **config: Any) -> Any:
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=in_channels,
            out_channels=LATENTS,
            text_dim=TEXT_DIM,
            freq_dim=32,
            ffn_dim=64,
            num_layers=2,
            **config,
        )


def _wan_vae(residual: bool = False) -> Any:
    """Strides of 4 in time and 8 in space: Wan 2.1's by three halvings, Wan 2.2's by two and patches of 2."""
    from diffusers import AutoencoderKLWan

    halvings = [True, True] if residual else [False, True, True]
    channels = 12 if residual else 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return AutoencoderKLWan(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=LATENTS,
            dim_mult=[1, 2, 2, 2][: len(halvings) + 1],
            num_res_blocks=1,
            temperal_downsample=halvings,
            is_residual=residual,
            in_channels=channels,
            out_channels=channels,
            patch_size=2 if residual else None,
            scale_factor_spatial=8,
            scale_factor_temporal=4,
            latents_mean=[0.05 * i for i in range(LATENTS)],
            latents_std=[1 + 0.1 * i for i in range(LATENTS)],
        )


def _wan(path: Path, kind: str, transformer: Any, transformer_2: Any = None, vae: Any = None, **parts: Any) -> Path:
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        )
    getattr(diffusers, kind)(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        transformer_2=transformer_2,
        vae=vae or _wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        **parts,
    ).save_pretrained(path)
    return Path(path)
