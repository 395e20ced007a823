"""SmolVLM2 as the Teacher, on transformers' own `SmolVLMForConditionalGeneration`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmteacher.checkpoints.pretrained import check_processor
from vlmteacher.errors import InputError
from vlmteacher.files import check_number
from vlmteacher.ops.patchify import PatchLayout, patchify
from vlmteacher.teachers.preprocessing import VisionSettings
from vlmteacher.teachers.prompt import Clip
from vlmteacher.teachers.visual_checkpoint import attend
from vlmteacher.teachers.vlm import VLMTeacher
from vlmteacher.torch_modes import keepable

IMAGE, VIDEO = "<image>", "<video>"
AROUND, GLOBAL = "<fake_token_around_image>", "<global-img>"
END = "<end_of_utterance>"
LARGEST_EDGE = 4096  # pixels, also that of transformers
LANCZOS = 3  # lobes of the filter
SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """A number from 0 to 999 in English words, as the package num2words writes it: "one hundred and twenty-four"."""
    if number < 20:
        return SMALL[number]
    if number < 100:
        tens, ones = TENS[number // 10 - 2], number % 10
        return f"{tens}-{SMALL[ones]}" if ones else tens
    rest = number % 100
    return f"{SMALL[number // 100]} hundred" + (f" and {in_words(rest)}" if rest else "")


def lanczos(old: int, new: int) -> np.ndarray:
    """The matrix (new, old), float64, that resizes an axis: Lanczos with three lobes and antialias, as in Pillow."""
    scale = old / new
    distance = (np.arange(old) + 0.5)[None] - ((np.arange(new) + 0.5) * scale)[:, None]
    x = distance / max(scale, 1.0)
    weights = np.where(np.abs(x) < LANCZOS, np.sinc(x) * np.sinc(x / LANCZOS), 0.0)
    return weights / weights.sum(1, keepdims=True)


@functools.lru_cache(maxsize=16)
@keepable()
def twice(old: int, middle: int, new: int, seen: int) -> Tensor:
    """The first `seen` rows of the matrix (new, old), float32, that resizes an axis to `middle` and then to `new`."""
    return torch.from_numpy((lanczos(middle, new) @ lanczos(old, middle))[:seen]).float()


@dataclass(frozen=True)
class FrameSettings(VisionSettings):
    """The preprocessing of frames and images. Both are resized twice, by a Lanczos filter: first so that the longest
    edge has `longest_edge` pixels and the shape is kept, then to the square `fixed_size`."""

    longest_edge: int = 4 * 364

    def updated(self, config: Mapping[str, Any], label: str) -> FrameSettings:
        """See `VisionSettings.updated`. As in transformers, `size` comes before the size in `video_sampling`."""
        check_processor(config, label)
        sampling = config.get("video_sampling")
        size = config.get("size") or (sampling.get("video_size") if isinstance(sampling, dict) else None)
        edges = []
        for name, value in (("size", size), ("max_image_size", config.get("max_image_size"))):
            edge = value.get("longest_edge") if isinstance(value, dict) else value
            if edge is not None:
                check_number(edge, f"{label}: {name}: longest_edge", whole=True, least=1)
            elif value is not None:
                raise InputError(f"{label}: {name} must have a longest_edge, in pixels, not {value!r:.40}")
            edges.append(edge)
        first, tile = edges
        if tile and tile > LARGEST_EDGE:
            raise InputError(f"{label}: max_image_size {tile} is too large: at most {LARGEST_EDGE} pixels")
        settings = super().updated({key: value for key, value in config.items() if key != "size"}, label)
        assert isinstance(settings, FrameSettings)
        return replace(
            settings,
            longest_edge=min(first or self.longest_edge, LARGEST_EDGE),
            fixed_size=(tile, tile) if tile else self.fixed_size,
        )

    @property
    def side(self) -> int:
        """Pixels, of the square that the model sees."""
        assert self.fixed_size is not None
        return self.fixed_size[0]

    def first_size(self, height: int, width: int) -> tuple[int, int]:
        """The size (H, W) of the first resize; the shorter side is even."""
        edge, aspect = self.longest_edge, width / height
        short = int(edge / aspect) if width >= height else int(edge * aspect)  # transformers' roundings
        short = max(short + short % 2, 1)
        return (short, edge) if width >= height else (edge, short)

    def resized(self, frames: Tensor, sides: tuple[int, int]) -> Tensor:
        """Resize frames (K, 3, H, W) and cut off what is beyond `sides`: (K, 3, *sides), float32, differentiable."""
        height, width = frames.shape[-2:]
        rows, columns = (
            twice(old, middle, self.side, seen).to(frames.device)
            for old, middle, seen in zip((height, width), self.first_size(height, width), sides, strict=True)
        )
        return rows @ (frames.float() @ columns.T)

    def pixels(self, frames: Tensor) -> Tensor:
        """The model's pixels (K, 3, S, S), float32, of frames (K, 3, H, W), RGB in [0, 1]."""
        whole = patchify(self.resized(frames, (self.side, self.side)), self.side, 1, 1, self.image_mean, self.image_std)
        return whole.view(-1, 3, self.side, self.side)


class SmolVLMTeacher(VLMTeacher):
    """A frozen SmolVLM2. Every frame is an image of one fixed square, behind its time in minutes and seconds.

    Pixels at the right and lower edge that fill no patch are not seen. An image that queries are written from is one
    square too; the stock processor may cut it into several.
    """

    architecture = "SmolVLMForConditionalGeneration"
    token_ids: ClassVar = {"image_token_id": IMAGE}
    takes_goal_image = True
    frames_per_patch = 1
    video_mark, image_mark = VIDEO, IMAGE
    visual_pads = (IMAGE,)
    before_answer = " "
    video: FrameSettings
    image: FrameSettings

    def __init__(self, model: Any, tokenizer: Any, video: VisionSettings, image: VisionSettings | None = None) -> None:
        if VIDEO not in str(getattr(tokenizer, "chat_template", "")):
            from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE  # as the stock processor does for a video
        self._tables: dict[Any, Tensor] = {}
        vision, merge = model.config.vision_config, model.config.scale_factor
        for settings in (video, image or video):
            if not isinstance(settings, FrameSettings) or settings.side // vision.patch_size % merge:
                raise InputError(
                    f"teacher: images of {settings.fixed_size} pixels do not split into patches of {vision.patch_size},"
                    f" of which {merge}x{merge} make a token: are its processor files those of the model?"
                )
        super().__init__(model, tokenizer, video, image)
        self._table(self.resized(1, 1, 1))  # here, because plans count what `encode` computes

    @staticmethod
    def processor_defaults(config: Any) -> VisionSettings:
        vision = config.vision_config
        return FrameSettings(
            patch_size=vision.patch_size,
            temporal_patch_size=1,
            merge_size=1,
            fixed_size=(vision.image_size, vision.image_size),
        )

    @classmethod
    def with_vision_tokens(cls, tokenizer: Any) -> Any:
        """See `VLMTeacher.with_vision_tokens`."""
        tokenizer.add_special_tokens({"additional_special_tokens": [AROUND, GLOBAL, IMAGE, END]})
        tokenizer.chat_template = None
        return tokenizer

    def resized(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        if max(height, width) > 200 * min(height, width):
            raise InputError(f"frames of {height}x{width} are too narrow: one side may be at most 200 times the other")
        if num_frames >= 1000:
            raise InputError(f"{num_frames} frames: SmolVLM takes at most 999")
        side = self.video.side // self.video.patch_size * self.video.patch_size
        return side, side

    def patch_layout(self, num_frames: int, height: int, width: int) -> PatchLayout | None:
        same = self.video.longest_edge == self.video.side == height == width
        return super().patch_layout(num_frames, height, width) if same else None

    def _image_text(self, size: tuple[int, int]) -> str:
        tokens = self.patches_per_frame(size) // self.model.config.scale_factor**2
        return AROUND + GLOBAL + IMAGE * tokens + AROUND

    def video_text(self, clip: Clip) -> str:
        times = [int(first) for first, _ in clip.seconds(1)]
        image = self._image_text(clip.size)
        frames = "".join(f"\nFrame from {time // 60:02}:{time % 60:02}:{image}" for time in times)
        count, length = in_words(clip.num_frames), timedelta(seconds=times[-1])
        return f"You are provided the following series of {count} frames from a {length} [H:MM:SS] video.\n{frames}\n\n"

    def positions(self, ids: Tensor, clip: Clip) -> Tensor:
        return torch.arange(ids.shape[1])[None]

    @property
    def visual(self) -> Any:
        return self.model.model.vision_model

    @property
    def language(self) -> Any:
        return self.model.model.text_model

    def encode(self, frames: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """See `VLMTeacher.encode`."""
        video = self.video
        resized = video.resized(frames, size)
        rows = patchify(
            resized, video.patch_size, 1, 1, video.image_mean, video.image_std, size=size, dtype=self.visual.dtype
        )
        return self.encode_rows(rows, size)

    def encode_rows(self, rows: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """See `VLMTeacher.encode_rows`."""
        tower = self.visual
        table = self._table(size)
        weight = tower.embeddings.patch_embedding.weight  # stride equals kernel: a product of the patch rows
        x = F.linear(rows, weight.flatten(1)).unflatten(0, (-1, table.shape[1])) + table
        for layer in tower.encoder.layers:
            attn, h = layer.self_attn, layer.layer_norm1(x)
            q, k, v = (p(h).unflatten(-1, (attn.num_heads, -1)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
            x = x + attn.out_proj(attend(q, k, v, self.attention_backend))
            x = x + layer.mlp(layer.layer_norm2(x))
        return (self.model.model.connector(tower.post_layernorm(x)).flatten(0, 1),)

    @keepable()
    def _table(self, size: tuple[int, int]) -> Tensor:
        """The embedding (1, P, C) of an image of zeros: the bias and the embeddings of P places."""
        embeddings = self.visual.embeddings
        weight = embeddings.position_embedding.weight
        key = (size, weight.device, weight.dtype)
        if key not in self._tables:
            nothing = torch.zeros(1, 3, *size, dtype=weight.dtype, device=weight.device)
            self._tables[key] = embeddings(nothing, self._mask(size)).detach()
        return self._tables[key]

    def _mask(self, size: tuple[int, int]) -> Tensor:
        """The mask (1, rows, columns) of the patches of an image, all of which are seen."""
        grid = [side // self.video.patch_size for side in size]
        return torch.ones(1, *grid, dtype=torch.bool, device=self.device)

    def stock_inputs(self, frames: Tensor, clip: Clip) -> dict[str, Tensor]:
        return {"pixel_values": self.video.pixels(frames)[None]}

    def stock_encoder(self, clip: Clip) -> Callable[[Tensor], list[Tensor]]:
        def encode(frames: Tensor) -> list[Tensor]:
            pixels = self.video.pixels(frames).to(self.visual.dtype)
            x = self.visual.embeddings(pixels, self._mask(clip.size).expand(len(pixels), -1, -1))
            x = self.visual.post_layernorm(self.visual.encoder(x).last_hidden_state)
            return [self.model.model.connector(x).flatten(0, 1)]

        return encode

    def image_inputs(self, pixels: Tensor) -> tuple[str, dict[str, Tensor]]:
        return self._image_text(self.resized(1, 1, 1)), {"pixel_values": self.image.pixels(pixels[None])[None]}
