"""Cosmos-Predict 2.5 of diffusers, text and image to video ("Text2World", "Image2World").

The parts are called as `Cosmos2_5_PredictBasePipeline` calls them: the noise level itself is the timestep, one for each
latent frame; an image is a clean first latent frame, marked in a further channel, with a timestep of its own; the text
is the hidden states of all layers of a Qwen2.5-VL (Cosmos-Reason1). Conditioning on a video is left out.

The pipeline's scheduler begins at the noise level 200 / 201, where it is given pure noise. Here pure noise has level 1,
as everywhere; the levels after the first are the scheduler's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from vlmteacher.chat_templates import render
from vlmteacher.checkpoints.pretrained import cast, load_network, load_tokenizer
from vlmteacher.errors import InputError
from vlmteacher.media import ImageInput
from vlmteacher.ops.linear import frozen
from vlmteacher.prompts import check_cut, encode, quote
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.condition import Condition, with_first_frame
from vlmteacher.reasoners.family import Family, LayerNames
from vlmteacher.reasoners.parts import load_transformers
from vlmteacher.reasoners.sampling import SamplerSettings, even_timesteps

SYSTEM = "You are a helpful assistant who will provide prompts to an image generator."
CLEAN = 1e-4  # the timestep of a given first latent frame, the pipeline's default
SWITCH = "VLMTEACHER_COSMOS_GUARDRAIL"  # an environment variable; 0 runs without the safety checker


def karras_timesteps(steps: int) -> tuple[float, ...]:
    """The `SamplerSettings.timesteps` of the published scheduler: sigma / (1 + sigma) of Karras' levels, 200 to 0.01.

    The first is 1000 instead of 1000 * 200 / 201. Raises InputError for another number of steps than 1 to 1000.
    """
    even_timesteps(steps)  # refuses the number
    levels = np.linspace(200 ** (1 / 7), 0.01 ** (1 / 7), steps) ** 7
    return (1000.0, *(1000 * float(level / (1 + level)) for level in levels[1:]))


def add_padding_mask(transformer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook for a `CosmosTransformer3DModel` whose config has ``concat_padding_mask`` turned off.

    It joins the channels of both masks to the latents, as the model's forward does by torchvision.
    """
    hidden, condition, padding = kwargs["hidden_states"], kwargs.pop("condition_mask"), kwargs.pop("padding_mask")
    padding = nn.functional.interpolate(padding, hidden.shape[-2:], mode="nearest")[:, :, None]
    padding = padding.expand(len(hidden), -1, hidden.shape[2], -1, -1)
    return args, kwargs | {"hidden_states": torch.cat([hidden, condition, padding.to(hidden.dtype)], 1)}


def safety_checker() -> Any:
    """NVIDIA's safety checker of prompts and videos; None where `SWITCH` turns it off. Raises InputError without it."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        from cosmos_guardrail import CosmosSafetyChecker
    except ImportError as error:
        raise InputError(
            "Cosmos comes with a safety checker, which its licence asks for: pip install 'vlmteacher[cosmos]', or set"
            f" {SWITCH}=0 to run without, where you may"
        ) from error
    return CosmosSafetyChecker()


class CosmosReasoner(Reasoner):
    """`CosmosTransformer3DModel` of Predict 2.5 + `AutoencoderKLWan` + Qwen2.5-VL as the text encoder.

    Args:
        transformer, vae, text_encoder, tokenizer: the parts of a diffusers pipeline; they are frozen here, and where
            torchvision is missing, the transformer runs without it (`add_padding_mask`).
        checker: the safety checker; None checks nothing.
        settings: sampler and default sizes.

    Raises InputError when the parts do not fit together.
    """

    image_conditioning = True

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        checker: Any = None,
        settings: SamplerSettings | None = None,
    ) -> None:
        from diffusers.utils import is_torchvision_available

        config, text = transformer.config, text_encoder.config.get_text_config()
        width = text.num_hidden_layers * text.hidden_size
        for what, takes, makes in (
            ("channels, and with its VAE's and a mask it is given", config.in_channels, vae.config.z_dim + 1),
            ("values per word, and its text encoder makes", config.crossattn_proj_in_channels, width),
        ):
            if takes != makes:
                raise InputError(f"the transformer takes {takes} {what} {makes}: they belong to different models")
        if not config.use_crossattn_projection or config.img_context_dim_in or config.controlnet_block_every_n:
            raise InputError("the transformer is none of Cosmos-Predict 2.5 but of another Cosmos: give one of that")
        self.transformer, self.vae, self.text_encoder = (frozen(part) for part in (transformer, vae, text_encoder))
        if config.concat_padding_mask and not is_torchvision_available():
            transformer.register_to_config(concat_padding_mask=False)
            transformer.register_forward_pre_hook(add_padding_mask, with_kwargs=True)
        self.tokenizer, self.checker = tokenizer, checker
        self.settings = settings or BASE
        self.dtype = transformer.dtype
        self.latent_channels = vae.config.z_dim
        self.temporal_stride = vae.config.scale_factor_temporal
        self.spatial_stride = vae.config.scale_factor_spatial
        self.patch = tuple(config.patch_size[1:])
        self.latents_mean = torch.tensor(vae.config.latents_mean, dtype=torch.float32).view(1, -1, 1, 1, 1)
        self.latents_std = torch.tensor(vae.config.latents_std, dtype=torch.float32).view(1, -1, 1, 1, 1)
        self.to(transformer.device)

    def with_sampling(self, num_inference_steps: int | None = None, **changes: Any) -> Self:
        """See `Reasoner.with_sampling`; the timesteps are the scheduler's of that many steps (`karras_timesteps`)."""
        if num_inference_steps is not None:
            changes["timesteps"] = karras_timesteps(num_inference_steps)
        return super().with_sampling(**changes)

    def check(self, num_frames: int, height: int, width: int) -> None:
        """See `Reasoner.check`; the transformer has a limited number of positions on each axis."""
        super().check(num_frames, height, width)
        most = self.transformer.config.max_size
        given = {"num_frames": num_frames, "height": height, "width": width}
        for (name, value), latents, limit in zip(
            given.items(), self.latent_shape(num_frames, height, width)[2:], most, strict=True
        ):
            if latents > limit:
                raise InputError(f"{name} is {value}, {latents} latent cells, and the transformer has room for {limit}")

    def blank_condition(self, num_frames: int, height: int, width: int) -> Condition:
        _, channels, _, *size = self.latent_shape(num_frames, height, width)
        text = self.settings.max_sequence_length, self.transformer.config.crossattn_proj_in_channels
        embeds = torch.empty(1, *text, dtype=self.dtype)
        return Condition(embeds, torch.empty(1, channels, 1, *size), num_frames, height, width)

    def encode_inputs(
        self,
        prompt: str,
        image: ImageInput | None,
        last_image: ImageInput | None,
        num_frames: int,
        height: int,
        width: int,
    ) -> Condition:
        """See `Reasoner.encode_inputs`; raises InputError for a prompt that the safety checker refuses."""
        if self.checker is not None:
            self.checker.to(self.device)
            if not self.checker.check_text_safety(prompt):
                raise InputError("Cosmos' safety checker refuses the prompt: write another")
        first_frame = None if image is None else self.encode_image(image, height, width)

        def condition(text: str, what: str) -> Condition:
            embeds, cut = self._encode_text(text, what)
            return Condition(embeds, first_frame, num_frames, height, width, cut=cut)

        return self.with_negative(condition, prompt)

    def _encode_text(self, prompt: str, what: str) -> tuple[Tensor, dict[str, int]]:
        """Encode a prompt to the normalised hidden states of all layers, side by side: (1, L, layers * width).

        Also returns the tokens that are cut off. The encoder attends to the padding, as in the pipeline.
        """
        limit = self.settings.max_sequence_length
        chat = [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
            {"role": "user", "content": [{"type": "text", "text": quote(self.tokenizer, prompt)}]},
        ]
        text = render(self.tokenizer, chat, "the text encoder's chat template", asks=False)
        ids = encode(self.tokenizer, text)
        cut = check_cut(self.tokenizer, ids, limit, what)
        padded = self.tokenizer.pad({"input_ids": [ids[:limit]]}, padding="max_length", max_length=limit)["input_ids"]
        encoder = self.text_encoder.model  # without the words' logits; it may be on the CPU
        states = encoder(torch.tensor(padded, device=encoder.device), output_hidden_states=True).hidden_states[1:]
        normalised = [(x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-8) for x in states]
        return torch.cat(normalised, -1).to(self.device, self.dtype), cut

    def velocity(
        self, condition: Condition, latents: Tensor, sigma: float | Tensor, *, transformer: nn.Module | None = None
    ) -> Tensor:
        """See `Reasoner.velocity`; a given first latent frame is clean and has a timestep of its own."""
        batch, _, frames, height, width = latents.shape
        timestep = (self.timestep(sigma, batch) / 1000).view(-1, 1, 1, 1, 1).repeat(1, 1, frames, 1, 1)
        known = torch.zeros(batch, 1, frames, height, width, dtype=self.dtype, device=latents.device)
        if condition.first_frame is not None:
            latents = with_first_frame(latents, condition.first_frame)
            timestep[:, :, :1] = CLEAN
            known[:, :, :1] = 1
        network: Any = self.transformer if transformer is None else transformer
        return network(
            hidden_states=latents.to(self.dtype),
            condition_mask=known,
            timestep=timestep,
            encoder_hidden_states=condition.prompt_embeds,
            padding_mask=known.new_zeros(1, 1, height, width),
            return_dict=False,
        )[0].float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `Reasoner.decode`; the safety checker, where there is one, may change the frames."""
        frames = super().decode(latents)
        if self.checker is None:
            return frames
        self.checker.to(self.device)
        pixels = (frames.permute(0, 2, 3, 1).cpu().numpy() * 255).astype(np.uint8)  # as in the pipeline
        checked = torch.from_numpy(self.checker.check_video_safety(pixels).astype(np.float32) / 255)
        return checked.permute(0, 3, 1, 2).to(frames.device)


def load_cosmos(
    path_or_id: str,
    index: dict[str, Any],
    settings: SamplerSettings | None,
    dtype: torch.dtype,
    local_files_only: bool,
    **parts: Sequence[str],
) -> CosmosReasoner:
    """Load the Reasoner of a Cosmos-Predict 2.5 pipeline, local or on the hub; `index`: its ``model_index.json``.

    settings: None are those of the base model. parts: see `load_transformers`. Raises InputError.
    """
    from diffusers import AutoencoderKLWan, CosmosTransformer3DModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    checker = safety_checker()
    load = partial(load_network, name=path_or_id, local_files_only=local_files_only)
    return CosmosReasoner(
        load_transformers(CosmosTransformer3DModel, path_or_id, ["transformer"], dtype, local_files_only, **parts)[
            "transformer"
        ],
        load(AutoencoderKLWan, subfolder="vae", dtype=torch.float32),
        load(Qwen2_5_VLForConditionalGeneration, subfolder="text_encoder", dtype=dtype),
        load_tokenizer(path_or_id, "tokenizer", local_files_only),
        checker,
        settings,
    )


def adopt_cosmos(pipeline: Any, settings: SamplerSettings | None) -> CosmosReasoner:
    """The Reasoner of a loaded Cosmos-Predict 2.5 pipeline's own parts, its safety checker included."""
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.safety_checker)
    return CosmosReasoner(*parts, settings)


def build_cosmos(configs: Mapping[str, Any], settings: SamplerSettings, dtype: torch.dtype) -> CosmosReasoner:
    """Build the Reasoner without weights from the configs of its parts."""
    from diffusers import AutoencoderKLWan, CosmosTransformer3DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    return CosmosReasoner(
        cast(CosmosTransformer3DModel.from_config(configs["transformer"]), dtype),
        AutoencoderKLWan.from_config(configs["vae"]),
        Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**configs["text_encoder"])).to(dtype),
        None,
        settings=settings,
    )


# The defaults of diffusers' pipeline, whose guidance of 7 is v + 7 (v - v_negative).
BASE = SamplerSettings(
    karras_timesteps(36),
    sampler="euler",
    guidance_scale=8.0,
    negative_prompt=(
        "The video captures a series of frames showing ugly scenes, static with no motion, motion blur, over-"
        "saturation, shaky footage, low resolution, grainy texture, pixelated images, poorly lit areas, "
        "underexposed and overexposed scenes, poor color balance, washed out colors, choppy sequences, jerky "
        "movements, low frame rate, artifacting, color banding, unnatural transitions, outdated special "
        "effects, fake elements, unconvincing visuals, poorly edited content, jump cuts, visual noise, and "
        "flickering. Overall, the video is of poor quality."
    ),
    num_frames=93,
    height=704,
    width=1280,
    fps=16.0,
    max_sequence_length=512,
)

COSMOS = Family(
    name="Cosmos-Predict 2.5",
    pipelines=("Cosmos2_5_PredictBasePipeline",),
    transformer="CosmosTransformer3DModel",
    blocks="transformer_blocks",
    load=load_cosmos,
    build=build_cosmos,
    adopt=adopt_cosmos,
    presets={"cosmos-predict2.5": BASE},
    hub_ids={"nvidia/Cosmos-Predict2.5-2B": "cosmos-predict2.5", "nvidia/Cosmos-Predict2.5-14B": "cosmos-predict2.5"},
    lora_targets=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
    layers=LayerNames(
        "blocks",
        {
            f"{own}.{part}": f"{other}.{name}"
            for own, other in (("attn1", "self_attn"), ("attn2", "cross_attn"))
            for part, name in (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out.0", "output_proj"))
        }
        | {"ff.net.0.proj": "mlp.layer1", "ff.net.2": "mlp.layer2"},
        {"patch_embed.proj": "x_embedder.proj.1", "proj_out": "final_layer.linear"},
    ),
    decoders={(16, 4, 8): "lightx2v/Autoencoders/taew2_1.pth"},
)
