"""InternVL (InternVL3 and its like) as the Teacher, on transformers' own `InternVLForConditionalGeneration`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.teachers.experts import SparseDecoder
from vlmteacher.teachers.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    VisionSettings,
    preprocess_frames,
)
from vlmteacher.teachers.prompt import Clip
from vlmteacher.teachers.visual_checkpoint import attend
from vlmteacher.teachers.vlm import VLMTeacher

CONTEXT = "<IMG_CONTEXT>"
TOKENS = {  # of the published checkpoints: the tokenizer's attributes
    "start_image_token": "<img>",
    "context_image_token": CONTEXT,
    "end_image_token": "</img>",
    "video_token": "<video>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}"
    "{{ {'image': '<IMG_CONTEXT>', 'video': '<video>'}[part.type] }}\n{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class InternVLTeacher(VLMTeacher):
    """A frozen InternVL. Every frame is an image of one fixed size, on a line of its own: `Frame1: <img>...`.

    An image that queries are written from is one tile of that size; the stock processor may cut it into several.
    """

    architecture = "InternVLForConditionalGeneration"
    token_ids: ClassVar = {"image_token_id": CONTEXT}
    takes_goal_image = True
    frames_per_patch = 1
    decoder = SparseDecoder()  # InternVL3.5 has experts from 30B on

    def __init__(self, model: Any, tokenizer: Any, video: VisionSettings, image: VisionSettings | None = None) -> None:
        config = model.config
        if config.vision_feature_layer != -1:
            raise InputError(f"teacher: vision_feature_layer {config.vision_feature_layer} is not supported, only -1")
        sizes = {side for settings in (video, image or video) for side in settings.fixed_size or ()}
        if len(sizes) != 1:
            raise InputError(
                f"teacher: its processors resize to sides of {sorted(sizes)} pixels; only one square is supported"
            )
        self.start, self.context, self.end = (
            self._token(tokenizer, name) for name in ("start_image_token", "context_image_token", "end_image_token")
        )
        self.video_mark, self.image_mark = self._token(tokenizer, "video_token"), self.context
        self.visual_pads = (self.video_mark, self.context)
        super().__init__(model, tokenizer, video, image)

    @staticmethod
    def _token(tokenizer: Any, name: str) -> str:
        token = getattr(tokenizer, name, None)
        if not token:
            raise InputError(
                f"the teacher's tokenizer names no {name}: take a checkpoint of the transformers format (-hf)"
            )
        return token

    @staticmethod
    def processor_defaults(config: Any) -> VisionSettings:
        vision = config.vision_config
        return VisionSettings(
            patch_size=vision.patch_size[0],
            temporal_patch_size=1,
            merge_size=1,
            image_mean=CLIP_MEAN,
            image_std=CLIP_STD,
            fixed_size=tuple(vision.image_size),
        )

    @classmethod
    def with_vision_tokens(cls, tokenizer: Any) -> Any:
        """See `VLMTeacher.with_vision_tokens`."""
        from transformers import PreTrainedTokenizerFast

        tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS.values())})
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            pad_token=tokenizer.pad_token,
            eos_token=tokenizer.eos_token,
            chat_template=CHAT_TEMPLATE,
            extra_special_tokens=TOKENS,
            clean_up_tokenization_spaces=False,
        )

    def resized(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        assert self.video.fixed_size is not None
        return self.video.fixed_size

    def _image_text(self, size: tuple[int, int]) -> str:
        tokens = int(self.patches_per_frame(size) * self.model.config.downsample_ratio**2)
        return self.start + self.context * tokens + self.end

    def video_text(self, clip: Clip) -> str:
        image = self._image_text(clip.size)
        return "\n".join(f"Frame{i + 1}: {image}" for i in range(clip.num_frames))

    def positions(self, ids: Tensor, clip: Clip) -> Tensor:
        return torch.arange(ids.shape[1])[None]

    @property
    def visual(self) -> Any:
        return self.model.model.vision_tower

    def encode_rows(self, rows: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """See `VLMTeacher.encode_rows`."""
        model, tower = self.model.model, self.visual
        embeddings = tower.embeddings
        conv = embeddings.patch_embeddings.projection  # stride equals kernel: a product of the patch rows
        x = F.linear(rows, conv.weight.flatten(1), conv.bias).unflatten(0, (-1, self.patches_per_frame(size)))
        x = torch.cat([embeddings.cls_token.expand(len(x), -1, -1), x], 1)
        if embeddings.position_embeddings is not None:
            x = x + embeddings.interpolate_pos_encoding(x, *size)
        for layer in tower.encoder.layer:
            attn, h = layer.attention, layer.layernorm_before(x)
            heads = (attn.q_norm(attn.q_proj(h)), attn.k_norm(attn.k_proj(h)), attn.v_proj(h))
            q, k, v = (t.unflatten(-1, (attn.num_heads, -1)) for t in heads)
            x = x + layer.lambda_1 * attn.projection_layer(attend(q, k, v, self.attention_backend))
            x = x + layer.lambda_2 * layer.mlp(layer.layernorm_after(x))
        x = tower.layernorm(x)
        if model.config.vision_feature_select_strategy == "default":
            x = x[:, 1:]
        grid = [side // self.video.patch_size for side in size]
        x = model.pixel_shuffle(x.unflatten(1, grid), scale_factor=model.config.downsample_ratio)
        return (model.multi_modal_projector(x.flatten(1, 2)).flatten(0, 1),)

    def stock_inputs(self, frames: Tensor, clip: Clip) -> dict[str, Tensor]:
        pixels = preprocess_frames(frames, clip.size[0], self.video.image_mean, self.video.image_std)
        return {"pixel_values": pixels}

    def stock_encoder(self, clip: Clip) -> Callable[[Tensor], list[Tensor]]:
        def encode(frames: Tensor) -> list[Tensor]:
            output = self.model.model.get_image_features(**self.stock_inputs(frames, clip), return_dict=True)
            return [output.pooler_output.flatten(0, 1)]

        return encode

    def image_inputs(self, pixels: Tensor) -> tuple[str, dict[str, Tensor]]:
        size = self.image.fixed_size
        assert size is not None
        values = preprocess_frames(pixels[None], size[0], self.image.image_mean, self.image.image_std)
        return self._image_text(size), {"pixel_values": values}
