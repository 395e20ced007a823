"""Sampler settings of the published checkpoints (Tencent-Hunyuan/HunyuanVideo-1.5), and of others by their configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlmteacher.checkpoints.pretrained import read_config
from vlmteacher.errors import InputError
from vlmteacher.files import check_number
from vlmteacher.reasoners.sampling import SamplerSettings, even_timesteps

_480P = SamplerSettings(
    even_timesteps(50),
    shift=5.0,
    sampler="euler",
    guidance_scale=6.0,
    num_frames=121,
    height=480,
    width=848,
    max_sequence_length=1000,
)
_720P = replace(_480P, shift=7.0, height=720, width=1280)

PRESETS = {
    "hunyuan-video-1.5-480p": _480P,
    "hunyuan-video-1.5-480p-cfg-distilled": replace(_480P, guidance_scale=1.0),
    "hunyuan-video-1.5-480p-i2v-step-distilled": replace(
        _480P, timesteps=even_timesteps(8), shift=7.0, guidance_scale=1.0
    ),
    "hunyuan-video-1.5-720p-t2v": replace(_720P, shift=9.0),
    "hunyuan-video-1.5-720p-i2v": _720P,
    "hunyuan-video-1.5-720p-i2v-cfg-distilled": replace(_720P, guidance_scale=1.0),
}
HUB_IDS = {
    f"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{name}": f"hunyuan-video-1.5-{preset}"
    for name, preset in {
        "480p_t2v": "480p",
        "480p_i2v": "480p",
        "480p_t2v_distilled": "480p-cfg-distilled",
        "480p_i2v_distilled": "480p-cfg-distilled",
        "480p_i2v_step_distilled": "480p-i2v-step-distilled",
        "720p_t2v": "720p-t2v",
        "720p_i2v": "720p-i2v",
        "720p_i2v_distilled": "720p-i2v-cfg-distilled",
    }.items()
}


def check_preset(name: str, config: Mapping[str, Any], pipeline: str, changed: bool) -> None:
    """Raise InputError for a preset that contradicts the config of the transformer.

    changed: a few-step LoRA is merged into it.
    """
    words = name.split("-")
    if bool(config["use_meanflow"]) != ("step" in words) and not changed:
        what = "with" if "step" in words else "without"
        raise InputError(f"preset {name} is for a transformer {what} use_meanflow in its config, unlike {pipeline}'s")
    size = "480p" if config["target_size"] <= 640 else "720p"
    if size not in words:
        raise InputError(f"preset {name} is for another size than {pipeline}, a {size} model by its config")


def guidance_scale(guider: Mapping[str, Any], label: str) -> float:
    """The guidance scale of a guider's config. Raises InputError for a guider that does more than plain guidance."""
    remedy = "name a preset (--preset), or write a reasoner.json"
    if (kind := guider.get("_class_name")) != "ClassifierFreeGuidance":
        raise InputError(f"{label} is a {kind!r:.40}, and only ClassifierFreeGuidance is known: {remedy}")
    for entry, plain in (("guidance_rescale", 0), ("start", 0), ("stop", 1)):
        if guider.get(entry, plain) != plain:
            raise InputError(f"{label} says {entry} {guider[entry]!r:.40}, which is not known here: {remedy}")
    if not guider.get("enabled", True):
        return 1.0
    scale = guider.get("guidance_scale", 7.5)  # diffusers' default
    check_number(scale, f"{label}: guidance_scale")
    return scale + bool(guider.get("use_original_formulation"))  # v + g (v - v_negative)


def find_guidance(path_or_id: str, local_files_only: bool) -> float:
    """The guidance scale of a pipeline. Raises InputError (see `guidance_scale`)."""
    _, guider = read_config(path_or_id, "guider", "guider_config.json", local_files_only)
    return guidance_scale(guider, f"the guider of {path_or_id}")


def check_guidance(preset: str, path_or_id: str, local_files_only: bool) -> None:
    """Raise InputError for a preset with guidance on a pipeline whose guider has none, or the reverse.

    The preset decides where the guider is missing or of another kind.
    """
    try:
        guided, scale = PRESETS[preset].guided, find_guidance(path_or_id, local_files_only)
    except InputError:
        return
    if guided != (scale != 1):
        what, other = ("with", "none") if guided else ("without", f"a guidance of {scale:g}")
        raise InputError(
            f"preset {preset} is {what} guidance, and the guider of {path_or_id} says {other}: name another preset"
            " (--preset), or write a reasoner.json instead"
        )


def find_settings(path_or_id: str, config: Any, local_files_only: bool) -> SamplerSettings:
    """The sampler settings of a checkpoint of an unknown name, by its configs. Raises InputError."""
    _, scheduler = read_config(path_or_id, "scheduler", "scheduler_config.json", local_files_only)
    return settings_by_configs(config, scheduler.get("shift"), find_guidance(path_or_id, local_files_only))


def settings_by_configs(config: Any, shift: Any, guidance: float) -> SamplerSettings:
    """The sampler settings by the configs of transformer, scheduler and guider. Raises InputError."""
    size = "480p" if config.target_size <= 640 else "720p-i2v"
    known = PRESETS[f"hunyuan-video-1.5-{'480p-i2v-step-distilled' if config.use_meanflow else size}"]
    entries: dict[str, Any] = {"shift": shift, "guidance_scale": guidance}
    settings = replace(known, **entries)
    settings.check()
    return settings
