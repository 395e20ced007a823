"""Random-weight CogVideoX checkpoints in the hub's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny_models import tiny_tokenizer

SIZE = (9, 32, 48)
TEXT_LENGTH = 12
KINDS: dict[str, dict[str, Any]] = {  # what differs in the transformers of the published models
    "2b": {},
    "5b": {"use_rotary_positional_embeddings": True},
    "5b-i2v": {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True},
    "1.5": {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
    "1.5-i2v": {
        "use_rotary_positional_embeddings": True,
        "patch_size_t": 2,
        "patch_bias": False,
        "ofs_embed_dim": 512,
    },
}


def tiny_cogvideox_pipeline(path: Path, kind: str = "5b") -> Path:
    """Save a random CogVideoX pipeline like the published model `kind`: 8 latent channels, strides of 4 and 8.

    The VAE's posterior is all but certain, so that diffusers' draws from it are its mode.
    """
    import diffusers
    from transformers import T5Config, T5EncoderModel

    image, tokenizer = kind.endswith("i2v"), tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        )
        transformer = diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=16 if image else 8,
            out_channels=8,
            time_embed_dim=512 if kind == "1.5-i2v" else 32,  # that of ofs is added to it
            text_embed_dim=32,
            num_layers=2,
            sample_frames=SIZE[0] if kind == "5b-i2v" else 17,  # learned positions are for one size
            sample_height=SIZE[1] // 8 if kind == "5b-i2v" else 10,
            sample_width=SIZE[2] // 8 if kind == "5b-i2v" else 12,
            max_text_seq_length=TEXT_LENGTH,
            **KINDS[kind],
        )
        vae = diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            latent_channels=8,
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=1.15258426 if kind == "2b" else 0.7,
            invert_scale_latents=kind.startswith("1.5"),
        )
        with torch.no_grad():
            vae.encoder.conv_out.conv.weight[8:] = 0
            vae.encoder.conv_out.conv.bias[8:] = -40
    pipeline = diffusers.CogVideoXImageToVideoPipeline if image else diffusers.CogVideoXPipeline
    pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.CogVideoXDDIMScheduler(
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            snr_shift_scale=3.0 if kind == "2b" else 1.0,
        ),
    ).save_pretrained(path)
    return Path(path)
