"""The declaration of the HunyuanVideo-1.5 family."""

from __future__ import annotations

from vlmteacher.reasoners.family import DecoderFile, Family, LayerNames
from vlmteacher.reasoners.hunyuan_video15.presets import HUB_IDS, PRESETS, check_guidance, check_preset
from vlmteacher.reasoners.hunyuan_video15.reasoner import (
    adopt_hunyuan_video15,
    build_hunyuan_video15,
    load_hunyuan_video15,
)

HUNYUAN_VIDEO_15 = Family(
    name="HunyuanVideo-1.5",
    pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
    transformer="HunyuanVideo15Transformer3DModel",
    blocks="transformer_blocks",
    load=load_hunyuan_video15,
    build=build_hunyuan_video15,
    adopt=adopt_hunyuan_video15,
    presets=PRESETS,
    hub_ids=HUB_IDS,
    lora_targets=(  # an expression for the whole name: the text refiner's layers have the same ends
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
    ),
    unread=r"attn\.to_add_out|ff_context\.",  # the text after the last block
    layers=LayerNames(
        "double_blocks",
        {
            "attn.to_q": "img_attn_q",
            "attn.to_k": "img_attn_k",
            "attn.to_v": "img_attn_v",
            "attn.to_out.0": "img_attn_proj",
            "attn.add_q_proj": "txt_attn_q",
            "attn.add_k_proj": "txt_attn_k",
            "attn.add_v_proj": "txt_attn_v",
            "attn.to_add_out": "txt_attn_proj",
            "ff.net.0.proj": "img_mlp.fc1",
            "ff.net.2": "img_mlp.fc2",
            "ff_context.net.0.proj": "txt_mlp.fc1",
            "ff_context.net.2": "txt_mlp.fc2",
        },
    ),
    comfyui=LayerNames(  # query, key and value are one layer there
        "double_blocks",
        {
            "attn.to_qkv": "img_attn.qkv",
            "attn.to_out.0": "img_attn.proj",
            "ff.net.0.proj": "img_mlp.0",
            "ff.net.2": "img_mlp.2",
            "attn.add_qkv_proj": "txt_attn.qkv",
            "attn.to_add_out": "txt_attn.proj",
            "ff_context.net.0.proj": "txt_mlp.0",
            "ff_context.net.2": "txt_mlp.2",
        },
        fused={
            "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        },
    ),
    musubi="networks.lora_hv_1_5",
    # diffusers' pipeline has no load_lora_weights
    load_lora='pipe.transformer.load_lora_adapter(".", weight_name="lora.safetensors", prefix="transformer")',
    decoders={(32, 4, 16): "lightx2v/Autoencoders/lighttaehy1_5.pth"},
    decoder_files=(
        # LightX2V's decoder: the VAE's latents times this scale are what the transformer sees
        DecoderFile(r"lighttae_?hy", options={"slope": 0.2, "signed": True}, latents_scale=1.03682),
    ),
    check_preset=check_preset,
    check_guidance=check_guidance,
)
