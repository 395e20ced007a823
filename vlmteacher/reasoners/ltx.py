"""The LTX-Video family of diffusers (0.9.x), above all the distilled 0.9.8 checkpoints.

The parts are called as `LTXPipeline`, `LTXImageToVideoPipeline` and `LTXConditionPipeline` call them: latents as
tokens, a first latent frame with timestep 0 where an image is given, positions in pixels and seconds. The noise that
`LTXConditionPipeline` adds to the image at every step (``image_cond_noise_scale``) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmteacher.checkpoints.pretrained import cast, load_network, load_tokenizer
from vlmteacher.errors import InputError
from vlmteacher.media import ImageInput
from vlmteacher.ops.linear import frozen
from vlmteacher.prompts import check_cut, tokenize
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.condition import Condition, with_first_frame
from vlmteacher.reasoners.family import TABLE, DecoderFile, Family, LayerNames
from vlmteacher.reasoners.parts import load_transformers
from vlmteacher.reasoners.sampling import SamplerSettings

# The distilled checkpoints, at the noise levels of their distillation (configs of github.com/Lightricks/LTX-Video).
DISTILLED = SamplerSettings(
    (1000.0, 993.7, 987.5, 981.2, 975.0, 909.4, 725.0, 421.9),
    sampler="euler",
    num_frames=121,
    width=1216,
    fps=30.0,
    max_sequence_length=256,
)


class LTXReasoner(Reasoner):
    """`LTXVideoTransformer3DModel` + `AutoencoderKLLTXVideo` + a T5 text encoder.

    Args:
        transformer, vae, text_encoder, tokenizer: the parts of a diffusers LTX pipeline; they are frozen here.
        condition_pipeline: as in `LTXConditionPipeline` (0.9.5 and later), T5 does not attend to the prompt's padding,
            a latent frame has the time of its first frame, and a last frame can be given. The older pipelines attend to
            the padding and place latent frame k at frame 8 k, as if the first latent frame held 8 frames too.
        settings: sampler and default sizes; `fps` also enters the positions.
    """

    image_conditioning = True

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        condition_pipeline: bool,
        settings: SamplerSettings | None = None,
    ) -> None:
        self.transformer, self.vae, self.text_encoder = (frozen(part) for part in (transformer, vae, text_encoder))
        self.tokenizer = tokenizer
        self.condition_pipeline = self.takes_last_image = condition_pipeline
        self.settings = settings or SamplerSettings()
        self.dtype = transformer.dtype
        self.latent_channels = vae.config.latent_channels
        self.temporal_stride = vae.temporal_compression_ratio
        self.spatial_stride = vae.spatial_compression_ratio
        self.patch = (1, 1)
        self.latents_mean = vae.latents_mean.float().view(1, -1, 1, 1, 1)
        self.latents_std = vae.latents_std.float().view(1, -1, 1, 1, 1) / vae.config.scaling_factor
        self.to(transformer.device)

    def blank_condition(self, num_frames: int, height: int, width: int) -> Condition:
        length, width_of_text = self.settings.max_sequence_length, self.transformer.config.caption_channels
        _, channels, _, *size = self.latent_shape(num_frames, height, width)
        embeds = torch.empty(1, length, width_of_text, dtype=self.dtype)
        inputs = {"encoder_attention_mask": torch.ones(1, length, dtype=torch.bool)}
        return Condition(embeds, torch.empty(1, channels, 1, *size), num_frames, height, width, inputs)

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
        last_frame = {} if last_image is None else {"last_frame": self.encode_image(last_image, height, width)}

        def condition(text: str, what: str) -> Condition:
            embeds, mask = self._encode_text(text)
            cut = check_cut(self.tokenizer, text, self.settings.max_sequence_length, what)
            inputs = {"encoder_attention_mask": mask, **last_frame}
            return Condition(embeds, first_frame, num_frames, height, width, inputs, cut=cut)

        return self.with_negative(condition, prompt)

    def _encode_text(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Embeddings (1, L, D) and mask (1, L) of the prompt's own tokens."""
        tokens = tokenize(self.tokenizer, prompt, self.settings.max_sequence_length)
        tokens = tokens.to(self.text_encoder.device)  # which may be the CPU: it runs once an instance
        mask = tokens.attention_mask if self.condition_pipeline else None
        hidden = self.text_encoder(tokens.input_ids, mask).last_hidden_state
        return hidden.to(self.device, self.dtype), tokens.attention_mask.to(self.device).bool()

    def velocity(
        self, condition: Condition, latents: Tensor, sigma: float | Tensor, *, transformer: nn.Module | None = None
    ) -> Tensor:
        """See `Reasoner.velocity`; the tokens of a first frame are clean and have timestep 0.

        A last frame is no part of the latents: its tokens, clean too, stand before theirs, at the video's last time.
        """
        batch, _, frames, height, width = latents.shape
        size, per_frame = (frames, height, width), height * width
        timestep, positions = self.timestep(sigma, batch), self._positions(*size)
        inputs = dict(condition.inputs)
        last = inputs.pop("last_frame", None)
        if condition.first_frame is not None or last is not None:
            timestep = timestep[:, None].repeat(1, frames * per_frame)
        if condition.first_frame is not None:
            latents = with_first_frame(latents, condition.first_frame)
            timestep[:, :per_frame] = 0
        if last is not None:
            latents = torch.cat([last, latents], 2)
            timestep = torch.cat([timestep.new_zeros(batch, per_frame), timestep], 1)
            at_end = self._positions(1, height, width, start=condition.num_frames - 1)
            positions = torch.cat([at_end, positions], 2)
        network: Any = self.transformer if transformer is None else transformer
        tokens = network(
            hidden_states=latents.flatten(2).transpose(1, 2).to(self.dtype),
            encoder_hidden_states=condition.prompt_embeds,
            timestep=timestep,
            video_coords=positions.expand(batch, -1, -1),
            return_dict=False,
            **inputs,
        )[0]
        return tokens[:, -frames * per_frame :].float().transpose(1, 2).unflatten(2, size)

    def _positions(self, frames: int, height: int, width: int, start: int = 0) -> Tensor:
        """The positions (1, 3, tokens) float32 of the tokens: time in seconds, row and column in pixels.

        start: the place of the first frame in the video.
        """
        time, down, across = (torch.arange(n, dtype=torch.float32, device=self.device) for n in (frames, height, width))
        time = time * self.temporal_stride
        if self.condition_pipeline:
            time = (time + 1 - self.temporal_stride).clamp(min=0) + start
        axes = (time / self.fps, down * self.spatial_stride, across * self.spatial_stride)
        return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)[None]


def load_ltx(
    path_or_id: str,
    index: dict[str, Any],
    settings: SamplerSettings | None,
    dtype: torch.dtype,
    local_files_only: bool,
    **parts: Sequence[str],
) -> LTXReasoner:
    """Load the Reasoner of a diffusers LTX-Video pipeline, local or on the hub, whose ``model_index.json`` is `index`.

    settings: None are those of the distilled models. parts: see `load_transformers`. Raises InputError.
    """
    from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel
    from transformers import T5EncoderModel

    load = partial(load_network, name=path_or_id, local_files_only=local_files_only)
    transformer = load_transformers(
        LTXVideoTransformer3DModel, path_or_id, ["transformer"], dtype, local_files_only, **parts
    )["transformer"]
    vae = load(AutoencoderKLLTXVideo, subfolder="vae", dtype=torch.float32)
    text_encoder = load(T5EncoderModel, subfolder="text_encoder", dtype=dtype)
    for what, wanted, got in (
        ("channels, and its VAE makes", transformer.config.in_channels, vae.config.latent_channels),
        (
            "values per word, and its text encoder makes",
            transformer.config.caption_channels,
            text_encoder.config.d_model,
        ),
    ):
        if wanted != got:
            raise InputError(
                f"the transformer of {path_or_id} takes {wanted} {what} {got}: they belong to different models"
            )
    tokenizer = load_tokenizer(path_or_id, "tokenizer", local_files_only)
    condition_pipeline = index["_class_name"] == "LTXConditionPipeline"
    return LTXReasoner(transformer, vae, text_encoder, tokenizer, condition_pipeline, settings or DISTILLED)


def adopt_ltx(pipeline: Any, settings: SamplerSettings | None) -> LTXReasoner:
    """The Reasoner of a loaded LTX-Video pipeline's own parts; settings: None are those of the distilled models."""
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
    return LTXReasoner(*parts, type(pipeline).__name__ == "LTXConditionPipeline", settings or DISTILLED)


def build_ltx(configs: Mapping[str, Any], settings: SamplerSettings, dtype: torch.dtype) -> LTXReasoner:
    """Build the Reasoner without weights from the configs of its parts and the class of its pipeline."""
    from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    return LTXReasoner(
        cast(LTXVideoTransformer3DModel.from_config(configs["transformer"]), dtype),
        AutoencoderKLLTXVideo.from_config(configs["vae"]),
        T5EncoderModel(T5Config(**configs["text_encoder"])).to(dtype),
        None,
        configs["pipeline"] == "LTXConditionPipeline",
        settings,
    )


_ATTENTIONS = ("attn1", "attn2")

LTX = Family(
    name="LTX-Video",
    pipelines=("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"),
    transformer="LTXVideoTransformer3DModel",
    blocks="transformer_blocks",
    load=load_ltx,
    build=build_ltx,
    adopt=adopt_ltx,
    presets={"ltx-0.9.8-distilled": DISTILLED},
    hub_ids={
        "Lightricks/LTX-Video-0.9.7-distilled": "ltx-0.9.8-distilled",  # distilled at the same levels
        "Lightricks/LTX-Video-0.9.8-13B-distilled": "ltx-0.9.8-distilled",
    },
    lora_targets=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
    layers=LayerNames(  # diffusers kept the names of the blocks
        "transformer_blocks",
        {f"{attn}.{name}": f"{attn}.{name}" for attn in _ATTENTIONS for name in ("to_q", "to_k", "to_v", "to_out.0")}
        | {"ff.net.0.proj": "ff.net.0.proj", "ff.net.2": "ff.net.2"},
        {
            "proj_in": "patchify_proj",
            "time_embed.emb.timestep_embedder.linear_1": "adaln_single.emb.timestep_embedder.linear_1",
            "time_embed.emb.timestep_embedder.linear_2": "adaln_single.emb.timestep_embedder.linear_2",
            "time_embed.linear": "adaln_single.linear",
            "caption_projection.linear_1": "caption_projection.linear_1",
            "caption_projection.linear_2": "caption_projection.linear_2",
        },
        {f"{attn}.norm_{each}": f"{attn}.{each}_norm" for attn in _ATTENTIONS for each in "qk"} | {TABLE: TABLE},
    ),
    decoder_files=(
        DecoderFile(
            "taeltx",
            refusal="decodes the latents of LTX-2, which are not those of LTX-Video 0.9: there is no published decoder"
            " for these, train one with `vlmteacher distill decoder`",
        ),
    ),
)
