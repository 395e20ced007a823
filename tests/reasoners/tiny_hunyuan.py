"""Random-weight HunyuanVideo-1.5 checkpoints in the hub's layout."""

from __future__ import annotations

from pathlib import Path

import torch

from vlmteacher.microworld.tokenizer import build_tokenizer

SIZE = (5, 64, 64)


def tiny_hunyuan_pipeline(path: Path, kind: str = "HunyuanVideo15ImageToVideoPipeline", meanflow: bool = True) -> Path:
    """Save a random HunyuanVideo-1.5 pipeline of class `kind`: 8 latent channels, strides of 4 and 16."""
    import diffusers
    import transformers

    tokenizer = build_tokenizer(["You are a helpful assistant. Describe the video: move the red ball"] * 2, 300)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = transformers.Qwen2_5_VLTextModel(
            transformers.Qwen2_5_VLTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=2048,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        text_encoder_2 = transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=384, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        )
        transformer = diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=17,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            text_embed_dim=32,
            text_embed_2_dim=24,
            image_embed_dim=16,
            rope_axes_dim=(4, 6, 6),
            target_size=64,
            use_meanflow=meanflow,
        )
        vae = diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=8, block_out_channels=(16, 16, 16, 16, 16), layers_per_block=1
        )
        image_encoder = transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            )
        )
    image_parts = {}
    if "ImageToVideo" in kind:
        processor = transformers.SiglipImageProcessor(size={"height": 28, "width": 28})
        image_parts = {"image_encoder": image_encoder, "feature_extractor": processor}
    getattr(diffusers, kind)(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=text_encoder_2,
        tokenizer_2=transformers.ByT5Tokenizer(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=1.0),
        **image_parts,
    ).save_pretrained(path)
    return Path(path)
