"""Reasoners: the video models that are taught."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vlmteacher.checkpoints.hub import find_file, only_local, pinned
from vlmteacher.checkpoints.pretrained import json_object, refusing
from vlmteacher.errors import InputError, Notice
from vlmteacher.files import check_number
from vlmteacher.reasoners.base import Condition, Noise, Reasoner, Settings
from vlmteacher.reasoners.few_step_lora import (
    EXPERTS,
    check_experts,
    merge_few_step_loras,
    read_few_step_loras,
)
from vlmteacher.reasoners.hunyuan_video15 import load_hunyuan_video15
from vlmteacher.reasoners.ltx import load_ltx
from vlmteacher.reasoners.presets import (
    PRESETS,
    check_config,
    check_distilled,
    check_preset,
    describe,
    find_preset,
    known_name,
)
from vlmteacher.reasoners.wan import load_wan
from vlmteacher.torch_modes import plain_torch

__all__ = ["Condition", "Noise", "Reasoner", "Settings", "load_reasoner"]

# entries of an index that name a part by its library and class
PARTS = re.compile(
    r"(transformer|tokenizer|text_encoder)(_2)?|vae|scheduler|guider|feature_extractor|image_(enc|process)\w+"
)
# diffusers pipeline class -> loader of its family
FAMILIES: dict[str, Callable[..., Reasoner]] = {
    "WanPipeline": load_wan,
    "WanImageToVideoPipeline": load_wan,
    "LTXPipeline": load_ltx,
    "LTXImageToVideoPipeline": load_ltx,
    "LTXConditionPipeline": load_ltx,
    "HunyuanVideo15Pipeline": load_hunyuan_video15,
    "HunyuanVideo15ImageToVideoPipeline": load_hunyuan_video15,
}


@plain_torch()
def load_reasoner(
    path_or_id: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    local_files_only: bool | None = None,
    *,
    transformer: str | Sequence[str] | None = None,
    few_step_lora: str | Sequence[str] | None = None,
    preset: str | None = None,
    lora_partial: bool = False,
) -> Reasoner:
    """Load the Reasoner of a diffusers pipeline: a local directory or a hub id.

    The family follows from the class in ``model_index.json``. How it samples, and its sizes, are those of `preset`, of
    a ``reasoner.json`` beside the index, of the preset that is known for the hub id, or the family's, in this order.

    Args:
        dtype: of the transformer and the text encoder.
        local_files_only: never ask the network; by default it is asked when it is needed and can be reached.
        transformer: a transformer of the same class that comes in the place of the pipeline's: a directory or hub id
            (of a transformer or of a whole pipeline) or a single ``.safetensors`` file, in diffusers' names or the
            original ones. Two experts: (high noise, low noise).
        few_step_lora: a LoRA file (`read_lora`) that makes the model a few-step one; it is merged into the weights. Two
            experts: two files, or one of both. Needs a `preset` or a ``reasoner.json``, for it changes how the model is
            sampled.
        preset: a name in ``presets.PRESETS``.
        lora_partial: leave out what of the few-step LoRA the model has no place for.

    What is assumed is told by a Notice and stands in the Reasoner's `notes`.

    Raises:
        InputError: it cannot be found or read, is of no known family, or the parts do not fit together.
    """
    name = os.path.expanduser(os.fspath(path_or_id))
    parts = {
        option: [os.path.expanduser(each) for each in ([given] if isinstance(given, str) else given)]
        for option, given in (("transformer", transformer), ("few_step_lora", few_step_lora))
        if given
    }
    loras = parts.pop("few_step_lora", [])
    if local_files_only is None:
        away = [each for each in (name, *parts.get("transformer", ())) if not os.path.exists(each)]
        local_files_only = not away or only_local(away[0])
    index_file = find_file(name, "model_index.json", local_files_only)
    if index_file is None:
        raise InputError(f"{name} is no diffusers pipeline: it has no model_index.json")
    index = read_index(index_file)
    family = index["_class_name"]
    if family not in FAMILIES:
        raise InputError(f"{name} is a {family}: the known Reasoners are {', '.join(FAMILIES)}")
    experts = [each for each in EXPERTS if (index.get(each) or [None])[0]] or ["transformer"]
    transformers = parts.get("transformer", [])
    check_experts("transformer", transformers, experts, name)
    known = known_name(*transformers) or known_name(name)
    as_known = known_name(*transformers or [name])  # None for another transformer, of no known name
    settings: Settings | None = None
    notes: dict[str, str] = {}
    if preset is not None:
        settings = find_preset(preset)
        check_preset(preset, index, name)
        if as_known and not loras and not find_file(name, "reasoner.json", local_files_only):
            check_distilled(preset, as_known, ", ".join(transformers) or name)
    elif settings_file := find_file(name, "reasoner.json", local_files_only):
        settings = Settings.load(settings_file)
    elif loras:
        raise InputError(f"{few_step_lora} changes how {name} is sampled: name a preset ({', '.join(PRESETS)})")
    elif known:
        settings = PRESETS[known]
        if not as_known:
            notes["sampling"] = f"assumed: {', '.join(transformers)} as {name}, {known}"
    few_step_loras = read_few_step_loras(loras, experts, name, lora_partial, len(transformers))
    where = pinned(name, index_file.parent, local_files_only)
    with refusing(name):
        reasoner = FAMILIES[family](where, index, settings, dtype, local_files_only, **parts)
        if preset is not None:
            check_config(preset, reasoner.transformer.config, name, changed=bool(loras))
        notes |= merge_few_step_loras(reasoner, few_step_loras, lora_partial)
    mean, std = reasoner.latents_mean, reasoner.latents_std
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise InputError(f"{name}: the VAE's latents_mean or latents_std are not finite, or a std is not above 0")
    if settings is None:
        notes["sampling"] = f"assumed: {describe(reasoner.settings)}"
    if "sampling" in notes:
        warnings.warn(f"how {name} is to be sampled is not known; {notes['sampling']} (--preset says it)", Notice, 2)
    elif loras and reasoner.settings.guided:
        warnings.warn(f"few_step_lora with {describe(reasoner.settings)}, as base models are sampled", Notice, 2)
    reasoner.notes = notes
    return reasoner


def read_index(path: Path) -> dict[str, Any]:
    """A model_index.json. Raises InputError where an entry is not of the kind that a pipeline's is."""
    index = json_object(path)
    if not isinstance(index.get("_class_name"), str):
        raise InputError(f"{path} is no diffusers pipeline index: it does not name its _class_name")
    for name, part in index.items():
        of_part = isinstance(part, list) or (PARTS.fullmatch(name) and part is not None)
        if of_part and not (isinstance(part, list) and len(part) == 2 and all(isinstance(x, str | None) for x in part)):
            raise InputError(f"{path}: {name} must be a library and a class, not {part!r:.60}")
    if index.get("boundary_ratio") is not None:
        check_number(index["boundary_ratio"], f"{path}: boundary_ratio", least=0)
    if not isinstance(index.get("expand_timesteps"), bool | None):
        raise InputError(f"{path}: expand_timesteps must be true or false, not {index['expand_timesteps']!r:.40}")
    return index
