"""Loading a Reasoner: a diffusers pipeline, with another transformer or a few-step LoRA where they are given."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlmteacher import arguments
from vlmteacher.checkpoints.hub import find_file, only_local, pinned
from vlmteacher.checkpoints.pretrained import json_object, refusing
from vlmteacher.errors import InputError, Notice
from vlmteacher.files import check_number
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.family import Family
from vlmteacher.reasoners.few_step_lora import EXPERTS, check_experts, merge_few_step_loras, read_few_step_loras
from vlmteacher.reasoners.presets import PRESETS, check_distilled, check_preset, describe, find_preset, known_name
from vlmteacher.reasoners.quantization import use_known_products
from vlmteacher.reasoners.registry import family_of_pipeline
from vlmteacher.reasoners.sampling import SamplerSettings
from vlmteacher.torch_modes import plain_torch

# entries of an index that name a part by its library and class
PARTS = re.compile(
    r"(transformer|tokenizer|text_encoder)(_2)?|vae|scheduler|guider|feature_extractor|image_(enc|process)\w+"
)


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
    keep_quantized: Sequence[str] = (),
) -> Reasoner:
    """Load the Reasoner of a diffusers pipeline: a local directory or a hub id.

    The family follows from the class in ``model_index.json``. The sampler's settings and the default sizes are those of
    `preset`, of a ``reasoner.json`` beside the index, of the preset of the hub id, or the family's, in this order.

    Args:
        dtype: of the transformer and the text encoder.
        local_files_only: never ask the network; None asks it where it is needed and can be reached.
        transformer: a transformer of the same class that replaces the pipeline's: a directory or hub id (of a
            transformer or of a whole pipeline) or a single ``.safetensors`` or ``.gguf`` file, in diffusers' names or
            the original ones. Two experts: (high noise, low noise).
        few_step_lora: a LoRA file (`read_lora`) that makes the model a few-step one; it is merged into the weights. Two
            experts: two files, or one of both. It changes how the model is sampled, so it needs a `preset` or a
            ``reasoner.json``.
        preset: a name in ``presets.PRESETS``.
        lora_partial: leave out the layers of the few-step LoRA that the model does not have.
        keep_quantized: methods by which a transformer that is quantised in its files stays so; others are dequantised.

    A Notice says what is assumed; the Reasoner's `notes` keep it.

    Raises:
        InputError: the model cannot be found or read, is of no known family, or its parts do not fit together.
    """
    name = os.path.expanduser(os.fspath(path_or_id))
    transformers, loras = _paths(transformer), _paths(few_step_lora)
    if local_files_only is None:
        remote = [each for each in (name, *transformers) if not os.path.exists(each)]
        local_files_only = not remote or only_local(remote[0])
    index_file = find_file(name, "model_index.json", local_files_only)
    if index_file is None:
        raise InputError(f"{name} is no diffusers pipeline: it has no model_index.json")
    index = read_index(index_file)
    family = family_of_pipeline(index["_class_name"], name)
    experts = [each for each in EXPERTS if (index.get(each) or [None])[0]] or ["transformer"]
    check_experts("transformer", transformers, experts, name)
    settings, notes = _settings(family, name, index, transformers, loras, preset, local_files_only)
    few_step_loras = read_few_step_loras(loras, experts, name, lora_partial, len(transformers))
    where = pinned(name, index_file.parent, local_files_only)
    given = {"transformer": transformers, "keep_quantized": keep_quantized}
    parts = {part: value for part, value in given.items() if value}
    with refusing(name):
        reasoner = family.load(where, index, settings, dtype, local_files_only, **parts)
        if preset is not None:
            family.check_preset(preset, reasoner.transformer.config, name, bool(loras))
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


@plain_torch()
def adopt_reasoner(pipeline: Any, preset: str | None = None) -> Reasoner:
    """The Reasoner of a loaded pipeline of diffusers: its own parts, which stay where they are and are frozen.

    The sampler's settings are those of `preset`, of the preset of the pipeline's hub id, of a ``reasoner.json`` in its
    local directory, or the family's, in this order; what is assumed is a Notice. Raises InputError for an object of
    another kind, a pipeline of no known family, and a preset of another model.
    """
    kind, config = type(pipeline).__name__, getattr(pipeline, "config", None)
    if not isinstance(config, Mapping) or not hasattr(pipeline, "transformer"):
        raise InputError(f"pipeline must be a loaded pipeline of diffusers, not {arguments.show(pipeline)}")
    name = str(config.get("_name_or_path") or kind)
    family = family_of_pipeline(kind, name)
    settings, notes = _settings(family, name, {**config, "_class_name": kind}, (), (), preset, True, adopted=True)
    with refusing(name):
        reasoner = family.adopt(pipeline, settings)
        for part in EXPERTS:
            use_known_products(getattr(pipeline, part, None), f"{name} ({part})")
    if preset is not None:
        family.check_preset(preset, reasoner.transformer.config, name, False)
    if settings is None:
        notes["sampling"] = f"assumed: {describe(reasoner.settings)}"
        warnings.warn(f"how {name} is to be sampled is not known; {notes['sampling']} (preset says it)", Notice, 2)
    reasoner.notes = notes
    return reasoner


def _paths(given: str | Sequence[str] | None) -> list[str]:
    return [os.path.expanduser(path) for path in ([given] if isinstance(given, str) else given or ())]


def _settings(
    family: Family,
    name: str,
    index: Mapping[str, Any],
    transformers: Sequence[str],
    loras: Sequence[str],
    preset: str | None,
    local_files_only: bool,
    adopted: bool = False,
) -> tuple[SamplerSettings | None, dict[str, str]]:
    """The sampler's settings, None where nothing says them, and a note of what is assumed. Raises InputError.

    adopted: `name` may be that of a pipeline that is no local directory: nothing is looked up on the hub.
    """
    settings_file = None if adopted and not os.path.isdir(name) else find_file(name, "reasoner.json", local_files_only)
    known = known_name(*transformers or [name])  # None for another transformer, of no known name
    if preset is not None:
        settings = find_preset(preset)
        check_preset(preset, index, name)
        if not loras and not settings_file:
            if known:
                check_distilled(preset, known, ", ".join(transformers) or name)
            elif family.check_guidance and not transformers and not adopted:
                family.check_guidance(preset, name, local_files_only)
        return settings, {}
    if settings_file:
        return SamplerSettings.load(settings_file), {}
    if loras:
        raise InputError(f"{', '.join(loras)} changes how {name} is sampled: name a preset ({', '.join(PRESETS)})")
    if known:
        return PRESETS[known], {}
    if assumed := known_name(name):
        return PRESETS[assumed], {"sampling": f"assumed: {', '.join(transformers)} as {name}, {assumed}"}
    return None, {}


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
