"""The CogVideoX family of diffusers: 2B and 5B text-to-video, 5B image-to-video, and 1.5 of both kinds.

The models predict v of a variance-preserving diffusion. It becomes the contract's flow matching by a change of scale,
so that samplers and one-step prediction need no case of their own:

    x = a x0 + b noise, a^2 + b^2 = 1                 what the transformer is given
    v = a noise - b x0, so x0 = a x - b v             what it predicts
    X = x / (a + b) = (1 - sigma) x0 + sigma noise    the contract's latents, with sigma = b / (a + b)
    V = noise - x0 = (a + b) v + (b - a) x            the contract's velocity, since noise = b x + a v

Then X - sigma V = a x - b v, and an Euler step of X from sigma to sigma' is DDIM's step (eta 0) of x: both give
(1 - sigma') x0 + sigma' noise. The schedule has no signal at its last timestep (zero terminal SNR, arXiv 2305.08891):
a = 0, b = 1 and sigma = 1, so z1 is pure noise and the one-step prediction x0 = -v.

The parts are called as `CogVideoXPipeline` and `CogVideoXImageToVideoPipeline` call them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from vlmteacher.checkpoints.pretrained import cast, load_network, load_tokenizer, read_config
from vlmteacher.errors import InputError
from vlmteacher.files import check_number
from vlmteacher.media import ImageInput
from vlmteacher.ops.linear import frozen
from vlmteacher.prompts import check_cut, tokenize
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.condition import Condition
from vlmteacher.reasoners.family import Family, LayerNames
from vlmteacher.reasoners.parts import load_transformers
from vlmteacher.reasoners.sampling import SamplerSettings, even_timesteps

# The schedule of every published checkpoint; they differ in snr_shift_scale alone.
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}
OFFSET = 2.0  # the `ofs` of CogVideoX 1.5 I2V, a constant in diffusers' pipeline


def noise_levels(snr_shift: float) -> np.ndarray:
    """The noise levels sigma = b / (a + b) (1000,) float64 of the timesteps 0 to 999 of `SCHEDULE`, rising to 1.

    snr_shift: the signal-to-noise ratios are divided by it, the scheduler's ``snr_shift_scale``.
    """
    start, end = (float(SCHEDULE[name]) ** 0.5 for name in ("beta_start", "beta_end"))
    alphas = np.cumprod(1 - np.linspace(start, end, SCHEDULE["num_train_timesteps"]) ** 2)
    a = np.sqrt(alphas / (snr_shift + (1 - snr_shift) * alphas))
    a = (a - a[-1]) * (a[0] / (a[0] - a[-1]))
    b = np.sqrt(1 - a**2)
    return b / (a + b)


def ddim_timesteps(steps: int, levels: np.ndarray) -> tuple[float, ...]:
    """The `SamplerSettings.timesteps` (1000 sigma) of DDIM's timesteps with "trailing" spacing. Raises InputError."""
    return tuple(1000 * float(levels[round(timestep) - 1]) for timestep in even_timesteps(steps))


def check_schedule(config: Mapping[str, Any], label: str) -> float:
    """The ``snr_shift_scale`` of a scheduler's config. Raises InputError for a schedule other than `SCHEDULE`."""
    from diffusers import CogVideoXDDIMScheduler

    entries = {**CogVideoXDDIMScheduler().config, **config}
    for name, value in SCHEDULE.items():
        if entries[name] != value:
            raise InputError(f"{label}: {name} is {entries[name]!r:.40}, and CogVideoX models have {value!r}")
    check_number(entries["snr_shift_scale"], f"{label}: snr_shift_scale", above=0)
    return entries["snr_shift_scale"]


class CogVideoXReasoner(Reasoner):
    """`CogVideoXTransformer3DModel` + `AutoencoderKLCogVideoX` + a T5 text encoder.

    CogVideoX 1.5 has tokens of two latent frames. Its videos have an odd number of them, so that, as in diffusers, one
    more is sampled in front and dropped in the end; an image is the condition of that one.

    Args:
        transformer, vae, text_encoder, tokenizer: the parts of a diffusers CogVideoX pipeline; they are frozen here.
        snr_shift: the scheduler's ``snr_shift_scale`` (see `noise_levels`).
        settings: sampler and default sizes.

    Raises InputError when the parts do not fit together.
    """

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        snr_shift: float,
        settings: SamplerSettings | None = None,
    ) -> None:
        config, channels = transformer.config, vae.config.latent_channels
        for what, takes, makes in (
            ("channels, and its VAE makes", config.in_channels, channels * config.in_channels // config.out_channels),
            ("values per word, and its text encoder makes", config.text_embed_dim, text_encoder.config.d_model),
        ):
            if takes != makes:
                raise InputError(f"the transformer takes {takes} {what} {makes}: they belong to different models")
        self.transformer, self.vae, self.text_encoder = (frozen(part) for part in (transformer, vae, text_encoder))
        self.tokenizer = tokenizer
        self.needs_image: bool = config.in_channels == 2 * channels
        self.levels = noise_levels(snr_shift)
        self.settings = settings or settings_by_configs(config, snr_shift)
        self.dtype = transformer.dtype
        self.latent_channels = channels
        self.temporal_stride = int(vae.config.temporal_compression_ratio)
        self.spatial_stride = 2 ** (len(vae.config.block_out_channels) - 1)
        self.patch, self.temporal_patch = (config.patch_size, config.patch_size), config.patch_size_t or 1
        self.latents_mean = torch.zeros(1, channels, 1, 1, 1)
        self.latents_std = torch.full_like(self.latents_mean, 1 / vae.config.scaling_factor)
        vae.enable_tiling()  # beyond half the model's own size, as in the authors' examples
        self.to(transformer.device)

    @property
    def frame_step(self) -> int:
        return 2 * self.temporal_stride  # the VAE decodes latent frames in pairs after the first

    def with_sampling(self, num_inference_steps: int | None = None, **changes: Any) -> Self:
        """See `Reasoner.with_sampling`; the timesteps are DDIM's of that many steps."""
        if num_inference_steps is not None:
            changes["timesteps"] = ddim_timesteps(num_inference_steps, self.levels)
        return super().with_sampling(**changes)

    def check(self, num_frames: int, height: int, width: int) -> None:
        """See `Reasoner.check`; learned positions are for one size, and those of 1.5 have a limit."""
        super().check(num_frames, height, width)
        config, stride = self.transformer.config, self.spatial_stride
        own = config.sample_height * stride, config.sample_width * stride
        if config.use_learned_positional_embeddings and (num_frames, height, width) != (config.sample_frames, *own):
            raise InputError(
                f"this Reasoner has learned the positions of {config.sample_frames} frames of {own[1]}x{own[0]} pixels:"
                f" it makes no video of {num_frames} frames of {width}x{height}"
            )
        if self.temporal_patch > 1 and (height > own[0] or width > own[1]):
            raise InputError(f"height and width must be at most {own[0]} and {own[1]}, not {height} and {width}")

    def noise_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int, int]:
        one, channels, frames, *size = self.latent_shape(num_frames, height, width)
        return one, channels, frames + -frames % self.temporal_patch, size[0], size[1]

    def blank_condition(self, num_frames: int, height: int, width: int) -> Condition:
        embeds = torch.empty(
            1, self.settings.max_sequence_length, self.transformer.config.text_embed_dim, dtype=self.dtype
        )
        inputs = {}
        if self.needs_image:
            inputs["known_latents"] = torch.empty(self.noise_shape(num_frames, height, width))
        return Condition(embeds, None, num_frames, height, width, inputs)

    def encode_inputs(
        self,
        prompt: str,
        image: ImageInput | None,
        last_image: ImageInput | None,
        num_frames: int,
        height: int,
        width: int,
    ) -> Condition:
        """See `Reasoner.encode_inputs`."""
        if image is None and self.needs_image:
            raise InputError("this Reasoner makes videos of an image (it is CogVideoX I2V): give the first frame")
        if image is not None and not self.needs_image:
            raise InputError("this Reasoner takes no image (it is CogVideoX T2V): give only a prompt")
        config, length = self.transformer.config, self.settings.max_sequence_length
        if not config.use_rotary_positional_embeddings and length != config.max_text_seq_length:
            raise InputError(
                f"max_sequence_length must be {config.max_text_seq_length}, not {length}: the transformer has positions"
                " for a text of that length"
            )
        inputs = {}
        if image is not None:
            known = torch.zeros(self.noise_shape(num_frames, height, width), device=self.device)
            known[:, :, :1] = self.encode_image(image, height, width)
            if self.vae.config.invert_scale_latents:  # 1.5 was trained with images divided by the factor
                known *= self.latents_std.square()
            inputs["known_latents"] = known

        def condition(text: str, what: str) -> Condition:
            cut = check_cut(self.tokenizer, text, length, what)
            return Condition(self.encode_prompt(text), None, num_frames, height, width, inputs, cut=cut)

        return self.with_negative(condition, prompt)

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> Tensor:
        """See `Reasoner.encode_prompt`; T5 attends to the prompt's padding, and the transformer to all positions."""
        tokens = tokenize(self.tokenizer, prompt, self.settings.max_sequence_length)
        hidden = self.text_encoder(tokens.input_ids.to(self.text_encoder.device)).last_hidden_state
        return hidden.to(self.device, self.dtype)

    def timestep(self, sigma: float | Tensor, batch: int) -> Tensor:
        """The trained timestep (batch,) float32 of a noise level; between two it is interpolated."""
        trained = np.arange(len(self.levels), dtype=np.float64)
        if isinstance(sigma, Tensor):
            timesteps = np.interp(sigma.cpu().double().numpy(), self.levels, trained)
            return torch.from_numpy(timesteps).to(self.device, torch.float32).expand(batch)
        return super().timestep(float(np.interp(sigma, self.levels, trained)) / 1000, batch)

    def velocity(
        self, condition: Condition, latents: Tensor, sigma: float | Tensor, *, transformer: nn.Module | None = None
    ) -> Tensor:
        """See `Reasoner.velocity`; the module's docstring derives it from what the transformer predicts."""
        network: Any = self.transformer if transformer is None else transformer
        level = sigma.view(-1, 1, 1, 1, 1) if isinstance(sigma, Tensor) else sigma
        scale = ((1 - level) ** 2 + level**2) ** -0.5  # a + b
        hidden = (scale * latents).to(self.dtype)
        if self.needs_image:
            hidden = torch.cat([hidden, condition.inputs["known_latents"].to(self.dtype)], 1)
        v = network(
            hidden_states=hidden.transpose(1, 2),
            encoder_hidden_states=condition.prompt_embeds,
            timestep=self.timestep(sigma, len(latents)),
            ofs=None if network.config.ofs_embed_dim is None else hidden.new_full((1,), OFFSET),
            image_rotary_emb=self._rotations(*latents.shape[2:]),
            return_dict=False,
        )[0]
        return scale * v.float().transpose(1, 2) + (2 * level - 1) * scale**2 * latents

    def _rotations(self, frames: int, height: int, width: int) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines (tokens, head dim) of the rotary positions, for models that have them."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        config = self.transformer.config
        if not config.use_rotary_positional_embeddings:
            return None
        down, across, *own = (
            side // config.patch_size for side in (height, width, config.sample_height, config.sample_width)
        )
        if self.temporal_patch == 1:  # the positions of the model's own size, stretched over this one
            kind = {"crops_coords": get_resize_crop_region_for_grid((down, across), own[1], own[0])}
        else:
            kind = {"crops_coords": None, "grid_type": "slice", "max_size": tuple(own)}
        size = {"grid_size": (down, across), "temporal_size": frames // self.temporal_patch}
        return get_3d_rotary_pos_embed(config.attention_head_dim, device=self.device, **size, **kind)

    def video(self, latents: Tensor, condition: Condition) -> Tensor:
        return latents[:, :, -self.latent_shape(*condition.size)[2] :]  # the frames before are padding


def settings_by_configs(config: Any, snr_shift: float) -> SamplerSettings:
    """The sampler settings of a checkpoint of an unknown name, by the configs of its transformer and scheduler."""
    known = _1_5 if config.patch_size_t is not None else _1_0
    return replace(known, timesteps=ddim_timesteps(50, noise_levels(snr_shift)))


def load_cogvideox(
    path_or_id: str,
    index: dict[str, Any],
    settings: SamplerSettings | None,
    dtype: torch.dtype,
    local_files_only: bool,
    **parts: Sequence[str],
) -> CogVideoXReasoner:
    """Load the Reasoner of a diffusers CogVideoX pipeline, local or on the hub; `index`: its ``model_index.json``.

    settings: None follows the configs. parts: see `load_transformers`. Raises InputError.
    """
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
    from transformers import T5EncoderModel

    load = partial(load_network, name=path_or_id, local_files_only=local_files_only)
    _, scheduler = read_config(path_or_id, "scheduler", "scheduler_config.json", local_files_only)
    return CogVideoXReasoner(
        load_transformers(CogVideoXTransformer3DModel, path_or_id, ["transformer"], dtype, local_files_only, **parts)[
            "transformer"
        ],
        load(AutoencoderKLCogVideoX, subfolder="vae", dtype=torch.float32),
        load(T5EncoderModel, subfolder="text_encoder", dtype=dtype),
        load_tokenizer(path_or_id, "tokenizer", local_files_only),
        check_schedule(scheduler, f"the scheduler of {path_or_id}"),
        settings,
    )


def adopt_cogvideox(pipeline: Any, settings: SamplerSettings | None) -> CogVideoXReasoner:
    """The Reasoner of a loaded CogVideoX pipeline's own parts; settings: None follows its configs."""
    snr_shift = check_schedule(pipeline.scheduler.config, "the pipeline's scheduler")
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
    return CogVideoXReasoner(*parts, snr_shift, settings)


def build_cogvideox(configs: Mapping[str, Any], settings: SamplerSettings, dtype: torch.dtype) -> CogVideoXReasoner:
    """Build the Reasoner without weights from the configs of its parts."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    return CogVideoXReasoner(
        cast(CogVideoXTransformer3DModel.from_config(configs["transformer"]), dtype),
        AutoencoderKLCogVideoX.from_config(configs["vae"]),
        T5EncoderModel(T5Config(**configs["text_encoder"])).to(dtype),
        None,
        1.0,  # of no matter to a plan, which is made at noise level 1
        settings,
    )


def check_preset(name: str, config: Mapping[str, Any], pipeline: str, changed: bool) -> None:
    """Raise InputError for a preset of CogVideoX 1.5 on a model of 1.0, or the reverse."""
    if name.startswith("cogvideox1.5") != (config["patch_size_t"] is not None):
        raise InputError(f"preset {name} is for another version of CogVideoX than {pipeline}, by its patch_size_t")


# Sizes and steps of the demo in github.com/THUDM/CogVideo. Its sampler for the 5B models is DPM-Solver, with a guidance
# that changes from step to step; here all are sampled by DDIM steps.
_1_0 = SamplerSettings(
    ddim_timesteps(50, noise_levels(1.0)),
    sampler="euler",
    guidance_scale=6.0,
    num_frames=49,
    height=480,
    width=720,
    fps=8.0,
    max_sequence_length=226,
)
_1_5 = replace(_1_0, num_frames=81, height=768, width=1360, fps=16.0)

COGVIDEOX = Family(
    name="CogVideoX",
    pipelines=("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"),
    transformer="CogVideoXTransformer3DModel",
    blocks="transformer_blocks",
    load=load_cogvideox,
    build=build_cogvideox,
    adopt=adopt_cogvideox,
    presets={
        "cogvideox-2b": replace(_1_0, timesteps=ddim_timesteps(50, noise_levels(3.0))),
        "cogvideox-5b": _1_0,
        "cogvideox1.5-5b": _1_5,
    },
    hub_ids={
        "THUDM/CogVideoX-2b": "cogvideox-2b",
        "THUDM/CogVideoX-5b": "cogvideox-5b",
        "THUDM/CogVideoX-5b-I2V": "cogvideox-5b",
        "THUDM/CogVideoX1.5-5B": "cogvideox1.5-5b",
        "THUDM/CogVideoX1.5-5B-I2V": "cogvideox1.5-5b",
    },
    lora_targets=["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"],
    layers=LayerNames(  # LoRAs are published in diffusers' names
        "transformer_blocks",
        {
            name: name
            for name in (*(f"attn1.to_{each}" for each in ("q", "k", "v", "out.0")), "ff.net.0.proj", "ff.net.2")
        },
        {
            name: name
            for name in (
                "patch_embed.text_proj",
                "time_embedding.linear_1",
                "time_embedding.linear_2",
                "norm_out.linear",
                "proj_out",
            )
        },
    ),
    check_preset=check_preset,
)
