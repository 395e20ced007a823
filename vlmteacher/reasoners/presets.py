"""How published checkpoints want to be sampled, by name; the hub ids for which a preset is taken without asking.

Sources: the models' own inference configs (Wan-Video/Wan2.1 and Wan2.2, FastVideo, LightX2V, Wan2.2-TI2V-5B-Turbo,
Lightricks/LTX-Video, Tencent-Hunyuan/HunyuanVideo-1.5) and the examples of diffusers' pipelines. The own solver of the
base Wan models is UniPC; here they are sampled by Euler steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlmteacher.errors import InputError
from vlmteacher.reasoners.base import Settings, even_timesteps

_FOUR_STEPS = (1000.0, 750.0, 500.0, 250.0)
_FASTWAN = (1000.0, 757.0, 522.0)  # already shifted
_WAN_480P = Settings(
    even_timesteps(50), shift=3.0, sampler="euler", guidance_scale=5.0, num_frames=81, height=480, width=832, fps=16.0
)
_WAN_720P = replace(_WAN_480P, shift=5.0, height=720, width=1280)
_LIGHTX2V = replace(_WAN_480P, timesteps=_FOUR_STEPS, shift=5.0, guidance_scale=1.0)

_HUNYUAN_480P = Settings(
    even_timesteps(50),
    shift=5.0,
    sampler="euler",
    guidance_scale=6.0,
    num_frames=121,
    height=480,
    width=848,
    max_sequence_length=1000,
)
_HUNYUAN_720P = replace(_HUNYUAN_480P, shift=7.0, height=720, width=1280)

PRESETS: dict[str, Settings] = {
    # Wan 2.1
    "wan2.1-t2v-480p": _WAN_480P,
    "wan2.1-t2v-720p": _WAN_720P,
    "wan2.1-i2v-480p": _WAN_480P,
    "wan2.1-i2v-720p": _WAN_720P,
    "wan2.1-lightx2v-4step": _LIGHTX2V,
    "fastwan2.1-t2v-480p": Settings(_FASTWAN, num_frames=61, height=448, width=832, fps=16.0),
    # Wan 2.2
    "wan2.2-ti2v-5b": Settings(even_timesteps(50), shift=5.0, sampler="euler", guidance_scale=5.0, num_frames=121),
    "wan2.2-ti2v-5b-turbo": Settings(_FOUR_STEPS),  # its inference takes the levels as they are ...
    "wan2.2-ti2v-5b-turbo-shifted": Settings(_FOUR_STEPS, shift=5.0),  # ... and its training shifts them
    "fastwan2.2-ti2v-5b": Settings(_FASTWAN, num_frames=121),
    "wan2.2-t2v-a14b": replace(
        _WAN_720P, timesteps=even_timesteps(40), shift=12.0, guidance_scale=4.0, guidance_scale_2=3.0
    ),
    "wan2.2-i2v-a14b": replace(_WAN_720P, timesteps=even_timesteps(40), guidance_scale=3.5),
    "wan2.2-a14b-lightx2v-4step": _LIGHTX2V,
    # LTX-Video
    "ltx-0.9.8-distilled": Settings(
        # the levels that the checkpoint was distilled at
        (1000.0, 993.7, 987.5, 981.2, 975.0, 909.4, 725.0, 421.9),
        sampler="euler",
        num_frames=121,
        width=1216,
        fps=30.0,
        max_sequence_length=256,
    ),
    # HunyuanVideo-1.5
    "hunyuan-video-1.5-480p": _HUNYUAN_480P,
    "hunyuan-video-1.5-480p-cfg-distilled": replace(_HUNYUAN_480P, guidance_scale=1.0),
    "hunyuan-video-1.5-480p-i2v-step-distilled": replace(
        _HUNYUAN_480P, timesteps=even_timesteps(8), shift=7.0, guidance_scale=1.0
    ),
    "hunyuan-video-1.5-720p-t2v": replace(_HUNYUAN_720P, shift=9.0),
    "hunyuan-video-1.5-720p-i2v": _HUNYUAN_720P,
    "hunyuan-video-1.5-720p-i2v-cfg-distilled": replace(_HUNYUAN_720P, guidance_scale=1.0),
}

HUB_IDS: dict[str, str] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan2.1-t2v-480p",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan2.1-t2v-720p",
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": "wan2.1-i2v-480p",
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": "wan2.1-i2v-720p",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "wan2.2-ti2v-5b",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan2.2-t2v-a14b",
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": "wan2.2-i2v-a14b",
    "quanhaol/Wan2.2-TI2V-5B-Turbo": "wan2.2-ti2v-5b-turbo",
    "FastVideo/FastWan2.1-T2V-1.3B-Diffusers": "fastwan2.1-t2v-480p",
    "FastVideo/FastWan2.1-T2V-14B-480P-Diffusers": "fastwan2.1-t2v-480p",
    "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers": "fastwan2.2-ti2v-5b",
    "Lightricks/LTX-Video-0.9.7-distilled": "ltx-0.9.8-distilled",  # distilled at the same levels
    "Lightricks/LTX-Video-0.9.8-13B-distilled": "ltx-0.9.8-distilled",
    **{
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
    },
}


FAMILY = {"wan": "Wan", "fastwan": "Wan", "ltx": "LTX", "hunyuan": "HunyuanVideo15"}  # preset -> pipelines' class
FEW = 10  # steps; distilled models take fewer, base models more


def find_preset(name: str) -> Settings:
    """The settings of a preset. Raises InputError, which lists the names."""
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}: it can be {', '.join(PRESETS)}")
    return PRESETS[name]


def known_name(*paths_or_ids: str) -> str | None:
    """The preset of the first that is known: a hub id, or a directory that still has the name of one."""
    by_name = {key.lower(): preset for hub_id, preset in HUB_IDS.items() for key in (hub_id, hub_id.partition("/")[2])}
    for path_or_id in paths_or_ids:
        path = path_or_id.partition("@")[0].lower().rstrip("/")
        preset = by_name.get(path) or by_name.get(path.rpartition("/")[2])
        if preset:
            return preset
    return None


def known_preset(*paths_or_ids: str) -> Settings | None:
    """The settings of `known_name`."""
    name = known_name(*paths_or_ids)
    return None if name is None else PRESETS[name]


def check_preset(name: str, index: Mapping[str, Any], pipeline: str) -> None:
    """Raise InputError for a preset of another model than the pipeline's, as far as model_index.json shows it.

    That is its family, whether an image is given, and the kind of Wan model. A preset with the settings of one that
    fits is fine.
    """
    if any(PRESETS[other] == PRESETS[name] and not _misfit(other, index) for other in PRESETS):
        return
    raise InputError(f"preset {name} is for {_misfit(name, index)}, which {pipeline} is not: name another (--preset)")


def _misfit(name: str, index: Mapping[str, Any]) -> str | None:
    """What the preset is for and the pipeline is not; None where nothing is seen."""
    kind, words = str(index["_class_name"]), name.split("-")
    family = next(family for start, family in FAMILY.items() if name.startswith(start))
    if not kind.startswith(family):
        return f"{family} models"
    for word, image in (("t2v", False), ("i2v", True)):
        if word in words and ("ImageToVideo" in kind) != image:
            return f"models that are given {'an' if image else 'no'} image"
    if family == "Wan":
        two, tokens = bool((index.get("transformer_2") or [None])[0]), bool(index.get("expand_timesteps"))
        for wanted, has, what in (("a14b", two, "models of two experts (A14B)"), ("ti2v", tokens, "Wan 2.2 TI2V-5B")):
            if (wanted in words) != has:
                return what if wanted in words else "a single Wan model that is not TI2V-5B"
    return None


def check_distilled(name: str, known: str, pipeline: str) -> None:
    """Raise InputError for a distilled model's preset on a base model as it is, and the other way round.

    known: the preset that the pipeline is known to want.
    """
    preset, wanted = PRESETS[name], PRESETS[known]
    fewer = len(preset.timesteps) <= FEW < len(wanted.timesteps)
    if fewer or preset.guided != wanted.guided:
        remedy = "" if preset.guided else ", or add the --few-step-lora or --transformer that makes it one of those"
        raise InputError(
            f"preset {name} ({describe(preset)}) is not for {pipeline}, a model that is known to want"
            f" {known} ({describe(wanted)}): name that preset{remedy}"
        )


def check_config(name: str, config: Mapping[str, Any], pipeline: str, changed: bool) -> None:
    """Raise InputError for a preset that the config of a HunyuanVideo-1.5 transformer speaks against.

    changed: a few-step LoRA is merged into it.
    """
    if "use_meanflow" not in config:
        return
    words = name.split("-")
    if bool(config["use_meanflow"]) != ("step" in words) and not changed:
        what = "with" if "step" in words else "without"
        raise InputError(f"preset {name} is for a transformer {what} use_meanflow in its config, unlike {pipeline}'s")
    size = "480p" if config["target_size"] <= 640 else "720p"
    if size not in words:
        raise InputError(f"preset {name} is for another size than {pipeline}, a {size} model by its config")


def describe(settings: Settings) -> str:
    """How it samples, in a few words."""
    guidance = f"guidance {settings.guidance_scale:g}" if settings.guided else "no guidance"
    return f"{len(settings.timesteps)} steps, {settings.sampler}, shift {settings.shift:g}, {guidance}"
