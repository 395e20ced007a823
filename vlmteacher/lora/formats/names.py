"""The names of a model's layers in diffusers and where its authors published it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from vlmteacher.errors import InputError

ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
BLOCK = re.compile(r"(?:transformer_)?blocks\.(\d+)\.(.+)")  # a name in a block of diffusers' transformers
TABLE = "scale_shift_table"  # diffusers' name of a modulation, which is a parameter and no layer


@dataclass(frozen=True)
class Names:
    """How the authors of a model name its layers: `blocks` before the number, `inner` after it, `outer` elsewhere.

    inner, outer: diffusers' name -> theirs, of linear layers (and convolutions). others: the same of what only weight
    differences are for: norms and modulations, inside and outside of the blocks.
    """

    blocks: str
    inner: Mapping[str, str]
    outer: Mapping[str, str]
    musubi: str | None  # the network module of musubi-tuner, if that trains the model
    inner_others: Mapping[str, str] = field(default_factory=dict)
    outer_others: Mapping[str, str] = field(default_factory=dict)

    @property
    def all_inner(self) -> dict[str, str]:
        return {**self.inner, **self.inner_others}

    @property
    def all_outer(self) -> dict[str, str]:
        return {**self.outer, **self.outer_others}


WAN = Names(
    "blocks",
    {f"attn1.{ours}": f"self_attn.{theirs}" for ours, theirs in ATTENTION.items()}
    | {f"attn2.{ours}": f"cross_attn.{theirs}" for ours, theirs in ATTENTION.items()}
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
    "networks.lora_wan",
    {f"attn1.norm_{each}": f"self_attn.norm_{each}" for each in "qk"}
    | {f"attn2.norm_{each}": f"cross_attn.norm_{each}" for each in "qk"}
    | {"attn2.norm_added_k": "cross_attn.norm_k_img", "norm2": "norm3", TABLE: "modulation"},
    {
        "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
        "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
        TABLE: "head.modulation",
    },
)
LTX = Names(  # diffusers kept the names of the blocks
    "transformer_blocks",
    {f"{attn}.{name}": f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ATTENTION}
    | {"ff.net.0.proj": "ff.net.0.proj", "ff.net.2": "ff.net.2"},
    {
        "proj_in": "patchify_proj",
        "time_embed.emb.timestep_embedder.linear_1": "adaln_single.emb.timestep_embedder.linear_1",
        "time_embed.emb.timestep_embedder.linear_2": "adaln_single.emb.timestep_embedder.linear_2",
        "time_embed.linear": "adaln_single.linear",
        "caption_projection.linear_1": "caption_projection.linear_1",
        "caption_projection.linear_2": "caption_projection.linear_2",
    },
    None,
    {f"{attn}.norm_{each}": f"{attn}.{each}_norm" for attn in ("attn1", "attn2") for each in "qk"} | {TABLE: TABLE},
)
HUNYUAN_VIDEO_15 = Names(
    "double_blocks",
    {"attn.to_q": "img_attn_q", "attn.to_k": "img_attn_k", "attn.to_v": "img_attn_v", "attn.to_out.0": "img_attn_proj"}
    | {"attn.add_q_proj": "txt_attn_q", "attn.add_k_proj": "txt_attn_k", "attn.add_v_proj": "txt_attn_v"}
    | {"attn.to_add_out": "txt_attn_proj", "ff.net.0.proj": "img_mlp.fc1", "ff.net.2": "img_mlp.fc2"}
    | {"ff_context.net.0.proj": "txt_mlp.fc1", "ff_context.net.2": "txt_mlp.fc2"},
    {},
    "networks.lora_hv_1_5",
)
HUNYUAN_VIDEO_15_COMFYUI = Names(  # query, key and value are one layer there
    "double_blocks",
    {"attn.to_qkv": "img_attn.qkv", "attn.to_out.0": "img_attn.proj", "ff.net.0.proj": "img_mlp.0"}
    | {"ff.net.2": "img_mlp.2", "attn.add_qkv_proj": "txt_attn.qkv", "attn.to_add_out": "txt_attn.proj"}
    | {"ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2"},
    {},
    None,
)
FUSED = {  # layer of HUNYUAN_VIDEO_15_COMFYUI -> the layers that it holds, in this order
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def theirs(name: str, names: Names, source: str) -> str:
    """The authors' name of a layer. Raises InputError where it has none."""
    match = BLOCK.fullmatch(name)
    found = names.all_inner.get(match[2]) if match else names.all_outer.get(name)
    if found is None:
        raise InputError(f"{source}: the layer {name} has no name outside diffusers")
    return f"{names.blocks}.{match[1]}.{found}" if match else found


def ours(path: str, dot: str = ".") -> str | None:
    """The name in diffusers' models of a layer that a file calls `path`, the authors' way; None: no model has it.

    dot: what stands between the parts of `path`, "_" in musubi-tuner's files. Those may use diffusers' names too.
    """
    match = re.fullmatch(rf"(.*blocks)[{dot}](\d+)[{dot}](.+)", path)
    for names in (WAN, LTX, HUNYUAN_VIDEO_15, HUNYUAN_VIDEO_15_COMFYUI):
        blocks = "blocks" if names is WAN else "transformer_blocks"
        for own, other in (names.all_inner if match else names.all_outer).items():
            if not match:
                if path in (other.replace(".", dot), own.replace(".", dot)):
                    return own
            elif (match[1], match[3]) in (
                (names.blocks, other.replace(".", dot)),
                (blocks, own.replace(".", dot)),
            ):
                return f"{blocks}.{match[2]}.{own}"
    return None
