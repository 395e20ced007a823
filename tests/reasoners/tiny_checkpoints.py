"""Random-weight checkpoints of every supported family, in the layout that its pipeline has on the hub.

One function for each family: it saves the family's own diffusers pipeline class by ``save_pretrained`` and returns the
directory. As on the hub there is no reasoner.json. All take 5 frames of `HEIGHT` x `WIDTH` pixels.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.tiny_models import tiny_tokenizer

FRAMES, HEIGHT, WIDTH = 5, 32, 48
SIZE = (FRAMES, HEIGHT, WIDTH)
TEXT_DIM, IMAGE_DIM, LATENTS = 32, 16, 8


def changed(directory: Path, copy: Path, file: str, **entries: Any) -> Path:
    """A copy of a checkpoint with other entries in one of its json files."""
    shutil.copytree(directory, copy)
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return copy


def wan21_t2v(path: Path) -> Path:
    """As Wan-AI/Wan2.1-T2V-1.3B-Diffusers: a text-only model, UniPC."""
    return _wan(path, "WanPipeline", _wan_transformer(LATENTS))


def wan21_i2v(path: Path) -> Path:
    """As Wan-AI/Wan2.1-I2V-14B-480P-Diffusers: image latents and mask as channels, CLIP's image features."""
    return _wan(path, "WanImageToVideoPipeline", _wan_transformer(2 * LATENTS + 4, **WITH_CLIP), **_clip())


def wan21_flf2v(path: Path) -> Path:
    """As Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers: positions for CLIP's features of two images, here random."""
    transformer = _wan_transformer(2 * LATENTS + 4, pos_embed_seq_len=2 * CLIP_TOKENS, **WITH_CLIP)
    with torch.no_grad():
        transformer.condition_embedder.image_embedder.pos_embed.normal_(generator=torch.Generator().manual_seed(4))
    return _wan(path, "WanImageToVideoPipeline", transformer, **_clip())


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


def wan_vace(path: Path) -> Path:
    """As Wan-AI/Wan2.1-VACE-1.3B-diffusers: a control branch, here of one block for two."""
    control = {"vace_layers": [0], "vace_in_channels": 2 * LATENTS + 8 * 8}
    return _wan(path, "WanVACEPipeline", _wan_transformer(LATENTS, kind="WanVACETransformer3DModel", **control))


def skyreels_t2v(path: Path) -> Path:
    """As Skywork/SkyReels-V2-T2V-14B-540P-Diffusers."""
    return _wan(path, "SkyReelsV2Pipeline", _wan_transformer(LATENTS, kind=SKYREELS))


def skyreels_i2v(path: Path) -> Path:
    """As Skywork/SkyReels-V2-I2V-14B-540P-Diffusers: CLIP with its projection, which is not used."""
    transformer = _wan_transformer(2 * LATENTS + 4, kind=SKYREELS, **WITH_CLIP)
    return _wan(path, "SkyReelsV2ImageToVideoPipeline", transformer, **_clip("CLIPVisionModelWithProjection"))


def skyreels_df(path: Path) -> Path:
    """As Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers: a timestep for each latent frame, the frame rate as an input."""
    transformer = _wan_transformer(LATENTS, kind=SKYREELS, inject_sample_info=True)
    return _wan(path, "SkyReelsV2DiffusionForcingPipeline", transformer)


def chronoedit(path: Path) -> Path:
    """As nvidia/ChronoEdit-14B-Diffusers."""
    transformer = _wan_transformer(2 * LATENTS + 4, kind="ChronoEditTransformer3DModel", **WITH_CLIP)
    return _wan(path, "ChronoEditPipeline", transformer, **_clip())


SKYREELS = "SkyReelsV2Transformer3DModel"
CLIP_TOKENS = 5  # 2 x 2 patches and the class token
WITH_CLIP = {"image_dim": IMAGE_DIM, "added_kv_proj_dim": 2 * 16}


def _clip(kind: str = "CLIPVisionModel") -> dict[str, Any]:
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=12,
    )
    crop = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        image_encoder = getattr(transformers, kind)(config)
    return {"image_encoder": image_encoder, "image_processor": transformers.CLIPImageProcessor(**crop)}


def _wan_transformer(in_channels: int, seed: int = 1, kind: str = "WanTransformer3DModel", **config: Any) -> Any:
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(diffusers, kind)(
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
    if transformer_2 is not None:
        parts["transformer_2"] = transformer_2
    getattr(diffusers, kind)(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=vae or _wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        **parts,
    ).save_pretrained(path)
    return Path(path)
