"""The declaration of the HunyuanVideo family."""

from __future__ import annotations

from vlmteacher.reasoners.family import Family, LayerNames
from vlmteacher.reasoners.hunyuan_video.presets import HUB_IDS, PRESETS, check_preset
from vlmteacher.reasoners.hunyuan_video.reasoner import adopt_hunyuan_video, build_hunyuan_video, load_hunyuan_video

_REFINER = "context_embedder.token_refiner.refiner_blocks"
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_FUSED = {"attn.to_qkv": _QKV, "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")}
_SINGLE = LayerNames(  # the same in ComfyUI, but for the modulation
    "single_blocks",
    {"linear1": "linear1", "proj_out": "linear2", "norm.linear": "modulation.linear"},
    inner_others={"attn.norm_q": "q_norm", "attn.norm_k": "k_norm"},
    fused={"linear1": (*_QKV, "proj_mlp")},
    shares={"proj_mlp": 4},
)


def _outer(embedder: tuple[str, str], qkv: str, out: str, mlp: tuple[str, str]) -> dict[str, str]:
    """The names of the layers outside the blocks; embedder: of the two layers of an embedding's MLP."""
    names = {"x_embedder.proj": "img_in.proj", "proj_out": "final_layer.linear"}
    names["context_embedder.proj_in"] = "txt_in.input_embedder"
    for own, other, ends in (
        ("time_text_embed.timestep_embedder", "time_in", embedder),
        ("time_text_embed.guidance_embedder", "guidance_in", embedder),
        ("time_text_embed.text_embedder", "vector_in", ("in_layer", "out_layer")),
        ("context_embedder.time_text_embed.timestep_embedder", "txt_in.t_embedder", embedder),
        (
            "context_embedder.time_text_embed.text_embedder",
            "txt_in.c_embedder",
            ("linear_1", "linear_2") if embedder[0] == "mlp.0" else embedder,
        ),
    ):
        names |= {f"{own}.linear_{k}": f"{other}.{end}" for k, end in enumerate(ends, 1)}
    for k in range(2):
        block = f"txt_in.individual_token_refiner.blocks.{k}"
        names |= {
            f"{_REFINER}.{k}.attn.to_qkv": f"{block}.{qkv}",
            f"{_REFINER}.{k}.attn.to_out.0": f"{block}.{out}",
            f"{_REFINER}.{k}.ff.net.0.proj": f"{block}.{mlp[0]}",
            f"{_REFINER}.{k}.ff.net.2": f"{block}.{mlp[1]}",
            f"{_REFINER}.{k}.norm_out.linear": f"{block}.adaLN_modulation.1",
        }
    return names


HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
    refused={
        "HunyuanVideoFramepackPipeline": "which samples a video in sections, each on those before it: one prediction"
        " shows one section and not the video, so that it cannot be taught here; give HunyuanVideo-I2V",
    },
    transformer="HunyuanVideoTransformer3DModel",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    load=load_hunyuan_video,
    build=build_hunyuan_video,
    adopt=adopt_hunyuan_video,
    presets=PRESETS,
    hub_ids=HUB_IDS,
    lora_targets=(  # an expression for the whole name: the text refiner's layers have the same ends
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
        r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
    ),
    layers=(
        LayerNames(
            "double_blocks",
            {
                "attn.to_qkv": "img_attn_qkv",
                "attn.to_out.0": "img_attn_proj",
                "ff.net.0.proj": "img_mlp.fc1",
                "ff.net.2": "img_mlp.fc2",
                "norm1.linear": "img_mod.linear",
                "attn.add_qkv_proj": "txt_attn_qkv",
                "attn.to_add_out": "txt_attn_proj",
                "ff_context.net.0.proj": "txt_mlp.fc1",
                "ff_context.net.2": "txt_mlp.fc2",
                "norm1_context.linear": "txt_mod.linear",
            },
            _outer(("mlp.0", "mlp.2"), "self_attn_qkv", "self_attn_proj", ("mlp.fc1", "mlp.fc2")),
            inner_others={
                "attn.norm_q": "img_attn_q_norm",
                "attn.norm_k": "img_attn_k_norm",
                "attn.norm_added_q": "txt_attn_q_norm",
                "attn.norm_added_k": "txt_attn_k_norm",
            },
            fused=_FUSED,
        ),
        _SINGLE,
    ),
    comfyui=(
        LayerNames(
            "double_blocks",
            {
                "attn.to_qkv": "img_attn.qkv",
                "attn.to_out.0": "img_attn.proj",
                "ff.net.0.proj": "img_mlp.0",
                "ff.net.2": "img_mlp.2",
                "norm1.linear": "img_mod.lin",
                "attn.add_qkv_proj": "txt_attn.qkv",
                "attn.to_add_out": "txt_attn.proj",
                "ff_context.net.0.proj": "txt_mlp.0",
                "ff_context.net.2": "txt_mlp.2",
                "norm1_context.linear": "txt_mod.lin",
            },
            _outer(("in_layer", "out_layer"), "self_attn.qkv", "self_attn.proj", ("mlp.0", "mlp.2")),
            fused=_FUSED,
        ),
        LayerNames("single_blocks", {**_SINGLE.inner, "norm.linear": "modulation.lin"}, fused=_SINGLE.fused),
    ),
    musubi="networks.lora",
    decoders={(16, 4, 8): "madebyollin/taehv/taehv.safetensors"},
    check_preset=check_preset,
)
