"""The models of a plan, on the meta device: from shipped facts, or from the configs in a directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vlmteacher.checkpoints.pretrained import json_object, load_tokenizer
from vlmteacher.decoders.taehv import SurrogateDecoder
from vlmteacher.errors import InputError
from vlmteacher.planning.costs import META
from vlmteacher.reasoners import FAMILIES, read_index
from vlmteacher.reasoners.base import Reasoner, Settings
from vlmteacher.reasoners.hunyuan_video15 import HunyuanVideo15Reasoner, load_hunyuan_video15
from vlmteacher.reasoners.ltx import LTXReasoner, load_ltx
from vlmteacher.reasoners.presets import find_preset, known_preset
from vlmteacher.reasoners.wan import WanReasoner, load_wan
from vlmteacher.teachers.preprocessing import VisionSettings, read_settings
from vlmteacher.teachers.qwen_vl import QwenVLTeacher

KNOWN = Path(__file__).parent.parent / "known_models"
PARTS = ("transformer", "vae", "text_encoder")
PACKAGED = Path(__file__).parent.parent / "microworld" / "models"


def known_models(kind: str) -> list[str]:
    return sorted(p.stem for p in KNOWN.glob("*.json") if json.loads(p.read_text())["kind"] == kind)


def known_facts(name: str, kind: str) -> dict[str, Any]:
    """The shipped facts of a model, by its name here or on the hub. Raises InputError, which lists the known ones."""
    for file in KNOWN.glob("*.json"):
        facts = json.loads(file.read_text())
        if facts["kind"] == kind and name in (file.stem, facts["source"]):
            return facts
    names = [*known_models(kind), *([] if kind == "decoder" else ["packaged"])]
    also = "a checkpoint file" if kind == "decoder" else "a local directory with its config files"
    raise InputError(f"--{kind} {name!r} is unknown: known are {', '.join(names)}, or {also}")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def cast(model: Any, dtype: torch.dtype) -> Any:
    """A diffusers model in `dtype`, but for what its `from_pretrained` keeps in float32."""
    keep = model._keep_in_fp32_modules or ()
    for name, parameter in model.named_parameters():
        if not any(part in keep for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def build_reasoner(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Reasoner, str | None]:
    """(the Reasoner on the meta device, the name of its family's decoder, if known). Raises InputError."""
    directory = PACKAGED / "reasoner" if name == "packaged" else Path(name)
    if directory.is_dir():
        index = read_index(directory / "model_index.json")
        facts: dict[str, Any] = {name: index.get(name) for name in ("expand_timesteps", "boundary_ratio")}
        facts["pipeline"] = index.get("_class_name")
    else:
        facts = known_facts(name, "reasoner")
    if facts["pipeline"] not in FAMILIES:
        raise InputError(f"{name} is a {facts['pipeline']}: the plan knows {', '.join(FAMILIES)}")
    settings = find_preset(facts["preset"]) if "preset" in facts else Settings()
    if directory.is_dir():
        optional = [part for part in ("text_encoder_2", "image_encoder") if (index.get(part) or [None])[0]]
        facts |= {part: json_object(directory / part / "config.json") for part in (*PARTS, *optional)}
        own = directory / "reasoner.json"
        settings = Settings.load(own) if own.is_file() else known_preset(name) or settings
    try:
        with META:
            return BUILDERS[FAMILIES[facts["pipeline"]]](facts, settings, dtype), facts.get("decoder")
    except Exception as error:  # the libraries raise anything of a config that is wrong
        if isinstance(error, InputError):
            raise
        raise InputError(f"--reasoner {name!r}: its configs make no model ({_short(error)})") from error


def _wan(facts: dict[str, Any], settings: Settings, dtype: torch.dtype) -> WanReasoner:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    def transformer() -> Any:
        return cast(WanTransformer3DModel.from_config(facts["transformer"]), dtype)

    boundary = facts.get("boundary_ratio")
    clip = facts.get("image_encoder")
    return WanReasoner(
        transformer(),
        AutoencoderKLWan.from_config(facts["vae"]),
        UMT5EncoderModel(UMT5Config(**facts["text_encoder"])).to(dtype),
        None,
        bool(facts.get("expand_timesteps")),
        settings,
        transformer_2=None if boundary is None else transformer(),
        boundary_ratio=boundary,
        image_encoder=None if clip is None else CLIPVisionModel(CLIPVisionConfig(**clip)).to(dtype),
    )


def _ltx(facts: dict[str, Any], settings: Settings, dtype: torch.dtype) -> LTXReasoner:
    from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    return LTXReasoner(
        cast(LTXVideoTransformer3DModel.from_config(facts["transformer"]), dtype),
        AutoencoderKLLTXVideo.from_config(facts["vae"]),
        T5EncoderModel(T5Config(**facts["text_encoder"])).to(dtype),
        None,
        facts["pipeline"] == "LTXConditionPipeline",
        settings,
    )


def _hunyuan_video15(facts: dict[str, Any], settings: Settings, dtype: torch.dtype) -> HunyuanVideo15Reasoner:
    from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
    from transformers import (
        Qwen2_5_VLTextConfig,
        Qwen2_5_VLTextModel,
        SiglipVisionConfig,
        SiglipVisionModel,
        T5Config,
        T5EncoderModel,
    )

    siglip = facts.get("image_encoder")
    return HunyuanVideo15Reasoner(
        cast(HunyuanVideo15Transformer3DModel.from_config(facts["transformer"]), dtype),
        AutoencoderKLHunyuanVideo15.from_config(facts["vae"]),
        Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**facts["text_encoder"])).to(dtype),
        None,
        T5EncoderModel(T5Config(**facts["text_encoder_2"])).to(dtype),
        None,
        None if siglip is None else SiglipVisionModel(SiglipVisionConfig(**siglip)).to(dtype),
        settings=settings,
    )


# the loader of a pipeline class (see `vlmteacher.reasoners`) -> the same model without weights
BUILDERS: dict[Any, Callable[[dict[str, Any], Settings, torch.dtype], Reasoner]] = {
    load_wan: _wan,
    load_ltx: _ltx,
    load_hunyuan_video15: _hunyuan_video15,
}


def build_teacher(name: str, dtype: torch.dtype = torch.bfloat16) -> QwenVLTeacher:
    """The Teacher on the meta device, with the packaged tokenizer: only numbers of tokens matter. Raises InputError."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    directory = PACKAGED / "teacher" if name == "packaged" else Path(name)
    config = json_object(directory / "config.json") if directory.is_dir() else known_facts(name, "teacher")["config"]
    if config.get("model_type", "qwen3_vl") != "qwen3_vl":
        raise InputError(f"--teacher {name!r} is a {config['model_type']}: the plan knows Qwen3-VL")
    tokenizer = load_tokenizer(str(PACKAGED / "teacher"))
    pads = ("image_pad", "video_pad", "vision_start", "vision_end")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {key: tokenizer.convert_tokens_to_ids(f"<|{pad}|>") for key, pad in zip(keys, pads, strict=True)}
    try:
        full = Qwen3VLConfig(**{k: v for k, v in config.items() if k not in ("model_type", "architectures")} | ids)
        full.text_config.pad_token_id = None
        with META:
            model = Qwen3VLForConditionalGeneration(full).to(dtype)
    except Exception as error:  # the libraries raise anything of a config that is wrong
        raise InputError(f"--teacher {name!r}: its config makes no model ({_short(error)})") from error
    if directory.is_dir():
        return QwenVLTeacher(
            model, tokenizer, *read_settings(str(directory), full.vision_config, local_files_only=True)
        )
    return QwenVLTeacher(model, tokenizer, VisionSettings(patch_size=full.vision_config.patch_size))


def build_decoder(name: str, dtype: torch.dtype = torch.bfloat16) -> SurrogateDecoder:
    if name == "packaged":
        name = str(PACKAGED / "decoder.safetensors")
    if Path(name).is_file():
        return SurrogateDecoder.from_checkpoint(name, dtype).to(META)
    facts = known_facts(name, "decoder")
    with META:
        decoder = SurrogateDecoder(**{key: value for key, value in facts.items() if key not in ("kind", "source")})
        return decoder.to(dtype).eval().requires_grad_(False)
