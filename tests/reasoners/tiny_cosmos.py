"""Random-weight Cosmos-Predict 2.5 checkpoints in the hub's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.reasoners.tiny_checkpoints import LATENTS, SIZE, _wan_vae
from vlmteacher.microworld.tokenizer import build_tokenizer

__all__ = ["SIZE", "TEXT_LENGTH", "Checker", "tiny_cosmos_pipeline"]
TEXT_LENGTH = 84


class Checker:
    """In the place of NVIDIA's safety checker, whose models cannot be downloaded: it refuses one word."""

    def to(self, device: Any) -> None: ...

    def check_text_safety(self, prompt: str) -> bool:
        return "unsafe" not in prompt

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def tiny_cosmos_pipeline(path: Path) -> Path:
    """Save a random Cosmos-Predict 2.5 pipeline: Wan 2.1's VAE, two layers of Qwen2.5-VL, Karras' levels."""
    import diffusers
    import transformers

    tokenizer = build_tokenizer(["You are a helpful assistant who will provide prompts: move the red ball"] * 2, 300)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        }
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
        text_encoder = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        )
        transformer = diffusers.CosmosTransformer3DModel(
            in_channels=LATENTS + 1,
            out_channels=LATENTS,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            mlp_ratio=2.0,
            text_embed_dim=32,
            adaln_lora_dim=4,
            max_size=(4, 12, 12),
            rope_scale=(1.0, 3.0, 3.0),
            extra_pos_embed_type=None,
            use_crossattn_projection=True,
            crossattn_proj_in_channels=64,
            encoder_hidden_states_channels=32,
        )
        for block in transformer.transformer_blocks:  # so that the prompt matters
            block.attn2.to_out[0].weight.data *= 10
    diffusers.Cosmos2_5_PredictBasePipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        vae=_wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(
            use_karras_sigmas=True,
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            sigma_max=200.0,
            sigma_min=0.01,
        ),
        safety_checker=lambda *_: None,  # as in diffusers' conversion script
    ).save_pretrained(path)
    return Path(path)
