"""Random transformers of the real classes, with inputs for one call."""

from __future__ import annotations

from typing import Any

import torch

from tests.reasoners.tiny_ltx2 import tiny_ltx2_transformer

FAMILIES = (
    *("wan", "wan_i2v", "wan_vace", "wan_skyreels", "wan_chronoedit"),
    *("ltx", "ltx2", "hunyuan_video15", "hunyuan_video", "cogvideox"),
)


def tiny_transformer(family: str) -> Any:
    """Two blocks of width 32, of each kind that the family has.

    wan_i2v: Wan 2.1's, with keys and values of image features.
    """
    import diffusers
    from diffusers import (
        CogVideoXTransformer3DModel,
        HunyuanVideo15Transformer3DModel,
        HunyuanVideoTransformer3DModel,
        LTXVideoTransformer3DModel,
    )

    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family.startswith("wan"):
            image = {"image_dim": 12, "added_kv_proj_dim": 32} if family in ("wan_i2v", "wan_chronoedit") else {}
            sizes = {"in_channels": 8, "out_channels": 8, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64}
            control = {"vace_layers": [0, 1], "vace_in_channels": 10} if family == "wan_vace" else {}
            kinds = {"wan_vace": "WanVACE", "wan_skyreels": "SkyReelsV2", "wan_chronoedit": "ChronoEdit"}
            kind = getattr(diffusers, f"{kinds.get(family, 'Wan')}Transformer3DModel")
            model: Any = kind(**heads, **sizes, **image, **control)
        elif family == "ltx2":
            model = tiny_ltx2_transformer("2.3")
        elif family == "ltx":
            model = LTXVideoTransformer3DModel(
                in_channels=8, out_channels=8, cross_attention_dim=32, caption_channels=24, **heads
            )
        elif family == "hunyuan_video":
            sizes = {"in_channels": 8, "out_channels": 8, "text_embed_dim": 24, "pooled_projection_dim": 20}
            model = HunyuanVideoTransformer3DModel(
                num_single_layers=2, num_refiner_layers=1, rope_axes_dim=(4, 6, 6), **sizes, **heads
            )
        elif family == "cogvideox":
            sizes = {"in_channels": 8, "out_channels": 8, "text_embed_dim": 24, "time_embed_dim": 32}
            model = CogVideoXTransformer3DModel(**heads, **sizes, max_text_seq_length=6)
        else:
            model = HunyuanVideo15Transformer3DModel(
                in_channels=17,
                out_channels=8,
                num_refiner_layers=1,
                mlp_ratio=2.0,
                text_embed_dim=24,
                text_embed_2_dim=20,
                image_embed_dim=12,
                rope_axes_dim=(4, 6, 6),
                use_meanflow=True,
                **heads,
            )
    return model.eval().requires_grad_(False)


def call(model: Any, grad: bool = False) -> torch.Tensor:
    """The velocity for fixed random inputs; without `grad` it is not differentiable."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    name = type(model).__name__
    inputs: dict[str, Any] = {"timestep": torch.tensor([700.0])}
    if hasattr(model, "blocks"):
        inputs |= {"hidden_states": draw(1, 8, 2, 4, 6), "encoder_hidden_states": draw(1, 12, 32)}
        if model.config.image_dim:
            inputs["encoder_hidden_states_image"] = draw(1, 5, 12)
        if name == "WanVACETransformer3DModel":
            inputs["control_hidden_states"] = draw(1, 10, 2, 4, 6)
    elif name == "LTXVideoTransformer3DModel":
        inputs |= {"hidden_states": draw(1, 12, 8), "encoder_hidden_states": draw(1, 6, 24)}
        inputs |= {"encoder_attention_mask": torch.ones(1, 6), "num_frames": 2, "height": 2, "width": 3}
    elif name == "HunyuanVideoTransformer3DModel":
        inputs |= {"hidden_states": draw(1, 8, 2, 4, 6), "encoder_hidden_states": draw(1, 6, 24)}
        inputs |= {"encoder_attention_mask": torch.ones(1, 6), "pooled_projections": draw(1, 20)}
        inputs["guidance"] = torch.tensor([6000.0])
    elif name == "LTX2VideoTransformer3DModel":
        inputs |= {"hidden_states": draw(1, 12, 8), "encoder_hidden_states": draw(1, 6, 32)}
        inputs |= {"audio_hidden_states": draw(1, 5, 8), "audio_encoder_hidden_states": draw(1, 6, 16)}
        inputs |= {"sigma": inputs["timestep"], "num_frames": 2, "height": 2, "width": 3, "audio_num_frames": 5}
    elif name == "CogVideoXTransformer3DModel":
        inputs |= {"hidden_states": draw(1, 2, 8, 4, 6), "encoder_hidden_states": draw(1, 6, 24)}
    else:
        inputs |= {"hidden_states": draw(1, 17, 2, 4, 6), "encoder_hidden_states": draw(1, 6, 24)}
        inputs |= {"encoder_hidden_states_2": draw(1, 4, 20), "image_embeds": draw(1, 5, 12)}
        inputs |= {"encoder_attention_mask": torch.ones(1, 6), "encoder_attention_mask_2": torch.ones(1, 4)}
        inputs["timestep_r"] = torch.tensor([0.0])
    with torch.set_grad_enabled(grad):
        return model(**inputs, return_dict=False)[0]
