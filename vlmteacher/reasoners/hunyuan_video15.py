"""HunyuanVideo-1.5 of diffusers, image- and text-to-video, above all the step-distilled 480p image-to-video one.

Called as `HunyuanVideo15ImageToVideoPipeline` and `HunyuanVideo15Pipeline` call the parts, but for the padding of the
prompts: the transformer is given the tokens that count and nothing else, so that its attention needs no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from vlmteacher.checkpoints.pretrained import load_network, load_processor, load_tokenizer, read_config, refusing
from vlmteacher.errors import InputError
from vlmteacher.media import ImageInput, fit_image
from vlmteacher.prompts import check_cut, check_prompt, encode, quote
from vlmteacher.reasoners.attention import attend
from vlmteacher.reasoners.base import Condition, Reasoner, Settings
from vlmteacher.reasoners.parts import load_transformers
from vlmteacher.reasoners.presets import PRESETS


class HunyuanVideo15Reasoner(Reasoner):
    """`HunyuanVideo15Transformer3DModel` + `AutoencoderKLHunyuanVideo15` + Qwen2.5-VL, ByT5 and SigLIP encoders.

    A step-distilled transformer (``use_meanflow``) gives the mean velocity from one noise level to another, which it
    is told too; in the one-step prediction that other level is 0.

    Args:
        transformer, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2: the parts of a diffusers pipeline;
            they are frozen here, and the transformer runs without masks (`drop_masks`).
        image_encoder, feature_extractor: SigLIP, of image-to-video pipelines, which need an image; None of the others.
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
        settings: Settings | None = None,
    ) -> None:
        from diffusers import HunyuanVideo15Pipeline

        encoders = [part for part in (text_encoder, text_encoder_2, image_encoder) if part is not None]
        self.transformer, self.vae, self.text_encoder = (
            part.eval().requires_grad_(False) for part in (transformer, vae, nn.ModuleList(encoders))
        )
        self._prompts: Any = HunyuanVideo15Pipeline(
            text_encoder, tokenizer, transformer, vae, None, text_encoder_2, tokenizer_2, None
        )
        if tokenizer_2 is not None:  # a plan has none
            tokenizer_2.split_special_tokens = True  # control tokens in quoted words are text, byte by byte
        self.image_encoder, self.feature_extractor = image_encoder, feature_extractor
        self.image_conditioning = image_encoder is not None
        self.settings = settings or Settings()
        self.dtype = transformer.dtype
        self.latent_channels = vae.config.latent_channels
        self.temporal_stride = vae.temporal_compression_ratio
        self.spatial_stride = vae.spatial_compression_ratio
        self.patch = (transformer.config.patch_size, transformer.config.patch_size)
        self.latents_mean = torch.zeros(1, self.latent_channels, 1, 1, 1)
        self.latents_std = torch.full_like(self.latents_mean, 1 / vae.config.scaling_factor)
        vae.enable_tiling()  # beyond 256 pixels, as all published examples do: whole frames take tens of gigabytes
        drop_masks(transformer)
        self.to(transformer.device)

    @torch.no_grad()
    def encode(self, prompt: str, image: ImageInput | None, num_frames: int, height: int, width: int) -> Condition:
        """See `Reasoner.encode`. The image is fitted to the video's size."""
        self.check(num_frames, height, width)
        check_prompt(prompt)
        if image is None and self.image_conditioning:
            raise InputError(
                "this Reasoner makes videos of an image (it is HunyuanVideo-1.5 I2V): give the first frame"
            )
        if image is not None and not self.image_conditioning:
            raise InputError("this Reasoner takes no image (it is HunyuanVideo-1.5 T2V): give only a prompt")
        _, channels, *size = self.latent_shape(num_frames, height, width)
        known = torch.zeros(1, channels + 1, *size, device=self.device)  # clean latents, and where they are known
        features = torch.zeros(1, 0, self.transformer.config.image_embed_dim, device=self.device, dtype=self.dtype)
        if image is not None:
            known[:, :-1, :1] = self.encode_image(image, height, width)
            known[:, -1, 0] = 1
            features = self._encode_features(image, height, width)
        shared = {"known_latents": known.to(self.dtype), "image_embeds": features}

        def condition(text: str, what: str) -> Condition:
            embeds, inputs, cut = self._encode_text(text, what)
            return Condition(embeds, None, num_frames, height, width, inputs | shared, cut=cut)

        found = condition(prompt, "prompt")
        if not self.settings.guided:
            return found
        return replace(found, negative=condition(self.settings.negative_prompt, "negative_prompt"))

    def _encode_text(self, prompt: str, what: str) -> tuple[Tensor, dict[str, Tensor], dict[str, int]]:
        """Qwen's embeddings (1, L, D); as further inputs those of the quoted words by ByT5; what was cut off of both.

        Without padding. As the pipeline's `encode_prompt`, but that control tokens in the prompt are text.
        """
        from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts

        pipe = self._prompts
        where = pipe.text_encoder.device  # it may stay on the CPU: it runs once an instance
        skipped = pipe.prompt_template_encode_start_idx  # tokens of the system turn
        limit = self.settings.max_sequence_length + skipped
        chat = [
            {"role": "system", "content": pipe.system_message},
            {"role": "user", "content": quote(pipe.tokenizer, prompt) or " "},
        ]
        with refusing("the text encoder's chat template"):
            text = pipe.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
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
        """SigLIP's features (1, N, D) of the image in the video's size."""
        pixels = self.feature_extractor(fit_image(image, height, width), return_tensors="pt").pixel_values
        hidden = self.image_encoder(pixels.to(self.image_encoder.device, self.image_encoder.dtype)).last_hidden_state
        return hidden.to(self.device, self.dtype)

    def velocity(
        self, condition: Condition, latents: Tensor, sigma: float | Tensor, *, transformer: nn.Module | None = None
    ) -> Tensor:
        """See `Reasoner.velocity`; the mean one down to 0 where the transformer gives means."""
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

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        video = self.vae.decode((latents * self.latents_std).to(self.vae.dtype), return_dict=False)[0]
        return ((video[0].float() + 1) / 2).clamp(0, 1).transpose(0, 1)


def drop_masks(transformer: Any) -> None:
    """Let a `HunyuanVideo15Transformer3DModel` take every text token that it is given; its masks say nothing then.

    The stock one makes a mask of (all tokens)^2 in every block, 2.5 GB for 121 frames of 480p, kept for the backward;
    and it sorts the padding out by boolean indices, whose sizes no trace and no CUDA graph can know.
    """
    transformer.forward = MethodType(_forward, transformer)
    for block in transformer.transformer_blocks:
        block.attn.set_processor(UnmaskedAttention())


def _forward(
    self: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    timestep_r: Tensor | None = None,
    encoder_hidden_states_2: Tensor | None = None,
    encoder_attention_mask_2: Tensor | None = None,
    image_embeds: Tensor | None = None,
    return_dict: bool = False,
) -> tuple[Tensor]:
    """The stock forward where nothing is padding: image, quoted words and prompt, in this order, then the blocks."""
    rotary = self.rope(hidden_states)
    temb = self.time_embed(timestep, timestep_r=timestep_r)
    texts = (
        self.context_embedder(encoder_hidden_states, timestep),
        self.context_embedder_2(encoder_hidden_states_2),
        self.image_embedder(image_embeds),
    )
    text = torch.cat([x + kind for x, kind in zip(texts, self.cond_type_embed.weight, strict=True)][::-1], 1)
    size = [n // p for n, p in zip(hidden_states.shape[2:], self.x_embedder.proj.kernel_size, strict=True)]
    video = self.x_embedder(hidden_states)
    for block in self.transformer_blocks:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            video, text = self._gradient_checkpointing_func(block, video, text, temb, None, rotary)
        else:
            video, text = block(video, text, temb, None, rotary)
    patches = self.proj_out(self.norm_out(video, temb)).unflatten(1, size)  # (B, T, h, w, C p_t p p)
    patches = patches.unflatten(-1, (-1, *self.x_embedder.proj.kernel_size)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return (patches.flatten(6, 7).flatten(4, 5).flatten(2, 3),)


class UnmaskedAttention:
    """The blocks' joint attention of video and text without a mask."""

    _attention_backend = None  # diffusers' `set_attention_backend` sets it
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        from diffusers.models.embeddings import apply_rotary_emb

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1))

        def joint(project: nn.Module, norm: nn.Module, project_text: nn.Module, norm_text: nn.Module) -> Tensor:
            turned = apply_rotary_emb(norm(heads(project(hidden_states))), image_rotary_emb, sequence_dim=1)
            return torch.cat([turned, norm_text(heads(project_text(encoder_hidden_states)))], 1)

        attended = attend(
            self,
            joint(attn.to_q, attn.norm_q, attn.add_q_proj, attn.norm_added_q),
            joint(attn.to_k, attn.norm_k, attn.add_k_proj, attn.norm_added_k),
            torch.cat([heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(encoder_hidden_states))], 1),
        )
        video, text = attended.flatten(2).split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        return attn.to_out[0](video), attn.to_add_out(text)


def load_hunyuan_video15(
    path_or_id: str,
    index: dict[str, Any],
    settings: Settings | None,
    dtype: torch.dtype,
    local_files_only: bool,
    **parts: Sequence[str],
) -> HunyuanVideo15Reasoner:
    """The Reasoner of a diffusers HunyuanVideo-1.5 pipeline, local or on the hub, whose index is `index`.

    settings: None follows the configs of transformer, scheduler and guider. parts: see `load_transformers`.
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
        settings=settings or _settings(path_or_id, transformer.config, local_files_only),
        **image_parts,
    )


def _settings(path_or_id: str, config: Any, local_files_only: bool) -> Settings:
    """How a checkpoint of an unknown name is sampled, by what its configs say."""
    size = "480p" if config.target_size <= 640 else "720p-i2v"
    known = PRESETS[f"hunyuan-video-1.5-{'480p-i2v-step-distilled' if config.use_meanflow else size}"]
    _, scheduler = read_config(path_or_id, "scheduler", "scheduler_config.json", local_files_only)
    _, guider = read_config(path_or_id, "guider", "guider_config.json", local_files_only)
    entries: dict[str, Any] = {"shift": scheduler.get("shift"), "guidance_scale": guider.get("guidance_scale")}
    settings = replace(known, **entries)
    settings.check()
    return settings
