"""HunyuanVideo-1.5 of diffusers, image- and text-to-video, above all the step-distilled 480p image-to-video model.

The parts are called as `HunyuanVideo15ImageToVideoPipeline` and `HunyuanVideo15Pipeline` call them, except that prompts
are not padded: the transformer gets the tokens that count and no others, so its attention needs no mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmteacher.chat_templates import render
from vlmteacher.checkpoints.pretrained import cast, load_network, load_processor, load_tokenizer
from vlmteacher.errors import InputError
from vlmteacher.media import ImageInput, fit_image
from vlmteacher.ops.linear import frozen
from vlmteacher.prompts import check_cut, encode, quote
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.condition import Condition
from vlmteacher.reasoners.hunyuan_video15.presets import find_settings, guidance_scale, settings_by_configs
from vlmteacher.reasoners.hunyuan_video15.unmasked import drop_masks
from vlmteacher.reasoners.parts import load_transformers
from vlmteacher.reasoners.sampling import SamplerSettings

IMAGE_TOKENS = 729  # SigLIP so400m/14 at 384 pixels
GLYPHS = 256  # ByT5 tokens, the most that quoted words may take


class HunyuanVideo15Reasoner(Reasoner):
    """`HunyuanVideo15Transformer3DModel` + `AutoencoderKLHunyuanVideo15` + Qwen2.5-VL, ByT5 and SigLIP encoders.

    A step-distilled transformer (``use_meanflow``) predicts the mean velocity from one noise level to another, which is
    an input too; in the one-step prediction it is 0.

    Args:
        transformer, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2: the parts of a diffusers pipeline;
            they are frozen here, and the transformer runs without masks (`drop_masks`).
        image_encoder, feature_extractor: SigLIP, in image-to-video pipelines, which need an image; None in the others.
        settings: sampler and default sizes.
    """

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        settings: SamplerSettings | None = None,
    ) -> None:
        from diffusers import HunyuanVideo15Pipeline

        encoders = [part for part in (text_encoder, text_encoder_2, image_encoder) if part is not None]
        self.transformer, self.vae, self.text_encoder = (
            frozen(part) for part in (transformer, vae, nn.ModuleList(encoders))
        )
        self._prompts: Any = HunyuanVideo15Pipeline(
            text_encoder, tokenizer, transformer, vae, None, text_encoder_2, tokenizer_2, None
        )
        if tokenizer_2 is not None:  # a Reasoner that is built for a plan has none
            tokenizer_2.split_special_tokens = True  # control tokens in quoted words are text, byte by byte
        self.image_encoder, self.feature_extractor = image_encoder, feature_extractor
        self.needs_image = image_encoder is not None
        self.settings = settings or SamplerSettings()
        self.dtype = transformer.dtype
        self.latent_channels = vae.config.latent_channels
        self.temporal_stride = vae.temporal_compression_ratio
        self.spatial_stride = vae.spatial_compression_ratio
        self.patch = (transformer.config.patch_size, transformer.config.patch_size)
        self.latents_mean = torch.zeros(1, self.latent_channels, 1, 1, 1)
        self.latents_std = torch.full_like(self.latents_mean, 1 / vae.config.scaling_factor)
        vae.enable_tiling()  # beyond 256 pixels, as in all published examples: whole frames take tens of gigabytes
        drop_masks(transformer)
        self.to(transformer.device)

    def blank_condition(self, num_frames: int, height: int, width: int) -> Condition:
        config, length = self.transformer.config, self.settings.max_sequence_length
        _, channels, *size = self.latent_shape(num_frames, height, width)

        def text(count: int, width: int) -> tuple[Tensor, Tensor]:
            return torch.empty(1, count, width, dtype=self.dtype), torch.ones(1, count, dtype=torch.bool)

        embeds, mask = text(length, config.text_embed_dim)
        glyphs, glyphs_mask = text(GLYPHS, config.text_embed_2_dim)
        inputs = {
            "encoder_attention_mask": mask,
            "encoder_hidden_states_2": glyphs,
            "encoder_attention_mask_2": glyphs_mask,
            "image_embeds": text(IMAGE_TOKENS, config.image_embed_dim)[0],
            "known_latents": torch.empty(1, channels + 1, *size, dtype=self.dtype),
        }
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
            raise InputError(
                "this Reasoner makes videos of an image (it is HunyuanVideo-1.5 I2V): give the first frame"
            )
        if image is not None and not self.needs_image:
            raise InputError("this Reasoner takes no image (it is HunyuanVideo-1.5 T2V): give only a prompt")
        _, channels, *size = self.latent_shape(num_frames, height, width)
        known = torch.zeros(1, channels + 1, *size, device=self.device)  # clean latents and their mask
        features = torch.zeros(1, 0, self.transformer.config.image_embed_dim, device=self.device, dtype=self.dtype)
        if image is not None:
            known[:, :-1, :1] = self.encode_image(image, height, width)
            known[:, -1, 0] = 1
            features = self._encode_features(image, height, width)
        shared = {"known_latents": known.to(self.dtype), "image_embeds": features}

        def condition(text: str, what: str) -> Condition:
            embeds, inputs, cut = self._encode_text(text, what)
            return Condition(embeds, None, num_frames, height, width, inputs | shared, cut=cut)

        return self.with_negative(condition, prompt)

    def _encode_text(self, prompt: str, what: str) -> tuple[Tensor, dict[str, Tensor], dict[str, int]]:
        """Encode a prompt without padding to Qwen's embeddings (1, L, D), further inputs, and the tokens cut off.

        The further inputs are ByT5's embeddings of the quoted words and the masks. The same as the pipeline's
        `encode_prompt`, except that control tokens in the prompt are read as text.
        """
        from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts

        pipe = self._prompts
        where = pipe.text_encoder.device  # which may be the CPU: it runs once an instance
        skipped = pipe.prompt_template_encode_start_idx  # tokens of the system turn
        limit = self.settings.max_sequence_length + skipped
        chat = [
            {"role": "system", "content": pipe.system_message},
            {"role": "user", "content": quote(pipe.tokenizer, prompt) or " "},
        ]
        text = render(pipe.tokenizer, chat, "the text encoder's chat template")
        ids = encode(pipe.tokenizer, text)
        cut = check_cut(pipe.tokenizer, ids[skipped:], limit - skipped, what)
        tokens = pipe.tokenizer.pad(
            {"input_ids": [ids[:limit]]}, padding="max_length", max_length=limit, return_tensors="pt"
        ).to(where)
        hidden = pipe.text_encoder(**tokens, output_hidden_states=True).hidden_states[-3]
        embeds, mask = hidden[:, skipped:], tokens.attention_mask[:, skipped:]
        if (quoted := extract_glyph_texts(prompt)) is not None:
            letters = pipe.tokenizer_2(quoted)["input_ids"]
            cut |= check_cut(pipe.tokenizer_2, letters, pipe.tokenizer_2_max_length, f"quoted_text_of_the_{what}")
        glyphs, glyphs_mask = pipe._get_byt5_prompt_embeds(
            pipe.tokenizer_2, pipe.text_encoder_2, prompt, where, pipe.tokenizer_2_max_length
        )
        embeds, glyphs = (
            x[:, m[0].bool()].to(self.device, self.dtype) for x, m in ((embeds, mask), (glyphs, glyphs_mask))
        )
        inputs = {
            "encoder_attention_mask": torch.ones(embeds.shape[:2], dtype=torch.bool, device=self.device),
            "encoder_hidden_states_2": glyphs,
            "encoder_attention_mask_2": torch.ones(glyphs.shape[:2], dtype=torch.bool, device=self.device),
        }
        return embeds, inputs, cut

    def _encode_features(self, image: ImageInput, height: int, width: int) -> Tensor:
        """SigLIP's features (1, N, D) of the image, fitted to the video's size."""
        pixels = self.feature_extractor(fit_image(image, height, width), return_tensors="pt").pixel_values
        hidden = self.image_encoder(pixels.to(self.image_encoder.device, self.image_encoder.dtype)).last_hidden_state
        return hidden.to(self.device, self.dtype)

    def velocity(
        self, condition: Condition, latents: Tensor, sigma: float | Tensor, *, transformer: nn.Module | None = None
    ) -> Tensor:
        """See `Reasoner.velocity`; a step-distilled transformer predicts the mean velocity down to noise level 0."""
        return self._velocity(condition, latents, sigma, 0.0, transformer)

    def mean_velocity(self, condition: Condition, latents: Tensor, sigma: float, until: float) -> Tensor:
        velocity = self._velocity(condition, latents, sigma, until)
        if condition.negative is None:
            return velocity
        return self._velocity(condition.negative, latents, sigma, until).lerp(velocity, self.settings.guidance_scale)

    def _velocity(
        self,
        condition: Condition,
        latents: Tensor,
        sigma: float | Tensor,
        until: float,
        transformer: nn.Module | None = None,
    ) -> Tensor:
        inputs = dict(condition.inputs)
        # The embedding of a timestep is computed in the timestep's dtype.
        timestep, timestep_r = (self.timestep(level, len(latents)).to(self.dtype) for level in (sigma, until))
        network: Any = self.transformer if transformer is None else transformer
        return network(
            hidden_states=torch.cat([latents.to(self.dtype), inputs.pop("known_latents")], 1),
            timestep=timestep,
            timestep_r=timestep_r if network.config.use_meanflow else None,
            encoder_hidden_states=condition.prompt_embeds,
            return_dict=False,
            **inputs,
        )[0].float()


def load_hunyuan_video15(
    path_or_id: str,
    index: dict[str, Any],
    settings: SamplerSettings | None,
    dtype: torch.dtype,
    local_files_only: bool,
    **parts: Sequence[str],
) -> HunyuanVideo15Reasoner:
    """Load the Reasoner of a diffusers HunyuanVideo-1.5 pipeline, local or on the hub; `index`: its model_index.json.

    settings: None follows the configs of transformer, scheduler and guider. parts: see `load_transformers`. Raises
    InputError.
    """
    from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
    from transformers import Qwen2_5_VLTextModel, SiglipImageProcessor, SiglipVisionModel, T5EncoderModel

    load = partial(load_network, name=path_or_id, local_files_only=local_files_only)
    transformer = load_transformers(
        HunyuanVideo15Transformer3DModel, path_or_id, ["transformer"], dtype, local_files_only, **parts
    )["transformer"]
    vae = load(AutoencoderKLHunyuanVideo15, subfolder="vae", dtype=torch.float32)
    text_encoder = load(Qwen2_5_VLTextModel, subfolder="text_encoder", dtype=dtype)
    takes, makes = transformer.config.in_channels, 2 * vae.config.latent_channels + 1
    if takes != makes:
        raise InputError(
            f"the transformer of {path_or_id} takes {takes} channels, with its VAE it would be given {makes} (latents,"
            " known latents and a mask): they belong to different models"
        )
    if transformer.config.text_embed_dim != text_encoder.config.hidden_size:
        raise InputError(
            f"the transformer of {path_or_id} takes {transformer.config.text_embed_dim} values per word, and its text"
            f" encoder makes {text_encoder.config.hidden_size}: they belong to different models"
        )
    image_parts = {}
    if index["_class_name"] == "HunyuanVideo15ImageToVideoPipeline":
        image_parts = {
            "image_encoder": load(SiglipVisionModel, subfolder="image_encoder", dtype=dtype),
            "feature_extractor": load_processor(
                SiglipImageProcessor, path_or_id, "feature_extractor", local_files_only
            ),
        }
    return HunyuanVideo15Reasoner(
        transformer,
        vae,
        text_encoder,
        load_tokenizer(path_or_id, "tokenizer", local_files_only),
        load(T5EncoderModel, subfolder="text_encoder_2", dtype=dtype),
        load_tokenizer(path_or_id, "tokenizer_2", local_files_only),
        settings=settings or find_settings(path_or_id, transformer.config, local_files_only),
        **image_parts,
    )


def adopt_hunyuan_video15(pipeline: Any, settings: SamplerSettings | None) -> HunyuanVideo15Reasoner:
    """The Reasoner of a loaded HunyuanVideo-1.5 pipeline's own parts; settings: None follows its configs."""
    if settings is None:
        guider = {**pipeline.guider.config, "_class_name": type(pipeline.guider).__name__}
        guidance = guidance_scale(guider, "the pipeline's guider")
        settings = settings_by_configs(pipeline.transformer.config, pipeline.scheduler.config.shift, guidance)
    return HunyuanVideo15Reasoner(
        pipeline.transformer,
        pipeline.vae,
        pipeline.text_encoder,
        pipeline.tokenizer,
        pipeline.text_encoder_2,
        pipeline.tokenizer_2,
        getattr(pipeline, "image_encoder", None),
        getattr(pipeline, "feature_extractor", None),
        settings=settings,
    )


def build_hunyuan_video15(
    configs: Mapping[str, Any], settings: SamplerSettings, dtype: torch.dtype
) -> HunyuanVideo15Reasoner:
    """Build the Reasoner without weights from the configs of its parts."""
    from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
    from transformers import (
        Qwen2_5_VLTextConfig,
        Qwen2_5_VLTextModel,
        SiglipVisionConfig,
        SiglipVisionModel,
        T5Config,
        T5EncoderModel,
    )

    siglip = configs.get("image_encoder")
    return HunyuanVideo15Reasoner(
        cast(HunyuanVideo15Transformer3DModel.from_config(configs["transformer"]), dtype),
        AutoencoderKLHunyuanVideo15.from_config(configs["vae"]),
        Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**configs["text_encoder"])).to(dtype),
        None,
        T5EncoderModel(T5Config(**configs["text_encoder_2"])).to(dtype),
        None,
        None if siglip is None else SiglipVisionModel(SiglipVisionConfig(**siglip)).to(dtype),
        settings=settings,
    )
