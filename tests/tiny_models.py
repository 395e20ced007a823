"""Random models of the real classes, small enough to load and run in a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

PROMPT_WORDS = ["move", "the", "red", "ball", "to", "green", "square", "box"]
TINY_SETTINGS = {
    "timesteps": [1000, 750, 500, 250],
    "shift": 1.0,
    "num_frames": 5,
    "height": 32,
    "width": 48,
    "fps": 8.0,
    "max_sequence_length": 12,
}


def tiny_tokenizer() -> Any:
    """A fast tokenizer of `PROMPT_WORDS` that ends a text as T5's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *PROMPT_WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tiny_wan_pipeline(path: Path, expand_timesteps: bool = True) -> Path:
    """Save a random Wan pipeline with a reasoner.json: 8 latent channels, x4 in time, x8 in space."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        )
        transformer = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=8,
            out_channels=8,
            text_dim=32,
            freq_dim=32,
            ffn_dim=64,
            num_layers=2,
        )
        vae = AutoencoderKLWan(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=8,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=8,
            scale_factor_temporal=4,
            latents_mean=[0.05 * i for i in range(8)],
            latents_std=[1 + 0.1 * i for i in range(8)],
        )
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        expand_timesteps=expand_timesteps,
    ).save_pretrained(path)
    (Path(path) / "reasoner.json").write_text(json.dumps(TINY_SETTINGS))
    return Path(path)
