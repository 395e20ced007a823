"""The declaration of the Wan family.

Sources of the presets: the models' own inference configs (Wan-Video/Wan2.1 and Wan2.2, FastVideo, LightX2V,
Wan2.2-TI2V-5B-Turbo) and the examples of diffusers' pipelines. The base models' own solver is UniPC; here they are
sampled by Euler steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from vlmteacher.errors import InputError
from vlmteacher.reasoners.family import TABLE, DecoderFile, Family, LayerNames
from vlmteacher.reasoners.sampling import SamplerSettings, even_timesteps
from vlmteacher.reasoners.wan.loading import adopt_wan, build_wan, load_wan
from vlmteacher.reasoners.wan.reasoner import WanReasoner

_FOUR_STEPS = (1000.0, 750.0, 500.0, 250.0)
_FASTWAN = (1000.0, 757.0, 522.0)  # already shifted
_480P = SamplerSettings(
    even_timesteps(50), shift=3.0, sampler="euler", guidance_scale=5.0, num_frames=81, height=480, width=832, fps=16.0
)
_720P = replace(_480P, shift=5.0, height=720, width=1280)
_LIGHTX2V = replace(_480P, timesteps=_FOUR_STEPS, shift=5.0, guidance_scale=1.0)
PRESETS = {
    # Wan 2.1
    "wan2.1-t2v-480p": _480P,
    "wan2.1-t2v-720p": _720P,
    "wan2.1-i2v-480p": _480P,
    "wan2.1-i2v-720p": _720P,
    "wan2.1-flf2v-720p": replace(_720P, shift=16.0),
    "wan2.1-lightx2v-4step": _LIGHTX2V,
    "fastwan2.1-t2v-480p": SamplerSettings(_FASTWAN, num_frames=61, height=448, width=832, fps=16.0),
    # Wan 2.2
    "wan2.2-ti2v-5b": SamplerSettings(
        even_timesteps(50), shift=5.0, sampler="euler", guidance_scale=5.0, num_frames=121
    ),
    "wan2.2-ti2v-5b-turbo": SamplerSettings(_FOUR_STEPS),  # its inference takes the levels as they are ...
    "wan2.2-ti2v-5b-turbo-shifted": SamplerSettings(_FOUR_STEPS, shift=5.0),  # ... and its training shifts them
    "fastwan2.2-ti2v-5b": SamplerSettings(_FASTWAN, num_frames=121),
    "wan2.2-t2v-a14b": replace(
        _720P, timesteps=even_timesteps(40), shift=12.0, guidance_scale=4.0, guidance_scale_2=3.0
    ),
    "wan2.2-i2v-a14b": replace(_720P, timesteps=even_timesteps(40), guidance_scale=3.5),
    "wan2.2-a14b-lightx2v-4step": _LIGHTX2V,
    "wan2.2-a14b-flf2v-lightx2v-4step": replace(_LIGHTX2V, shift=16.0, height=720, width=1280),
}
WAN_21_DECODERS = {(16, 4, 8): "lightx2v/Autoencoders/taew2_1.pth"}
_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}


def _preset_misfit(words: Sequence[str], index: Mapping[str, Any]) -> str | None:
    two, tokens = bool((index.get("transformer_2") or [None])[0]), bool(index.get("expand_timesteps"))
    for wanted, has, what in (("a14b", two, "models of two experts (A14B)"), ("ti2v", tokens, "Wan 2.2 TI2V-5B")):
        if (wanted in words) != has:
            return what if wanted in words else "a single Wan model that is not TI2V-5B"
    return None


def _check_preset(name: str, config: Mapping[str, Any], pipeline: str, changed: bool) -> None:
    if name == "wan2.1-flf2v-720p" and config["pos_embed_seq_len"] is None:
        raise InputError(
            f"preset {name} is for models that need a last frame (FLF2V), which {pipeline} is not: name another"
            " (--preset)"
        )


def _fuse_blocks(transformer: Any) -> None:
    from vlmteacher.reasoners.wan.blocks import fuse_blocks  # imports diffusers' models

    fuse_blocks(transformer)


def _unfuse_blocks(transformer: Any) -> None:
    from vlmteacher.reasoners.wan.blocks import unfuse_blocks

    unfuse_blocks(transformer)


WAN = Family(
    name="Wan",
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    transformer="WanTransformer3DModel",
    blocks="blocks",
    load=partial(load_wan, WanReasoner),
    build=partial(build_wan, WanReasoner),
    adopt=partial(adopt_wan, WanReasoner),
    presets=PRESETS,
    hub_ids={
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan2.1-t2v-480p",
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan2.1-t2v-720p",
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": "wan2.1-i2v-480p",
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": "wan2.1-i2v-720p",
        "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": "wan2.1-flf2v-720p",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "wan2.2-ti2v-5b",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan2.2-t2v-a14b",
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers": "wan2.2-i2v-a14b",
        "quanhaol/Wan2.2-TI2V-5B-Turbo": "wan2.2-ti2v-5b-turbo",
        "FastVideo/FastWan2.1-T2V-1.3B-Diffusers": "fastwan2.1-t2v-480p",
        "FastVideo/FastWan2.1-T2V-14B-480P-Diffusers": "fastwan2.1-t2v-480p",
        "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers": "fastwan2.2-ti2v-5b",
    },
    lora_targets=[
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_k_proj",
        "add_v_proj",
        "ffn.net.0.proj",
        "ffn.net.2",
    ],
    layers=LayerNames(
        "blocks",
        {f"attn1.{own}": f"self_attn.{other}" for own, other in _ATTENTION.items()}
        | {f"attn2.{own}": f"cross_attn.{other}" for own, other in _ATTENTION.items()}
        | {"attn2.add_k_proj": "cross_attn.k_img", "attn2.add_v_proj": "cross_attn.v_img"}
        | {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"},
        {
            "condition_embedder.text_embedder.linear_1": "text_embedding.0",
            "condition_embedder.text_embedder.linear_2": "text_embedding.2",
            "condition_embedder.time_embedder.linear_1": "time_embedding.0",
            "condition_embedder.time_embedder.linear_2": "time_embedding.2",
            "condition_embedder.time_proj": "time_projection.1",
            "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
            "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
            "patch_embedding": "patch_embedding",
            "proj_out": "head.head",
        },
        {f"attn1.norm_{each}": f"self_attn.norm_{each}" for each in "qk"}
        | {f"attn2.norm_{each}": f"cross_attn.norm_{each}" for each in "qk"}
        | {"attn2.norm_added_k": "cross_attn.norm_k_img", "norm2": "norm3", TABLE: "modulation"},
        {
            "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
            "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
            TABLE: "head.modulation",
        },
    ),
    musubi="networks.lora_wan",
    load_lora='pipe.load_lora_weights(".", weight_name="lora.safetensors")  # of two experts: the high-noise one',
    decoders={**WAN_21_DECODERS, (48, 4, 16): "lightx2v/Autoencoders/taew2_2.safetensors"},
    decoder_files=(DecoderFile(r"lighttae(?!_?hy)", denormalised=True),),  # LightX2V's decoders
    preset_misfit=_preset_misfit,
    check_preset=_check_preset,
    shares_tokens=True,
    fuse_blocks=_fuse_blocks,
    unfuse_blocks=_unfuse_blocks,
)
