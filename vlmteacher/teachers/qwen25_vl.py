"""Qwen2.5-VL as the Teacher, on transformers' own `Qwen2_5_VLForConditionalGeneration`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.ops.elementwise import rotate
from vlmteacher.teachers.preprocessing import CLIP_MEAN, CLIP_STD, VisionSettings
from vlmteacher.teachers.prompt import Clip
from vlmteacher.teachers.qwen_vl import VIDEO_PAD, VISION_END, VISION_START, QwenTokens, half_angles
from vlmteacher.teachers.visual_checkpoint import attend_segments
from vlmteacher.torch_modes import keepable


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Multiples of `factor` near height and width with height x width within the limits.

    Raises InputError when one side is more than 200 times the other. Source: transformers' `smart_resize` for Qwen2-VL.
    """
    if max(height, width) > 200 * min(height, width):
        raise InputError(f"frames of {height}x{width} are too narrow: one side may be at most 200 times the other")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))  # type: ignore[return-value]
    if new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return tuple(math.ceil(side * grow / factor) * factor for side in (height, width))  # type: ignore[return-value]
    return new_height, new_width


class Qwen25VLTeacher(QwenTokens):
    """A frozen Qwen2.5-VL.

    The text of a video has no timestamps: time is in the rotary positions, `second_per_grid_ts` seconds for each
    temporal patch, which is computed from the mean distance of the frames.
    """

    architecture = "Qwen2_5_VLForConditionalGeneration"

    @staticmethod
    def processor_defaults(config: Any) -> VisionSettings:
        vision = config.vision_config
        return VisionSettings(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            min_pixels=128 * 28 * 28,
            max_pixels=768 * 28 * 28,
            image_mean=CLIP_MEAN,
            image_std=CLIP_STD,
            max_video_tokens=128_000,
        )

    def resized(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        video = self.video
        limit = video.max_pixels
        if video.cap_pixels_per_frame:
            share = int(video.max_video_tokens * video.factor**2 * 0.9) * self.frames_per_patch // num_frames
            limit = max(min(limit, share), int(video.min_pixels * 1.05))
        return smart_resize(height, width, video.factor, video.min_pixels, limit)

    def video_text(self, clip: Clip) -> str:
        tokens = int(self.grid(clip).prod()) // self.video.merge_size**2
        return VISION_START + VIDEO_PAD * tokens + VISION_END

    def positions(self, ids: Tensor, clip: Clip) -> Tensor:
        between = (clip.indices[-1] - clip.indices[0]) / max(1, clip.num_frames - 1) or 1
        seconds = torch.tensor([self.frames_per_patch * between / clip.fps])
        return self.model.model.get_rope_index(
            ids, self._token_types(ids), second_per_grid_ts=seconds, **self.grids(clip)
        )[0]

    def encode_rows(self, rows: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """See `VLMTeacher.encode_rows`. Windows of equal size, of all frame pairs, pass a block in one call."""
        visual = self.visual
        order, windows, cos, sin = self._table(size)
        unit = self.video.merge_size**2
        x = visual.patch_embed(rows)
        x = x.view(-1, len(order), unit, x.shape[-1])[:, order].flatten(1, 2)  # sorted by window size
        for index, block in enumerate(visual.blocks):
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(2)
            segments = [x.shape[1]] if index in visual.fullatt_block_indexes else windows
            heads = attend_segments(rotate(q, cos, sin), rotate(k, cos, sin), v, segments, self.attention_backend)
            x = x + block.attn.proj(heads)
            x = x + block.mlp(block.norm2(x))
        merged = visual.merger(x.flatten(0, 1)).unflatten(0, (-1, len(order)))
        return (merged[:, order.argsort()].flatten(0, 1),)

    def stock_places(self, grid: Tensor) -> dict[str, Tensor]:
        from transformers.vision_utils import get_vision_window_index

        window, patch = self.visual.window_size, self.video.patch_size
        index, ends = get_vision_window_index(grid, self.video.merge_size, window, patch)
        return super().stock_places(grid) | {"window_index": index.to(self.device), "cu_window_seqlens": ends}

    @keepable()
    def _table(self, size: tuple[int, int]) -> tuple[Tensor, list[int], Tensor, Tensor]:
        """For one frame pair: its merged tokens in the order of windows, the patches of each window, rotary angles."""
        from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

        key = (size, self.device)
        if key not in self._tables:
            visual, merge = self.visual, self.video.merge_size
            grid = torch.tensor([[1, *(side // self.video.patch_size for side in size)]])
            index, ends = get_vision_window_index(grid, merge, visual.window_size, self.video.patch_size)
            lengths = ends.diff()
            pieces = list(index.split((lengths // merge**2).tolist()))
            by_size = lengths.argsort(stable=True).tolist()
            order = torch.cat([pieces[i] for i in by_size])
            positions = get_vision_position_ids(grid, merge).view(-1, merge**2, 2)[order].flatten(0, 1)
            angles = visual.rotary_pos_emb(torch.empty(0, device=self.device), positions.to(self.device))
            self._tables[key] = order.to(self.device), lengths[by_size].tolist(), *half_angles(angles)
        return self._tables[key]
