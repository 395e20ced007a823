"""The models of a plan, on the meta device: from shipped facts, or from the configs in a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vlmteacher.checkpoints.pretrained import json_object, load_tokenizer
from vlmteacher.decoders.taehv import SurrogateDecoder
from vlmteacher.errors import InputError
from vlmteacher.planning.costs import META
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.loading import read_index
from vlmteacher.reasoners.presets import find_preset, known_preset
from vlmteacher.reasoners.registry import family_of_pipeline
from vlmteacher.reasoners.sampling import SamplerSettings
from vlmteacher.teachers.base import find_family
from vlmteacher.teachers.vlm import VLMTeacher

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


def build_reasoner(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Reasoner, str | None]:
    """(the Reasoner on the meta device, the name of its family's decoder, if known). Raises InputError."""
    directory = PACKAGED / "reasoner" if name == "packaged" else Path(name)
    if directory.is_dir():
        index = read_index(directory / "model_index.json")
        facts: dict[str, Any] = {name: index.get(name) for name in ("expand_timesteps", "boundary_ratio")}
        facts["pipeline"] = index.get("_class_name")
    else:
        facts = known_facts(name, "reasoner")
    family = family_of_pipeline(facts["pipeline"], name)
    settings = find_preset(facts["preset"]) if "preset" in facts else SamplerSettings()
    if directory.is_dir():
        optional = [part for part in ("text_encoder_2", "image_encoder") if (index.get(part) or [None])[0]]
        facts |= {part: json_object(directory / part / "config.json") for part in (*PARTS, *optional)}
        own = directory / "reasoner.json"
        settings = SamplerSettings.load(own) if own.is_file() else known_preset(name) or settings
    try:
        with META:
            return family.build(facts, settings, dtype), facts.get("decoder")
    except Exception as error:  # the libraries raise anything of a config that is wrong
        if isinstance(error, InputError):
            raise
        raise InputError(f"--reasoner {name!r}: its configs make no model ({_short(error)})") from error


def build_teacher(name: str, dtype: torch.dtype = torch.bfloat16) -> VLMTeacher:
    """The Teacher on the meta device, with the packaged tokenizer: only numbers of tokens matter. Raises InputError."""
    import transformers

    directory = PACKAGED / "teacher" if name == "packaged" else Path(name)
    read = directory.is_dir()
    facts = {"config": json_object(directory / "config.json")} if read else known_facts(name, "teacher")
    config = {key: value for key, value in facts["config"].items() if key != "architectures"}
    family = find_family(config.pop("model_type", None), f"--teacher {name!r}")
    tokenizer = family.with_vision_tokens(load_tokenizer(str(PACKAGED / "teacher")))
    config |= {entry: tokenizer.convert_tokens_to_ids(token) for entry, token in family.token_ids.items()}
    model_class = getattr(transformers, family.architecture)
    try:
        full = model_class.config_class(**config)
        full.text_config.pad_token_id = None
        # A dynamic one compares positions with a limit, which the meta device cannot; the cost is the same.
        full.text_config.rope_parameters["rope_type"] = "default"
        with META:
            model = model_class(full).to(dtype)
        defaults = family.processor_defaults(full).updated(facts.get("processor", {}), f"{name}: processor")
    except Exception as error:  # the libraries raise anything of a config that is wrong
        raise InputError(f"--teacher {name!r}: its config makes no model ({_short(error)})") from error
    if read:
        return family.from_parts(str(directory), model, tokenizer, local_files_only=True)
    return family(model, tokenizer, defaults)


def build_decoder(name: str, dtype: torch.dtype = torch.bfloat16) -> SurrogateDecoder:
    if name == "packaged":
        name = str(PACKAGED / "decoder.safetensors")
    if Path(name).is_file():
        return SurrogateDecoder.from_checkpoint(name, dtype).to(META)
    facts = known_facts(name, "decoder")
    with META:
        decoder = SurrogateDecoder(**{key: value for key, value in facts.items() if key not in ("kind", "source")})
        return decoder.to(dtype).eval().requires_grad_(False)
