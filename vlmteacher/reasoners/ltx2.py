"""LTX-2 and LTX-2.3 of diffusers: one transformer denoises a video and its audio together.

The parts are called as `LTX2Pipeline`, `LTX2ImageToVideoPipeline` and `LTX2ConditionPipeline` call them: video latents
as tokens, a first latent frame with timestep 0 where an image is given, further tokens with timestep 0 for a last
frame, audio latents as tokens of their own, and Gemma's hidden states of all layers through connectors for each of the
two. Two things are left out: the compression of the image by H.264 (``image_crf``), and the guidance of the base models
beyond that by the prompt (by skipped attention, by isolated modalities, rescaled).

The audio is neither adapted nor decoded, but video tokens attend to it, so it takes part in every prediction. The
latents of a sampler are therefore those of the video and, after its latent frames, further frames that hold the audio's
values; `Reasoner.video` returns the frames of the video alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmteacher.checkpoints.pretrained import cast, load_network, load_tokenizer, read_config
from vlmteacher.errors import InputError
from vlmteacher.files import check_number
from vlmteacher.media import ImageInput
from vlmteacher.ops.linear import frozen
from vlmteacher.prompts import check_cut, tokenize
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.condition import Condition, with_first_frame
from vlmteacher.reasoners.family import TABLE, Family, LayerNames
from vlmteacher.reasoners.parts import load_transformers
from vlmteacher.reasoners.sampling import SamplerSettings, even_timesteps

# The distilled checkpoints, at the noise levels of their distillation (ltx_pipelines of github.com/Lightricks/LTX-2).
DISTILLED = SamplerSettings(
    (1000.0, 993.75, 987.5, 981.25, 975.0, 909.375, 725.0, 421.875),
    sampler="euler",
    num_frames=121,
    height=512,
    width=768,
    max_sequence_length=1024,
)
SHIFT = math.exp(2.05)  # of the base models, for any number of tokens
LAST_SIGMA = 0.1  # the base models' last noise level, to which their shifted levels are stretched


def stretched_timesteps(steps: int) -> tuple[float, ...]:
    """Timesteps whose noise levels, shifted by `SHIFT`, are evenly spaced ones stretched to end at `LAST_SIGMA`."""
    levels = replace(DISTILLED, timesteps=even_timesteps(steps), shift=SHIFT).sigmas
    scale = (1 - LAST_SIGMA) / (1 - levels[-1])
    stretched = [1 - scale * (1 - level) for level in levels]
    return tuple(1000 * level / (SHIFT - (SHIFT - 1) * level) for level in stretched)


# Steps and guidance of the base models: diffusers' examples and the authors' defaults, of which the other kinds of
# guidance are left out (see above).
PRESETS = {
    "ltx-2-distilled": DISTILLED,  # of LTX-2.3 too
    "ltx-2": replace(DISTILLED, timesteps=stretched_timesteps(40), shift=SHIFT, guidance_scale=4.0),
    "ltx-2.3": replace(DISTILLED, timesteps=stretched_timesteps(30), shift=SHIFT, guidance_scale=3.0),
}


class LTX2Reasoner(Reasoner):
    """`LTX2VideoTransformer3DModel` + `AutoencoderKLLTX2Video` + Gemma 3 and `LTX2TextConnectors`.

    Args:
        transformer, vae, text_encoder, tokenizer, connectors: the parts of a diffusers LTX-2 pipeline; they are frozen
            here.
        audio_channels: latent channels of the pipeline's audio VAE, which is not needed itself.
        settings: sampler and default sizes; `fps` also enters the positions and the length of the audio.

    Raises InputError when the parts do not fit together.
    """

    image_conditioning = takes_last_image = True

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        connectors: Any,
        audio_channels: int,
        settings: SamplerSettings | None = None,
    ) -> None:
        check_parts(transformer, vae, text_encoder, connectors, audio_channels)
        self.transformer, self.vae, self.text_encoder = (
            frozen(part) for part in (transformer, vae, nn.ModuleList([text_encoder, connectors]))
        )
        self.gemma, self.connectors, self.tokenizer = text_encoder, connectors, tokenizer
        if tokenizer is not None:  # a Reasoner that is built for a plan has none
            tokenizer.padding_side = "left"
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.audio_channels, self.audio_width = audio_channels, transformer.config.audio_in_channels
        self.settings = settings or SamplerSettings()
        self.dtype = transformer.dtype
        self.latent_channels = vae.config.latent_channels
        self.temporal_stride = vae.temporal_compression_ratio
        self.spatial_stride = vae.spatial_compression_ratio
        self.patch = (1, 1)
        self.latents_mean = vae.latents_mean.float().view(1, -1, 1, 1, 1)
        self.latents_std = vae.latents_std.float().view(1, -1, 1, 1, 1) / vae.config.scaling_factor
        # the decoder of LTX-2.3's VAE has one block more
        newer = len(vae.config.decoder_block_out_channels) > 3
        self.surrogate_decoder = "Kijai/" + (
            "LTX2.3_comfy/vae/taeltx2_3.safetensors" if newer else "LTXV2_comfy/VAE/taeltx_2.safetensors"
        )
        self.to(transformer.device)

    def audio_length(self, num_frames: int) -> int:
        """The number of latent frames of the audio of a video of `num_frames` frames, which are tokens too."""
        return round(num_frames / self.fps * self.transformer.audio_rope.audio_latents_per_second)

    def blank_condition(self, num_frames: int, height: int, width: int) -> Condition:
        length, connectors = self.settings.max_sequence_length, self.connectors
        _, channels, frames, *size = self.latent_shape(num_frames, height, width)

        def text(connector: Any) -> Tensor:
            return torch.empty(1, length, connector.inner_dim, dtype=self.dtype)

        inputs = {
            "audio_encoder_hidden_states": text(connectors.audio_connector),
            "video_coords": torch.empty(1, 3, frames * math.prod(size), 2),
            "audio_coords": torch.empty(1, 1, self.audio_length(num_frames), 2),
        }
        first_frame = torch.empty(1, channels, 1, *size)
        return Condition(text(connectors.video_connector), first_frame, num_frames, height, width, inputs)

    def check(self, num_frames: int, height: int, width: int) -> None:
        """See `Reasoner.check`; the prompt's tokens must be a multiple of the connectors' registers."""
        super().check(num_frames, height, width)
        limit = self.settings.max_sequence_length
        registers = self.connectors.config.video_connector_num_learnable_registers
        if limit % (registers or 1):
            raise InputError(f"max_sequence_length must be a multiple of {registers} for LTX-2, not {limit}")

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
        first_frame = None if image is None else self.encode_image(image, height, width)
        rope, audio_rope = self.transformer.rope, self.transformer.audio_rope
        _, _, frames, *size = self.latent_shape(num_frames, height, width)
        shared = {
            "video_coords": rope.prepare_video_coords(1, frames, *size, self.device, fps=self.fps),
            "audio_coords": audio_rope.prepare_audio_coords(1, self.audio_length(num_frames), self.device),
        }
        if last_image is not None:
            shared["last_frame"] = self.encode_image(last_image, height, width)
            coords = rope.prepare_video_coords(1, 1, *size, self.device, fps=self.fps)
            coords[:, 0] += (num_frames - 1) / self.fps
            shared["video_coords"] = torch.cat([shared["video_coords"], coords], 2)

        def condition(text: str, what: str) -> Condition:
            embeds, audio = self._encode_text(text)
            inputs = {"audio_encoder_hidden_states": audio, **shared}
            cut = check_cut(self.tokenizer, text.strip(), self.settings.max_sequence_length, what)
            return Condition(embeds, first_frame, num_frames, height, width, inputs, cut=cut)

        return self.with_negative(condition, prompt)

    def _encode_text(self, prompt: str) -> tuple[Tensor, Tensor]:
        """The embeddings (1, L, D) of a prompt for the video and (1, L, E) for the audio, of which none are masked.

        The connectors put learned registers in the place of the padding.
        """
        tokens = tokenize(self.tokenizer, prompt.strip(), self.settings.max_sequence_length).to(self.gemma.device)
        layers = self.gemma(**tokens, output_hidden_states=True).hidden_states
        text = torch.stack(layers, dim=-1).flatten(2, 3).to(self.connectors.dtype)
        video, audio, _ = self.connectors(text, tokens.attention_mask, padding_side="left")
        return video.to(self.device, self.dtype), audio.to(self.device, self.dtype)

    def noise_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int, int]:
        """See `Reasoner.noise_shape`; the last frames are for the audio's values."""
        one, channels, frames, *size = self.latent_shape(num_frames, height, width)
        values = self.audio_length(num_frames) * self.audio_width
        return one, channels, frames + math.ceil(values / (channels * math.prod(size))), size[0], size[1]

    def draw(self, condition: Condition, generator: torch.Generator | None) -> Tensor:
        """See `Reasoner.draw`; of the video and then of the audio, as diffusers' pipelines draw."""
        batch, length, channels = (
            len(condition.prompt_embeds),
            self.audio_length(condition.num_frames),
            self.audio_channels,
        )
        shapes = self.latent_shape(*condition.size)[1:], (channels, length, self.audio_width // channels)
        where = generator.device if generator is not None else torch.device("cpu")
        video, audio = (
            torch.randn((batch, *shape), generator=generator, device=where).to(self.device) for shape in shapes
        )
        return self._join(video, audio.transpose(1, 2).flatten(2))

    def _join(self, video: Tensor, audio: Tensor) -> Tensor:
        """The latents (B, C, T + K, h, w) of video (B, C, T, h, w) and audio (B, L, D), whose values fill K frames."""
        frame = video[:, :, 0].numel() // len(video)
        padded = nn.functional.pad(audio.flatten(1), (0, -audio.shape[1] * audio.shape[2] % frame))
        return torch.cat([video, padded.view(len(video), -1, *video.shape[1:2], *video.shape[3:]).transpose(1, 2)], 2)

    def _split(self, latents: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """The video (B, C, T, h, w) and the audio (B, L, D) of `_join`."""
        video, length = self.video(latents, condition), self.audio_length(condition.num_frames)
        audio = latents[:, :, video.shape[2] :].transpose(1, 2).flatten(1)[:, : length * self.audio_width]
        return video, audio.unflatten(1, (length, -1))

    def velocity(
        self, condition: Condition, latents: Tensor, sigma: float | Tensor, *, transformer: nn.Module | None = None
    ) -> Tensor:
        """See `Reasoner.velocity`, of video and audio; the tokens of a first frame are clean and have timestep 0.

        A last frame is no part of the latents: its tokens, clean too, stand after theirs, at the video's last time.
        """
        video, audio = self._split(latents, condition)
        batch, _, frames, height, width = video.shape
        tokens, per_frame = frames * height * width, height * width
        timestep = by_token = self.timestep(sigma, batch)
        inputs = dict(condition.inputs)
        last = inputs.pop("last_frame", None)
        if condition.first_frame is not None or last is not None:
            by_token = timestep[:, None].repeat(1, tokens)
        if condition.first_frame is not None:
            video = with_first_frame(video, condition.first_frame)
            by_token[:, :per_frame] = 0
        if last is not None:
            video = torch.cat([video, last], 2)
            by_token = torch.cat([by_token, by_token.new_zeros(batch, per_frame)], 1)
        network: Any = self.transformer if transformer is None else transformer
        video_velocity, audio_velocity = network(
            hidden_states=video.flatten(2).transpose(1, 2).to(self.dtype),
            audio_hidden_states=audio.to(self.dtype),
            encoder_hidden_states=condition.prompt_embeds,
            timestep=by_token,
            audio_timestep=timestep,
            sigma=timestep,
            use_cross_timestep=True,
            return_dict=False,
            **inputs,
        )
        video_velocity = video_velocity[:, :tokens].float().transpose(1, 2).unflatten(2, (frames, height, width))
        return self._join(video_velocity, audio_velocity.float())


def check_parts(transformer: Any, vae: Any, text_encoder: Any, connectors: Any, audio_channels: int) -> None:
    """Raise InputError for parts that do not fit together."""
    config, text = connectors.config, text_encoder.config.text_config
    width = transformer.config.caption_channels if transformer.config.use_prompt_embeddings else None
    for what, takes, given in (
        ("channels, and its VAE makes", transformer.config.in_channels, vae.config.latent_channels),
        (
            "values per word, and the connectors make",
            width or transformer.config.cross_attention_dim,
            connectors.video_connector.inner_dim,
        ),
        (
            "values per word for the audio, and the connectors make",
            width or transformer.config.audio_cross_attention_dim,
            connectors.audio_connector.inner_dim,
        ),
    ):
        if takes != given:
            raise InputError(f"the LTX-2 transformer takes {takes} {what} {given}: they belong to different models")
    makes = text.hidden_size * (text.num_hidden_layers + 1)
    if (takes := config.caption_channels * config.text_proj_in_factor) != makes:
        raise InputError(
            f"the LTX-2 connectors take {takes} values per word, and the text encoder makes {makes}: they belong to"
            " different models"
        )
    check_number(audio_channels, "audio_vae: latent_channels", whole=True, least=1)
    if transformer.config.audio_in_channels % audio_channels:
        raise InputError(
            f"the LTX-2 transformer takes {transformer.config.audio_in_channels} channels of audio, and the audio VAE"
            f" makes {audio_channels} for each frequency: they belong to different models"
        )


def load_ltx2(
    path_or_id: str,
    index: dict[str, Any],
    settings: SamplerSettings | None,
    dtype: torch.dtype,
    local_files_only: bool,
    **parts: Sequence[str],
) -> LTX2Reasoner:
    """Load the Reasoner of a diffusers LTX-2 pipeline, local or on the hub, whose ``model_index.json`` is `index`.

    settings: None are those of the distilled models. parts: see `load_transformers`. Raises InputError.
    """
    from diffusers import AutoencoderKLLTX2Video, LTX2VideoTransformer3DModel
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from transformers import Gemma3ForConditionalGeneration

    encoder = (index.get("text_encoder") or [None, None])[1]
    if encoder != "Gemma3ForConditionalGeneration":
        raise InputError(
            f"the text encoder of {path_or_id} is a {encoder}: only LTX-2 and 2.3, with Gemma 3, are known"
        )
    load = partial(load_network, name=path_or_id, local_files_only=local_files_only)
    transformer = load_transformers(
        LTX2VideoTransformer3DModel, path_or_id, ["transformer"], dtype, local_files_only, **parts
    )["transformer"]
    return LTX2Reasoner(
        transformer,
        load(AutoencoderKLLTX2Video, subfolder="vae", dtype=torch.float32),
        load(Gemma3ForConditionalGeneration, subfolder="text_encoder", dtype=dtype),
        load_tokenizer(path_or_id, "tokenizer", local_files_only),
        load(LTX2TextConnectors, subfolder="connectors", dtype=dtype),
        read_config(path_or_id, "audio_vae", "config.json", local_files_only)[1].get("latent_channels", 0),
        settings or DISTILLED,
    )


def adopt_ltx2(pipeline: Any, settings: SamplerSettings | None) -> LTX2Reasoner:
    """The Reasoner of a loaded LTX-2 pipeline's own parts; settings: None are those of the distilled models."""
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.connectors)
    return LTX2Reasoner(*parts, pipeline.audio_vae.config.latent_channels, settings or DISTILLED)


def build_ltx2(configs: Mapping[str, Any], settings: SamplerSettings, dtype: torch.dtype) -> LTX2Reasoner:
    """Build the Reasoner without weights from the configs of its parts."""
    from diffusers import AutoencoderKLLTX2Video, LTX2VideoTransformer3DModel
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    return LTX2Reasoner(
        cast(LTX2VideoTransformer3DModel.from_config(configs["transformer"]), dtype),
        AutoencoderKLLTX2Video.from_config(configs["vae"]),
        Gemma3ForConditionalGeneration(Gemma3Config(**configs["text_encoder"])).to(dtype),
        None,
        cast(LTX2TextConnectors.from_config(configs["connectors"]), dtype),
        configs["audio_vae"]["latent_channels"],
        settings,
    )


_LINEAR = ("to_q", "to_k", "to_v", "to_out.0")
_VIDEO, _AUDIO = ("attn1", "attn2"), ("audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
_MLP = ("net.0.proj", "net.2")
_EMBEDDINGS = {  # of timesteps: diffusers' name -> the authors'
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
}

LTX2 = Family(
    name="LTX-2",
    pipelines=("LTX2Pipeline", "LTX2ImageToVideoPipeline", "LTX2ConditionPipeline"),
    transformer="LTX2VideoTransformer3DModel",
    blocks="transformer_blocks",
    load=load_ltx2,
    build=build_ltx2,
    adopt=adopt_ltx2,
    presets=PRESETS,
    hub_ids={
        "Lightricks/LTX-2": "ltx-2",
        "rootonchair/LTX-2-19b-distilled": "ltx-2-distilled",
        "diffusers/LTX-2.3-Diffusers": "ltx-2.3",
        "diffusers/LTX-2.3-Distilled-Diffusers": "ltx-2-distilled",
    },
    lora_targets=[  # those that the authors' trainer calls video-only
        *(f"{attn}.{name}" for attn in _VIDEO for name in _LINEAR),
        *(f"ff.{name}" for name in _MLP),
    ],
    unread=r"video_to_audio_attn\.|audio_ff\.",  # the audio after the last block
    layers=LayerNames(  # diffusers kept the names of the blocks
        "transformer_blocks",
        {
            name: name
            for name in (
                *(f"{attn}.{each}" for attn in (*_VIDEO, *_AUDIO) for each in (*_LINEAR, "to_gate_logits")),
                *(f"{ff}.{each}" for ff in ("ff", "audio_ff") for each in _MLP),
            )
        },
        {"proj_in": "patchify_proj", "audio_proj_in": "audio_patchify_proj", "proj_out": "proj_out"}
        | {"audio_proj_out": "audio_proj_out"}
        | {
            f"{own}.{each}": f"{other}.{each}"
            for own, other in _EMBEDDINGS.items()
            for each in ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")
        }
        | {name: name for name in (f"{of}caption_projection.linear_{n}" for of in ("", "audio_") for n in (1, 2))},
        {f"{attn}.norm_{each}": f"{attn}.{each}_norm" for attn in (*_VIDEO, *_AUDIO) for each in "qk"}
        | {f"{of}{TABLE}": f"{of}{TABLE}" for of in ("", "audio_", "prompt_", "audio_prompt_")}
        | {f"{of}_a2v_cross_attn_{TABLE}": f"{TABLE}_a2v_ca_{of}" for of in ("video", "audio")},
        {f"audio_{TABLE}": f"audio_{TABLE}"},
    ),
)
