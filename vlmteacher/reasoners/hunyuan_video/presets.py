"""Sampler settings of the published checkpoints.

Sources: Tencent/HunyuanVideo and HunyuanVideo-I2V (shift 7, embedded guidance 6, 50 steps, 129 frames of 720p), the
examples of diffusers' pipelines, hao-ai-lab/FastVideo's inference scripts and model card (FastHunyuan: 6 steps, shift
17, 125 frames). HunyuanVideo-I2V's authors give shift 17 for more motion and 7 for stability.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlmteacher.errors import InputError
from vlmteacher.reasoners.sampling import SamplerSettings, even_timesteps

_720P = SamplerSettings(
    even_timesteps(50),
    shift=7.0,
    sampler="euler",
    embedded_guidance=6.0,
    num_frames=129,
    height=720,
    width=1280,
    max_sequence_length=256,
)

PRESETS = {
    "hunyuan-video-t2v": _720P,
    "hunyuan-video-i2v": _720P,
    "hunyuan-video-i2v-33ch": replace(_720P, embedded_guidance=None, num_frames=125),  # of 129, of which 4 are cut
    "fasthunyuan-t2v": replace(_720P, timesteps=even_timesteps(6), shift=17.0, num_frames=125),
}
HUB_IDS = {
    "hunyuanvideo-community/HunyuanVideo": "hunyuan-video-t2v",
    "hunyuanvideo-community/HunyuanVideo-I2V": "hunyuan-video-i2v",
    "hunyuanvideo-community/HunyuanVideo-I2V-33ch": "hunyuan-video-i2v-33ch",
    "FastVideo/FastHunyuan-diffusers": "fasthunyuan-t2v",
}


def check_preset(name: str, config: Mapping[str, Any], pipeline: str, changed: bool) -> None:
    """Raise InputError for a preset of the other kind of image-to-video model, by the transformer's config."""
    channels = config["image_condition_type"] == "latent_concat"
    if channels != ("33ch" in name.split("-")):
        other = "clean first latent frame" if channels else "further channels"
        raise InputError(f"preset {name} is for a model that is given an image as {other}, unlike {pipeline}")
