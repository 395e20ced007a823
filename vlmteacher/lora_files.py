"""LoRA files of three key styles, which differ in the names of the layers and in where alpha is:

| style | keys | read by |
|---|---|---|
| diffusers | ``transformer.blocks.0.attn1.to_q.lora_A.weight``, rank and alpha in the metadata | diffusers, PEFT |
| comfyui | ``diffusion_model.blocks.0.self_attn.q.lora_A.weight``, B times alpha / rank | ComfyUI, diffusers |
| musubi | ``lora_unet_blocks_0_self_attn_q.lora_down.weight`` and ``.alpha`` | musubi-tuner, ComfyUI, diffusers |

The last two name the layers as the model's authors did. Sources: diffusers' ``loaders/lora_conversion_utils.py`` and
``scripts/convert_hunyuan_video1_5_to_diffusers.py``, ComfyUI's ``comfy/lora.py``, musubi-tuner's ``convert_lora.py``.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from vlmteacher.errors import InputError

if TYPE_CHECKING:
    from peft import LoraConfig

Style = Literal["diffusers", "comfyui", "musubi"]
STYLES: tuple[Style, ...] = get_args(Style)
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration
PART = re.compile(r"(.+?)\.(?:(lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight|(alpha))")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}


@dataclass(frozen=True)
class Names:
    """How the authors of a model name its layers: `blocks` before the number, `inner` after it, `outer` elsewhere."""

    blocks: str
    inner: Mapping[str, str]
    outer: Mapping[str, str]
    musubi: str | None  # the network module of musubi-tuner, if that trains the model


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
        "proj_out": "head.head",
    },
    "networks.lora_wan",
)
LTX = Names(  # diffusers kept the names of the blocks
    "transformer_blocks",
    {f"{attn}.{name}": f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ATTENTION}
    | {"ff.net.0.proj": "ff.net.0.proj", "ff.net.2": "ff.net.2"},
    {},
    None,
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


@dataclass(frozen=True)
class Factors:
    """The update of one linear layer, W + alpha / rank B A: A (rank, in), B (out, rank)."""

    a: Tensor
    b: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def update(self) -> Tensor:
        """(out, in) float32: what is added to the weight."""
        return self.scale * (self.b.float() @ self.a.float())


@dataclass(frozen=True)
class LoRA:
    """A LoRA apart from any model. layers: by the layers' names in diffusers' models. source: for messages."""

    layers: Mapping[str, Factors]
    source: str = "the LoRA"

    @property
    def rank(self) -> int:
        """Of most layers."""
        return Counter(layer.rank for layer in self.layers.values()).most_common(1)[0][0]

    @property
    def alpha(self) -> float:
        """Of most layers."""
        return Counter(layer.alpha for layer in self.layers.values()).most_common(1)[0][0]

    @property
    def names(self) -> Names:
        """How the authors of its model name the layers. Raises InputError for a model that we do not know."""
        inner = {name.split(".", 2)[-1] for name in self.layers if re.match(r"(transformer_)?blocks\.\d+\.", name)}
        for names in (WAN, LTX, HUNYUAN_VIDEO_15):
            if inner and inner <= names.inner.keys():
                return names
        raise InputError(
            f"{self.source} is for a model whose other names are not known: Wan, LTX-Video and HunyuanVideo-1.5 are"
        )

    def config(self) -> LoraConfig:
        """PEFT's description; layers of another rank or alpha than most are listed in its patterns."""
        from peft import LoraConfig

        rank, alpha = self.rank, self.alpha
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,  # a fraction is fine too
            lora_dropout=0.0,
            target_modules=sorted(self.layers),
            rank_pattern={name: each.rank for name, each in self.layers.items() if each.rank != rank},
            alpha_pattern={name: each.alpha for name, each in self.layers.items() if each.alpha != alpha},
        )

    def check_fits(self, transformer: nn.Module) -> None:
        """Raise InputError unless every layer is a linear layer of `transformer`, of the same size."""
        linear = {name: each for name, each in transformer.named_modules() if isinstance(each, nn.Linear)}
        kind = type(transformer).__name__
        for name, layer in self.layers.items():
            if name not in linear:
                raise InputError(f"{self.source} is a LoRA for another model: this {kind} has no linear layer {name}")
            wanted, given = linear[name].weight.shape, (layer.b.shape[0], layer.a.shape[1])
            if tuple(wanted) != given:
                raise InputError(
                    f"{self.source} is a LoRA for another model: its {name} is {given[1]} -> {given[0]}, that of this"
                    f" {kind} {wanted[1]} -> {wanted[0]}"
                )

    def state_dict(self) -> dict[str, Tensor]:
        """The factors under PEFT's names (``blocks.0.attn1.to_q.lora_A.weight``)."""
        return {
            f"{name}.lora_{part}.weight": value
            for name, layer in self.layers.items()
            for part, value in (("A", layer.a), ("B", layer.b))
        }

    def to_bytes(self, style: Style) -> bytes:
        """A safetensors file of that style; equal LoRAs give equal bytes. Raises InputError for what it cannot hold."""
        if style == "diffusers":
            return diffusers_bytes(self.state_dict(), self.config().to_dict())
        names, layers = self.names, self.layers
        if style == "comfyui":
            if names is HUNYUAN_VIDEO_15:
                names, layers = HUNYUAN_VIDEO_15_COMFYUI, _fuse_qkv(self)
            tensors = {}
            for name, layer in layers.items():
                key = f"diffusion_model.{_theirs(name, names, self.source)}"
                tensors[f"{key}.lora_A.weight"] = layer.a
                tensors[f"{key}.lora_B.weight"] = layer.b if layer.scale == 1 else layer.b * layer.scale
            return safetensors_bytes(tensors)
        if names.musubi is None:
            raise InputError(f"{self.source}: musubi-tuner has no LTX-Video: convert it to comfyui")
        tensors = {}
        for name, layer in layers.items():
            key = f"lora_unet_{_theirs(name, names, self.source).replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = layer.a, layer.b
            tensors[f"{key}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
        facts = {"module": names.musubi, "dim": str(self.rank), "alpha": str(self.alpha)}
        return safetensors_bytes(tensors, {f"ss_network_{name}": value for name, value in facts.items()})


def read_lora(source: str | os.PathLike[str] | bytes, name: str | None = None) -> LoRA:
    """A LoRA of any of the three styles, from a safetensors file or its bytes; nothing in it is executed.

    name: what messages call it, by default the path. Raises InputError: it cannot be read, holds anything else than
    plain LoRA factors (DoRA, biases, weight differences, text encoders), an incomplete pair, or non-finite values.
    """
    name = name or ("the LoRA" if isinstance(source, bytes) else f"LoRA {os.fspath(source)}")
    tensors, config = _read_safetensors(source, name)
    style: Style = "diffusers"
    for key in tensors:
        if key.startswith(("diffusion_model.", "lora_unet_")):
            style = "comfyui" if key.startswith("diffusion_model.") else "musubi"
            break
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = PART.fullmatch(key)
        if not match or (value.numel() != 1 if match[3] else value.ndim != 2):
            raise InputError(
                f"{name} holds {key} {tuple(value.shape)}: only plain LoRA factors of linear layers can be used, no"
                " DoRA, convolutions, biases or weight differences"
            )
        part = "alpha" if match[3] else {"lora_down": "lora_A", "lora_up": "lora_B"}.get(match[2], match[2])
        found.setdefault(match[1], {})[part] = value
    layers: dict[str, Factors] = {}
    for key, parts in found.items():
        layer = _ours(key, style, name)
        if not {"lora_A", "lora_B"} <= parts.keys():
            raise InputError(f"{name} holds only {' and '.join(sorted(parts))} of {key}: the file is not complete")
        a, b = parts["lora_A"], parts["lora_B"]
        if a.shape[0] != b.shape[1] or not a.shape[0]:
            raise InputError(f"{name}: the factors of {key} are of rank {a.shape[0]} and {b.shape[1]}")
        alpha = parts["alpha"].float() if "alpha" in parts else _alpha(config, layer, a.shape[0])
        if any(each.dtype not in DTYPES for each in (a, b)):
            raise InputError(f"{name} holds {key} in {a.dtype}: only {', '.join(map(str, DTYPES))} can be used")
        if not all(each.isfinite().all() for each in (a, b, alpha)):
            raise InputError(f"{name} holds values of {key} that are no finite numbers: its training broke down")
        layers |= _split_qkv(layer, Factors(a, b, alpha.item()))
    return LoRA(layers, name)


def _read_safetensors(source: str | os.PathLike[str] | bytes, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and PEFT's configuration, its names without prefix."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = source if isinstance(source, bytes) else Path(os.path.expanduser(source)).read_bytes()
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        config = json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}"))
        config = {key.removeprefix("transformer."): value for key, value in config.items()}
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["?"])[0][:120]
        raise InputError(f"{name} cannot be read ({reason}): give a complete .safetensors file") from error
    if not tensors:
        raise InputError(f"{name} holds no tensors")
    for switch in ("use_dora", "use_rslora", "lora_bias"):
        if config.get(switch):
            raise InputError(f"{name} was trained with {switch}, which cannot be used: only plain LoRA can")
    return tensors, config


def _alpha(config: Mapping[str, Any], layer: str, rank: int) -> Tensor:
    """Of `layer` by PEFT's configuration; `rank` where there is none, as diffusers takes it."""
    alpha, patterns = config.get("lora_alpha", rank), config.get("alpha_pattern")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if f".{layer}".endswith("." + pattern.removeprefix("^")):
            alpha = value
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise InputError(f"the LoRA's metadata give alpha as {alpha!r}: a number is needed")
    return torch.tensor(float(alpha), dtype=torch.float64)


def _theirs(name: str, names: Names, source: str) -> str:
    """The authors' name of a layer."""
    match = re.fullmatch(r"(?:transformer_)?blocks\.(\d+)\.(.+)", name)
    theirs = names.inner.get(match[2]) if match else names.outer.get(name)
    if theirs is None:
        raise InputError(f"{source}: the layer {name} has no name outside diffusers")
    return f"{names.blocks}.{match[1]}.{theirs}" if match else theirs


def _ours(key: str, style: Style, source: str) -> str:
    """The name in diffusers' models of the layer that a file calls `key`."""
    if style == "diffusers":
        return key.removeprefix("transformer.").removeprefix("base_model.model.")
    dot = "." if style == "comfyui" else "_"
    name = key.removeprefix("diffusion_model." if style == "comfyui" else "lora_unet_")
    match = re.fullmatch(rf"(.*blocks)[{dot}](\d+)[{dot}](.+)", name)
    for names in (WAN, LTX, HUNYUAN_VIDEO_15, HUNYUAN_VIDEO_15_COMFYUI):
        for ours, theirs in (names.inner if match else names.outer).items():
            if not match and theirs.replace(".", dot) == name:
                return ours
            if match and names.blocks == match[1] and theirs.replace(".", dot) == match[3]:
                return f"{'blocks' if names is WAN else 'transformer_blocks'}.{match[2]}.{ours}"
    raise InputError(f"{source} has the layer {key}, which no model known here has")


def _fuse_qkv(lora: LoRA) -> dict[str, Factors]:
    """The layers as ComfyUI has them: those of `FUSED` as one, its A on top of each other, its B along the diagonal."""
    layers = dict(lora.layers)
    for name in lora.layers:
        for fused, held in FUSED.items():
            if not name.endswith(f".{held[0]}"):
                continue
            block = name.removesuffix(held[0])
            if missing := [each for each in held if block + each not in layers]:
                raise InputError(f"{lora.source} has {name} but no {block + missing[0]}: ComfyUI has them in one layer")
            parts = [layers.pop(block + each) for each in held]
            b = torch.block_diag(*(part.b * part.scale for part in parts))
            layers[block + fused] = Factors(torch.cat([part.a for part in parts]), b, b.shape[1])
    return layers


def _split_qkv(name: str, layer: Factors) -> dict[str, Factors]:
    """A layer of `FUSED` as the three that it holds, with a third of the rank where B is as `_fuse_qkv` makes it."""
    for fused, held in FUSED.items():
        if name.endswith(f".{fused}"):
            block, scale = name.removesuffix(fused), layer.scale
            a, b = [layer.a] * 3, list(layer.b.chunk(3))
            own = [each.tensor_split(3, dim=1)[i] for i, each in enumerate(b)]
            if layer.rank % 3 == 0 and torch.equal(torch.block_diag(*own), layer.b):
                a, b = list(layer.a.chunk(3)), own
            return {
                block + each: Factors(part_a, part_b, scale * len(part_a))
                for each, part_a, part_b in zip(held, a, b, strict=True)
            }
    return {name: layer}


def diffusers_bytes(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bytes:
    """What ``load_lora_weights`` reads: PEFT's tensors and configuration, all under ``transformer.``."""
    # PEFT keeps the layer names in a set, whose order changes from run to run.
    prefixed = {
        f"transformer.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()
    }
    metadata = {METADATA_KEY: json.dumps(prefixed, indent=2, sort_keys=True)}
    return safetensors_bytes({f"transformer.{key}": value for key, value in tensors.items()}, metadata)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file whose header is sorted: the library orders metadata differently from call to call."""
    from safetensors.torch import save

    data = save({key: value.contiguous() for key, value in tensors.items()}, {"format": "pt", **(metadata or {})})
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
