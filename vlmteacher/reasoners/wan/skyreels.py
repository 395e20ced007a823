"""SkyReels-V2: Wan 2.1's networks trained further, for text, for a first frame, or by diffusion forcing.

A diffusion-forcing model (DF) has a timestep for each latent frame. It is sampled in diffusers' synchronous mode, with
one timestep for all frames but those given: a clean first latent frame at timestep 0, and a clean last one behind the
video's. The asynchronous mode and videos in several windows (``ar_step``, ``overlap_history``) have no one-step
prediction of the whole video, and are left out.

Sources of the presets: the README of SkyworkAI/SkyReels-V2 and diffusers' pipelines. No few-step models are published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmteacher.errors import InputError
from vlmteacher.media import ImageInput
from vlmteacher.reasoners.condition import Condition, with_first_frame
from vlmteacher.reasoners.family import Family
from vlmteacher.reasoners.sampling import SamplerSettings, even_timesteps
from vlmteacher.reasoners.wan.family import WAN, WAN_21_DECODERS
from vlmteacher.reasoners.wan.loading import adopt_wan, build_wan, load_wan
from vlmteacher.reasoners.wan.reasoner import WanReasoner

_540P = SamplerSettings(
    even_timesteps(50), shift=8.0, sampler="euler", guidance_scale=6.0, num_frames=97, height=544, width=960
)
_720P = replace(_540P, num_frames=121, height=720, width=1280)


class SkyReelsReasoner(WanReasoner):
    """`SkyReelsV2Transformer3DModel` with the parts of a Wan 2.1 model (see `WanReasoner`).

    A model of diffusion forcing keeps the image as its first latent frame.
    """

    architecture = "SkyReelsV2Transformer3DModel"
    default_settings = _540P

    def __init__(self, transformer: Any, vae: Any, *args: Any, **parts: Any) -> None:
        super().__init__(transformer, vae, *args, **parts)
        if transformer.config.num_frame_per_block > 1:
            raise InputError(
                f"the transformer makes blocks of {transformer.config.num_frame_per_block} latent frames one after the"
                " other (num_frame_per_block): set it to 1 in its config.json"
            )
        if transformer.config.inject_sample_info and not self.image_conditioning:
            raise InputError("the transformer takes a frame rate, which is of diffusion-forcing pipelines alone")
        self.takes_last_image |= self.image_conditioning

    @classmethod
    def keeps_first_frame(cls, pipeline: str, entries: Mapping[str, Any]) -> bool:
        return "DiffusionForcing" in pipeline

    def check_trainable(self) -> None:
        if self.image_conditioning:
            raise InputError("a diffusion-forcing model cannot be trained: take a text-to-video model")
        super().check_trainable()

    def encode_images(
        self, image: ImageInput | None, last_image: ImageInput | None, num_frames: int, height: int, width: int
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """See `WanReasoner.encode_images`; the latents of a diffusion-forcing model's last frame are `last_frame`."""
        first_frame, inputs = super().encode_images(image, last_image, num_frames, height, width)
        if self.image_conditioning and last_image is not None:
            inputs = {"last_frame": self.encode_image(last_image, height, width)}
        return first_frame, inputs

    def velocity(
        self, condition: Condition, latents: Tensor, sigma: float | Tensor, *, transformer: nn.Module | None = None
    ) -> Tensor:
        """See `Reasoner.velocity`."""
        if not self.image_conditioning:
            return super().velocity(condition, latents, sigma, transformer=transformer)
        batch, _, frames, *_ = latents.shape
        # diffusers gives these models whole timesteps
        timestep = self.timestep(sigma, batch).long()[:, None].repeat(1, frames)
        if condition.first_frame is not None:
            latents = with_first_frame(latents, condition.first_frame)
            timestep[:, 0] = 0
        if (last_frame := condition.inputs.get("last_frame")) is not None:
            latents = torch.cat([latents, last_frame], 2)
            timestep = torch.cat([timestep, torch.zeros_like(timestep[:, :1])], 1)
        network: Any = self.transformer if transformer is None else transformer
        velocity = network(
            hidden_states=latents.to(self.dtype),
            timestep=timestep,
            encoder_hidden_states=condition.prompt_embeds,
            enable_diffusion_forcing=True,
            fps=[0 if self.fps == 16 else 1] * batch,
            return_dict=False,
        )[0]
        return velocity[:, :, :frames].float()


def _preset_misfit(words: Sequence[str], index: Mapping[str, Any]) -> str | None:
    forcing = "DiffusionForcing" in index["_class_name"]
    if ("df" in words) == forcing:
        return None
    return f"models {'without' if forcing else 'of'} diffusion forcing"


SKYREELS_V2 = Family(
    name="SkyReels-V2",
    pipelines=(
        "SkyReelsV2Pipeline",
        "SkyReelsV2ImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
    ),
    transformer=SkyReelsReasoner.architecture,
    blocks="blocks",
    load=partial(load_wan, SkyReelsReasoner),
    build=partial(build_wan, SkyReelsReasoner),
    adopt=partial(adopt_wan, SkyReelsReasoner),
    presets={
        "skyreels-v2-t2v-540p": _540P,
        "skyreels-v2-t2v-720p": _720P,
        "skyreels-v2-i2v-540p": replace(_540P, shift=5.0, guidance_scale=5.0),
        "skyreels-v2-i2v-720p": replace(_720P, shift=5.0, guidance_scale=5.0),
        "skyreels-v2-df-540p": _540P,
        "skyreels-v2-df-720p": _720P,
    },
    hub_ids={
        f"Skywork/SkyReels-V2-{kind}-{size}P-Diffusers": f"skyreels-v2-{kind.split('-')[0].lower()}-{size}p"
        for kind, sizes in {
            "T2V-14B": (540, 720),
            "I2V-1.3B": (540,),
            "I2V-14B": (540, 720),
            "DF-1.3B": (540,),
            "DF-14B": (540, 720),
        }.items()
        for size in sizes
    },
    lora_targets=WAN.lora_targets,
    layers=WAN.layers,
    load_lora='pipe.load_lora_weights(".", weight_name="lora.safetensors")',
    decoders=WAN_21_DECODERS,
    preset_misfit=_preset_misfit,
)
