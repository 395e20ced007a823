"""Build models from their configs: known models by their shipped ones, others from a directory.

Plans build them on the meta device; on another one they have the classes' own random weights, for benchmarks.
"""

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
OPTIONAL = ("text_encoder_2", "image_encoder", "connectors", "audio_vae")
PACKAGED = Path(__file__).parent.parent / "microworld" / "models"


def known_models(kind: str) -> list[str]:
    """The names of the known models of a kind: "reasoner", "teacher" or "decoder"."""
    return sorted(p.stem for p in KNOWN.glob("*.json") if json.loads(p.read_text())["kind"] == kind)


def read_known(name: str, kind: str) -> dict[str, Any]:
    """Read the shipped entry of a known model, by its name here or on the hub. Raises InputError.

    "distilled" in an entry lists hub ids of models with the same configs that are sampled in fewer steps or smaller.
    """
    for file in KNOWN.glob("*.json"):
        entry = json.loads(file.read_text())
        if entry["kind"] == kind and name in (file.stem, entry["source"], *entry.get("distilled", ())):
            return entry
    names = [*known_models(kind), *([] if kind == "decoder" else ["packaged"])]
    also = "a checkpoint file" if kind == "decoder" else "a local directory with its config files"
    raise InputError(f"unknown --{kind} {name!r}: choose from {', '.join(names)}, or give {also}")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def build_reasoner(
    name: str, dtype: torch.dtype = torch.bfloat16, device: torch.device = META
) -> tuple[Reasoner, str | None]:
    """Build a Reasoner without a tokenizer; returns it and the name of its surrogate decoder, or None.

    Raises InputError.
    """
    directory = PACKAGED / "reasoner" if name == "packaged" else Path(name)
    if directory.is_dir():
        index = read_index(directory / "model_index.json")
        entry: dict[str, Any] = {name: index.get(name) for name in ("expand_timesteps", "boundary_ratio")}
        entry["pipeline"] = index.get("_class_name")
    else:
        entry = read_known(name, "reasoner")
    family = family_of_pipeline(entry["pipeline"], name)
    if "preset" in entry:
        settings = find_preset(entry["preset"])
    else:  # that of `solve` for the same hub id
        settings = known_preset(name, entry.get("source", name)) or SamplerSettings()
    if directory.is_dir():
        optional = [part for part in OPTIONAL if (index.get(part) or [None])[0]]
        entry |= {part: json_object(directory / part / "config.json") for part in (*PARTS, *optional)}
        own = directory / "reasoner.json"
        settings = SamplerSettings.load(own) if own.is_file() else settings
    try:
        with device:
            return family.build(entry, settings, dtype), entry.get("decoder")
    except Exception as error:  # of a wrong config, the libraries raise anything
        if isinstance(error, InputError):
            raise
        raise InputError(f"--reasoner {name!r}: its configs make no model ({_short(error)})") from error


def build_teacher(name: str, dtype: torch.dtype = torch.bfloat16, device: torch.device = META) -> VLMTeacher:
    """Build a Teacher with the packaged tokenizer, since only numbers of tokens matter. Raises InputError."""
    import transformers

    directory = PACKAGED / "teacher" if name == "packaged" else Path(name)
    read = directory.is_dir()
    entry = {"config": json_object(directory / "config.json")} if read else read_known(name, "teacher")
    config = {key: value for key, value in entry["config"].items() if key != "architectures"}
    family = find_family(config.pop("model_type", None), f"--teacher {name!r}")
    tokenizer = family.with_vision_tokens(load_tokenizer(str(PACKAGED / "teacher")))
    config |= {entry: tokenizer.convert_tokens_to_ids(token) for entry, token in family.token_ids.items()}
    model_class = getattr(transformers, family.architecture)
    try:
        full = model_class.config_class(**config)
        full.text_config.pad_token_id = None
        # A dynamic one compares positions with a limit, which the meta device cannot; the cost is the same.
        full.text_config.rope_parameters["rope_type"] = "default"
        with device:
            model = model_class(full).to(dtype)
        defaults = family.processor_defaults(full).updated(entry.get("processor", {}), f"{name}: processor")
    except Exception as error:  # of a wrong config, the libraries raise anything
        raise InputError(f"--teacher {name!r}: its config makes no model ({_short(error)})") from error
    if read:
        return family.from_parts(str(directory), model, tokenizer, local_files_only=True)
    return family(model, tokenizer, defaults)


def build_decoder(name: str, dtype: torch.dtype = torch.bfloat16, device: torch.device = META) -> SurrogateDecoder:
    """Build a surrogate decoder: a known one, "packaged", or that of a checkpoint file. Raises InputError."""
    if name == "packaged":
        name = str(PACKAGED / "decoder.safetensors")
    if Path(name).is_file():
        return SurrogateDecoder.from_checkpoint(name, dtype).to(device)
    entry = read_known(name, "decoder")
    with device:
        decoder = SurrogateDecoder(**{key: value for key, value in entry.items() if key not in ("kind", "source")})
        return decoder.to(dtype).eval().requires_grad_(False)
