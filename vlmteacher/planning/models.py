"""The models of a plan, on the meta device: from shipped facts, or from the configs in a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vlmteacher.decoders.taehv import TinyVideoDecoder
from vlmteacher.errors import InputError
from vlmteacher.planning.costs import META
from vlmteacher.reasoners.base import Settings
from vlmteacher.reasoners.wan import WanReasoner
from vlmteacher.teachers.preprocessing import VisionSettings, read_settings
from vlmteacher.teachers.qwen_vl import QwenVLTeacher

KNOWN = Path(__file__).parent.parent / "known_models"
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


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("not an object")
        return found
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be used ({error}): a config.json of the model is needed there") from error


def cast(model: Any, dtype: torch.dtype) -> Any:
    """A diffusers model in `dtype`, but for what its `from_pretrained` keeps in float32."""
    keep = model._keep_in_fp32_modules or ()
    for name, parameter in model.named_parameters():
        if not any(part in keep for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def build_reasoner(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[WanReasoner, str | None]:
    """(the Reasoner on the meta device, the name of its family's decoder, if known). Raises InputError."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    directory = PACKAGED / "reasoner" if name == "packaged" else Path(name)
    settings, decoder = Settings(), None
    if directory.is_dir():
        index = _read(directory / "model_index.json")
        if index.get("_class_name") not in ("WanPipeline", "WanImageToVideoPipeline"):
            raise InputError(f"{name} is a {index.get('_class_name')}: the plan knows Wan pipelines")
        facts: dict[str, Any] = {
            part: _read(directory / part / "config.json") for part in ("transformer", "vae", "text_encoder")
        } | {"expand_timesteps": bool(index.get("expand_timesteps"))}
        if (directory / "reasoner.json").is_file():
            settings = Settings.load(directory / "reasoner.json")
    else:
        facts = known_facts(name, "reasoner")
        decoder = facts["decoder"]
    try:
        with META:
            transformer = cast(WanTransformer3DModel.from_config(facts["transformer"]), dtype)
            vae = AutoencoderKLWan.from_config(facts["vae"])
            text_encoder = UMT5EncoderModel(UMT5Config(**facts["text_encoder"])).to(dtype)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"--reasoner {name!r}: its configs make no model ({str(error).splitlines()[0]})") from error
    if transformer.config.in_channels != vae.config.z_dim:
        raise InputError(f"--reasoner {name!r} appends its image as channels (Wan 2.1 I2V): it cannot be taught")
    return WanReasoner(transformer, vae, text_encoder, None, facts["expand_timesteps"], settings), decoder


def build_teacher(name: str, dtype: torch.dtype = torch.bfloat16) -> QwenVLTeacher:
    """The Teacher on the meta device, with the packaged tokenizer: only numbers of tokens matter. Raises InputError."""
    from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    directory = PACKAGED / "teacher" if name == "packaged" else Path(name)
    config = _read(directory / "config.json") if directory.is_dir() else known_facts(name, "teacher")["config"]
    if config.get("model_type", "qwen3_vl") != "qwen3_vl":
        raise InputError(f"--teacher {name!r} is a {config['model_type']}: the plan knows Qwen3-VL")
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED / "teacher", local_files_only=True)
    pads = ("image_pad", "video_pad", "vision_start", "vision_end")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {key: tokenizer.convert_tokens_to_ids(f"<|{pad}|>") for key, pad in zip(keys, pads, strict=True)}
    try:
        full = Qwen3VLConfig(**{k: v for k, v in config.items() if k not in ("model_type", "architectures")} | ids)
        full.text_config.pad_token_id = None
        with META:
            model = Qwen3VLForConditionalGeneration(full).to(dtype)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise InputError(f"--teacher {name!r}: its config makes no model ({str(error).splitlines()[0]})") from error
    if directory.is_dir():
        return QwenVLTeacher(
            model, tokenizer, *read_settings(str(directory), full.vision_config, local_files_only=True)
        )
    return QwenVLTeacher(model, tokenizer, VisionSettings(patch_size=full.vision_config.patch_size))


def build_decoder(name: str, dtype: torch.dtype = torch.bfloat16) -> TinyVideoDecoder:
    if name == "packaged":
        name = str(PACKAGED / "decoder.safetensors")
    if Path(name).is_file():
        return TinyVideoDecoder.from_checkpoint(name, dtype).to(META)
    facts = known_facts(name, "decoder")
    with META:
        return TinyVideoDecoder(facts["latent_channels"], patch=facts["patch"]).to(dtype).eval().requires_grad_(False)
