"""Random-weight LTX-2 and LTX-2.3 checkpoints in the hub's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny_models import tiny_tokenizer

SIZE = (17, 64, 96)


def tiny_ltx2_transformer(version: str = "2") -> Any:
    """Two blocks of width 32, and 16 for the audio; 8 channels of both."""
    from diffusers import LTX2VideoTransformer3DModel

    newer = dict.fromkeys(("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod"), True)
    newer |= {"use_prompt_embeddings": False, "perturbed_attn": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LTX2VideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            audio_in_channels=8,
            audio_out_channels=8,
            audio_num_attention_heads=4,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=16,
            num_layers=2,
            caption_channels=32,
            rope_type="split",
            **newer if version == "2.3" else {},
        )


def tiny_ltx2_pipeline(path: Path, kind: str = "LTX2Pipeline", version: str = "2") -> Path:
    """Save a random LTX-2 pipeline of class `kind`: strides of 8 in time and 32 in space, audio of 2 x 4 values."""
    import diffusers
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # as Gemma's
    newer = version == "2.3"
    transformer = tiny_ltx2_transformer(version)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        text: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64}
        text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
        text |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
        vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 28, "patch_size": 14}
        text_encoder = Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=10)
        )
        connectors = LTX2TextConnectors(
            caption_channels=32,
            text_proj_in_factor=3,
            video_connector_num_attention_heads=4,
            video_connector_attention_head_dim=8,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=4,
            audio_connector_num_attention_heads=4,
            audio_connector_attention_head_dim=4 if newer else 8,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=4,
            rope_type="split",
            **{"video_gated_attn": True, "audio_gated_attn": True} if newer else {},
            **{"per_modality_projections": True, "proj_bias": True} if newer else {},
            video_hidden_dim=32,
            audio_hidden_dim=16,
        )
        up: dict[str, Any] = {"decoder_block_out_channels": (8, 16, 32), "decoder_layers_per_block": (1,) * 4}
        if newer:
            up = {
                "decoder_block_out_channels": (8, 16, 16, 32),
                "decoder_layers_per_block": (1,) * 5,
                "decoder_spatio_temporal_scaling": (True,) * 4,
                "decoder_inject_noise": (False,) * 5,
                "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
                "upsample_residual": (False,) * 4,
                "upsample_factor": (2, 2, 1, 2),
            }
        vae = diffusers.AutoencoderKLLTX2Video(
            latent_channels=8,
            block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5,
            decoder_causal=False,
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
            **up,
        )
        vae.latents_mean.copy_(0.05 * torch.arange(8))
        vae.latents_std.copy_(1 + 0.1 * torch.arange(8))
        audio_vae = diffusers.AutoencoderKLLTX2Audio(
            base_channels=8,  # the length of its statistics, which are those of its latents' 2 x 4 values
            output_channels=2,
            ch_mult=(1, 1, 1),
            num_res_blocks=1,
            attn_resolutions=None,
            in_channels=2,
            resolution=16,
            latent_channels=2,
            norm_type="pixel",
            causality_axis="height",
            mid_block_add_attention=False,
            mel_bins=16,
        )
        vocoder = LTX2Vocoder(
            in_channels=32,
            hidden_channels=8,
            out_channels=2,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
        )
    getattr(diffusers, kind)(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        connectors=connectors,
        transformer=transformer,
        vae=vae,
        audio_vae=audio_vae,
        vocoder=vocoder,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(path)
    return Path(path)
