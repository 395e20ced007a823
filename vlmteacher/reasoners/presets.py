"""Presets: how published checkpoints are sampled, by name; each family declares its own.

For the hub ids in `HUB_IDS` the preset is used without being asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmteacher.errors import InputError
from vlmteacher.reasoners.registry import FAMILIES
from vlmteacher.reasoners.sampling import SamplerSettings

PRESETS: dict[str, SamplerSettings] = {name: preset for each in FAMILIES for name, preset in each.presets.items()}
HUB_IDS: dict[str, str] = {hub_id: preset for each in FAMILIES for hub_id, preset in each.hub_ids.items()}
FEW = 10  # steps; distilled models take fewer, base models more


def find_preset(name: str) -> SamplerSettings:
    """The settings of a preset. Raises InputError, which lists the names."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
    return PRESETS[name]


def known_name(*paths_or_ids: str) -> str | None:
    """The preset of the first known name: a hub id, or a directory that is named like one."""
    by_name = {key.lower(): preset for hub_id, preset in HUB_IDS.items() for key in (hub_id, hub_id.partition("/")[2])}
    for path_or_id in paths_or_ids:
        path = path_or_id.partition("@")[0].lower().rstrip("/")
        preset = by_name.get(path) or by_name.get(path.rpartition("/")[2])
        if preset:
            return preset
    return None


def known_preset(*paths_or_ids: str) -> SamplerSettings | None:
    """The settings of the preset `known_name`."""
    name = known_name(*paths_or_ids)
    return None if name is None else PRESETS[name]


def check_preset(name: str, index: Mapping[str, Any], pipeline: str) -> None:
    """Raise InputError for a preset of another model than the pipeline's, as far as ``model_index.json`` shows it.

    Compared are the family, whether an image is given, and what the family's `preset_misfit` knows. A preset with the
    same settings as one that fits is accepted.
    """
    if any(PRESETS[other] == PRESETS[name] and not _misfit(other, index) for other in PRESETS):
        return
    raise InputError(f"preset {name} is for {_misfit(name, index)}, which {pipeline} is not: name another (--preset)")


def _misfit(name: str, index: Mapping[str, Any]) -> str | None:
    """The kind of model that the preset is for and the pipeline is not; None where no difference shows."""
    kind, words = str(index["_class_name"]), name.split("-")
    family = next(each for each in FAMILIES if name in each.presets)
    if kind not in family.pipelines:
        return f"{family.name} models"
    for word, image in (("t2v", False), ("i2v", True), ("flf2v", True)):
        if word in words and ("ImageToVideo" in kind) != image:
            return f"models that are given {'an' if image else 'no'} image"
    return family.preset_misfit(words, index)


def check_distilled(name: str, known: str, pipeline: str) -> None:
    """Raise InputError for a distilled model's preset on an unchanged base model, or the reverse.

    known: the preset of the pipeline by its name.
    """
    preset, wanted = PRESETS[name], PRESETS[known]
    fewer = len(preset.timesteps) <= FEW < len(wanted.timesteps)
    if fewer or preset.guided != wanted.guided:
        remedy = "" if preset.guided else ", or add the --few-step-lora or --transformer that makes it one of those"
        raise InputError(
            f"preset {name} ({describe(preset)}) is not for {pipeline}, a model that is known to want"
            f" {known} ({describe(wanted)}): name that preset{remedy}"
        )


def describe(settings: SamplerSettings) -> str:
    """The settings of the sampler in a few words."""
    guidance = f"guidance {settings.guidance_scale:g}" if settings.guided else "no guidance"
    if settings.embedded_guidance is not None:
        guidance += f", embedded guidance {settings.embedded_guidance:g}"
    return f"{len(settings.timesteps)} steps, {settings.sampler}, shift {settings.shift:g}, {guidance}"
