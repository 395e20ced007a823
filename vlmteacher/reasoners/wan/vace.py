"""Wan VACE: a video with frames that are given, here the first, the last, both or none.

A control branch, `vace_blocks`, reads the given frames and the mask of the others, and adds its outputs between the
blocks. Its inputs are the noisy latents and the control, with no LoRA before it, so it has no part in the backward of
the one-step prediction: the LoRA is on `blocks` alone, and has the names of Wan's. Reference images are left out: they
are further latent frames, sampled with the video.

Sources of the presets: the authors' defaults for these models (Wan-Video/Wan2.1, ``generate.py``).
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.media import ImageInput, fit_image
from vlmteacher.reasoners.condition import Condition
from vlmteacher.reasoners.family import Family
from vlmteacher.reasoners.wan.family import PRESETS as WAN_PRESETS
from vlmteacher.reasoners.wan.family import WAN, WAN_21_DECODERS
from vlmteacher.reasoners.wan.loading import adopt_wan, build_wan, load_wan
from vlmteacher.reasoners.wan.reasoner import WanReasoner, grey_video

_480P, _720P = (replace(WAN_PRESETS[f"wan2.1-t2v-{size}"], shift=16.0) for size in ("480p", "720p"))


class VACEReasoner(WanReasoner):
    """`WanVACETransformer3DModel` with the parts of a Wan model, one or two experts (see `WanReasoner`)."""

    architecture = "WanVACETransformer3DModel"
    default_settings = _480P

    def __init__(self, transformer: Any, vae: Any, *args: Any, **parts: Any) -> None:
        super().__init__(transformer, vae, *args, **parts)
        self.takes_last_image = True
        self.control_channels: int = transformer.config.vace_in_channels
        made = 2 * self.latent_channels + self.spatial_stride**2
        if self.control_channels != made:
            raise InputError(
                f"the transformer takes a control of {self.control_channels} channels, and its VAE makes {made}: they"
                " belong to different models"
            )

    def check_trainable(self) -> None:
        raise InputError("a VACE model cannot be trained: take a text-to-video model")

    def encode_images(
        self, image: ImageInput | None, last_image: ImageInput | None, num_frames: int, height: int, width: int
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """See `WanReasoner.encode_images`.

        The control has the latents of the given frames, grey in between, those of what is to be changed in them, which
        is nothing, and a mask, 1 on the frames to make, with a channel for each pixel of a latent cell.
        """
        video = grey_video(num_frames, height, width)
        mask = torch.ones(num_frames)
        for place, each in ((0, image), (-1, last_image)):
            if each is not None:
                video[place] = np.array(fit_image(each, height, width))
                mask[place] = 0
        given, changed = (self.encode_video(frames) for frames in (video, grey_video(num_frames, height, width)))
        # As the authors', this leaves the ends of the mask out: a latent frame has the mask of its middle.
        mask = F.interpolate(mask.to(given)[None, None], size=given.shape[2], mode="nearest-exact")
        mask = mask[..., None, None].expand(-1, self.spatial_stride**2, *given.shape[2:])
        return None, {"control_hidden_states": torch.cat([given, changed, mask], 1).to(self.dtype)}

    def blank_condition(self, num_frames: int, height: int, width: int) -> Condition:
        condition = super().blank_condition(num_frames, height, width)
        shape = 1, self.control_channels, *self.latent_shape(num_frames, height, width)[2:]
        return replace(condition, inputs={"control_hidden_states": torch.empty(shape, dtype=self.dtype)})


VACE = Family(
    name="Wan VACE",
    pipelines=("WanVACEPipeline",),
    transformer=VACEReasoner.architecture,
    blocks="blocks",
    load=partial(load_wan, VACEReasoner),
    build=partial(build_wan, VACEReasoner),
    adopt=partial(adopt_wan, VACEReasoner),
    presets={
        "wan2.1-vace-480p": _480P,
        "wan2.1-vace-720p": _720P,
        # with the LoRA for text-to-video: VACE has its blocks, and adds others
        "wan2.1-vace-lightx2v-4step": WAN_PRESETS["wan2.1-lightx2v-4step"],
    },
    hub_ids={
        "Wan-AI/Wan2.1-VACE-1.3B-diffusers": "wan2.1-vace-480p",
        "Wan-AI/Wan2.1-VACE-14B-diffusers": "wan2.1-vace-720p",
    },
    lora_targets=rf"blocks\.\d+\.(.+\.)?({'|'.join(map(re.escape, WAN.lora_targets))})",  # none of vace_blocks
    layers=WAN.layers,
    load_lora=WAN.load_lora,
    decoders=WAN_21_DECODERS,
)
