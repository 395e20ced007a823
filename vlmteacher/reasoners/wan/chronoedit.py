"""ChronoEdit: an image is edited by a video of two latent frames, whose first is the image and whose last the result.

Wan 2.1 I2V's network with other positions: the last latent frame stands where that of a video of 29 frames would.
The mode of temporal reasoning, which samples the latent frames between as well, decodes the video in two parts, which
a surrogate decoder does not know; it is left out.

Sources of the presets: the README and scripts of nv-tlabs/ChronoEdit.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlmteacher.errors import InputError
from vlmteacher.reasoners.family import Family
from vlmteacher.reasoners.sampling import SamplerSettings, even_timesteps
from vlmteacher.reasoners.wan.family import WAN, WAN_21_DECODERS
from vlmteacher.reasoners.wan.loading import adopt_wan, build_wan, load_wan
from vlmteacher.reasoners.wan.reasoner import WanReasoner

_50_STEPS = SamplerSettings(
    even_timesteps(50),
    shift=5.0,
    sampler="euler",
    guidance_scale=5.0,
    num_frames=5,
    height=720,
    width=1280,
    fps=16.0,
)


class ChronoEditReasoner(WanReasoner):
    """`ChronoEditTransformer3DModel` with the parts of a Wan 2.1 I2V model (see `WanReasoner`)."""

    architecture = "ChronoEditTransformer3DModel"
    default_settings = _50_STEPS

    def check(self, num_frames: int, height: int, width: int) -> None:
        """See `Reasoner.check`; there are two latent frames."""
        if num_frames != 1 + self.temporal_stride:
            raise InputError(
                f"num_frames must be {1 + self.temporal_stride} for ChronoEdit, whose last frame is the edited image,"
                f" not {num_frames}"
            )
        super().check(num_frames, height, width)


CHRONOEDIT = Family(
    name="ChronoEdit",
    pipelines=("ChronoEditPipeline",),
    transformer=ChronoEditReasoner.architecture,
    blocks="blocks",
    load=partial(load_wan, ChronoEditReasoner),
    build=partial(build_wan, ChronoEditReasoner),
    adopt=partial(adopt_wan, ChronoEditReasoner),
    presets={
        "chronoedit-14b": _50_STEPS,
        # with lora/chronoedit_distill_lora.safetensors of the same repository
        "chronoedit-14b-8step": replace(_50_STEPS, timesteps=even_timesteps(8), shift=2.0, guidance_scale=1.0),
    },
    hub_ids={"nvidia/ChronoEdit-14B-Diffusers": "chronoedit-14b"},
    lora_targets=WAN.lora_targets,
    layers=WAN.layers,
    load_lora='pipe.load_lora_weights(".", weight_name="lora.safetensors")',
    decoders=WAN_21_DECODERS,
)
