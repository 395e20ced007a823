"""Differentiable preprocessing, equal to transformers' `Qwen3VLVideoProcessor` (and InternVL's) on float input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmteacher.checkpoints.hub import find_file
from vlmteacher.checkpoints.pretrained import check_processor, json_object
from vlmteacher.errors import InputError
from vlmteacher.ops.patchify import PatchLayout, patchify

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionSettings:
    """The preprocessing of videos, or images, by a checkpoint's processor.

    patch_size is in pixels, merge_size in patches, temporal_patch_size in frames. min_pixels, max_pixels: limits on
    frames x height x width (of an image: height x width). cap_pixels_per_frame: limit each frame to
    `max_video_tokens` merged patches too. fixed_size: (H, W), instead of the limits. image_mean, image_std: for RGB in
    [0, 1]. The defaults are those of the Qwen3-VL checkpoints, which differ from the defaults of transformers' class.
    """

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 4096
    max_pixels: int = 25_165_824
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 768
    fixed_size: tuple[int, int] | None = None

    @property
    def factor(self) -> int:
        """Pixels; the height and width of resized frames are multiples of it."""
        return self.patch_size * self.merge_size

    def layout(self, dtype: torch.dtype) -> PatchLayout:
        """The layout of patch rows of `dtype` for frames that are not resized."""
        sizes = self.patch_size, self.temporal_patch_size, self.merge_size
        return PatchLayout(*sizes, tuple(self.image_mean), tuple(self.image_std), dtype)

    def updated(self, config: Mapping[str, Any], label: str) -> VisionSettings:
        """Return these settings with the values of a processor's config, except the patch sizes.

        label: the config's name. Raises InputError for a value of another type or range, and for a processor that does
        not rescale and normalise.
        """
        check_processor(config, label)
        if not isinstance(config.get("size"), dict | None):
            raise InputError(f"{label}: size must be an object of sides, not {config['size']!r:.40}")
        scale = config.get("rescale_factor")
        if False in (config.get("do_rescale"), config.get("do_normalize")) or scale not in (None, 1 / 255):
            raise InputError(
                f"{label}: a processor that does not bring pixels to [0, 1] and normalise them is not supported"
            )
        size = config.get("size") or {}
        settings = replace(
            self,
            min_pixels=size.get("shortest_edge") or config.get("min_pixels") or self.min_pixels,
            max_pixels=size.get("longest_edge") or config.get("max_pixels") or self.max_pixels,
            image_mean=tuple(config.get("image_mean") or self.image_mean),
            image_std=tuple(config.get("image_std") or self.image_std),
            cap_pixels_per_frame=bool(config.get("cap_pixels_per_frame")),
            max_video_tokens=config.get("max_video_tokens") or self.max_video_tokens,
            fixed_size=(size["height"], size["width"]) if "height" in size and "width" in size else self.fixed_size,
        )
        if settings.min_pixels > settings.max_pixels:
            raise InputError(f"{label}: at least {settings.min_pixels} and at most {settings.max_pixels} pixels")
        return settings


def processor_settings(
    path_or_id: str, base: VisionSettings, local_files_only: bool = False
) -> tuple[VisionSettings, VisionSettings]:
    """Read the settings of a checkpoint's processors for (videos, images); missing entries come from `base`.

    Without a video processor's file videos get the image processor's settings, as in transformers; without an image
    processor's file images get those of videos.
    """

    def read(name: str, entry: str) -> dict[str, Any]:
        """The config in a processor's own file, or in the file that newer checkpoints share between processors."""
        if file := find_file(path_or_id, name, local_files_only):
            return json_object(file)
        file = find_file(path_or_id, "processor_config.json", local_files_only)
        config = json_object(file).get(entry) if file else None
        if not isinstance(config, dict | None):
            raise InputError(f"{file}: {entry} must be an object of settings, not {config!r:.40}")
        return config or {}

    images = read("preprocessor_config.json", "image_processor")
    video = read("video_preprocessor_config.json", "video_processor")
    return settings_by_configs(video, images, base, f"teacher {path_or_id}: the")


def settings_by_configs(
    video: Mapping[str, Any], images: Mapping[str, Any], base: VisionSettings, where: str
) -> tuple[VisionSettings, VisionSettings]:
    """The settings for (videos, images) by the configs of the two processors (see `processor_settings`)."""
    settings = base.updated(video or images, f"{where} {'video' if video else 'image'} processor's config")
    return settings, settings.updated(images, f"{where} image processor's config")


def smart_resize(
    num_frames: int, height: int, width: int, temporal_factor: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size (H, W) near height and width of multiples of `factor`, with frames x height x width within the limits.

    Raises InputError when one side is more than 200 times the other. Source: transformers' `smart_resize` for Qwen3-VL.
    """
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > 200 * min(height, width):
        raise InputError(f"frames of {height}x{width} are too narrow: one side may be at most 200 times the other")
    frames = round(num_frames / temporal_factor) * temporal_factor
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if frames * new_height * new_width > max_pixels:
        shrink = math.sqrt(num_frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif frames * new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        new_height, new_width = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return new_height, new_width


def _grid(num_frames: int, size: tuple[int, int], settings: VisionSettings) -> Tensor:
    pairs = -(-num_frames // settings.temporal_patch_size)
    return torch.tensor([[pairs, size[0] // settings.patch_size, size[1] // settings.patch_size]])


def video_size(num_frames: int, height: int, width: int, settings: VisionSettings) -> tuple[int, int]:
    """The size (H, W) that a video of `num_frames` frames is resized to."""
    num_frames = max(num_frames, settings.temporal_patch_size)
    max_pixels = settings.max_pixels
    if settings.cap_pixels_per_frame:
        per_frame = min(settings.max_video_tokens * settings.factor**2, settings.max_pixels // num_frames)
        max_pixels = max(per_frame, int(settings.min_pixels * 1.05)) * num_frames
    limits = settings.factor, settings.min_pixels, max_pixels
    return smart_resize(num_frames, height, width, settings.temporal_patch_size, *limits)


def resized_rows(
    frames: Tensor, size: tuple[int, int], settings: VisionSettings, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Resize frames (K, 3, H, W), RGB in [0, 1], to `size`, normalise them and cut them into patch rows of `dtype`.

    One differentiable operator that saves nothing; 16-bit frames are read without a copy in float32.
    """
    frames = frames if frames.dtype in (torch.float16, torch.bfloat16) else frames.float()
    sizes = settings.patch_size, settings.temporal_patch_size, settings.merge_size
    return patchify(frames, *sizes, settings.image_mean, settings.image_std, size, dtype)


def preprocess_video(
    frames: Tensor, settings: VisionSettings, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Resize a video to the limits, normalise it, cut it into patches; the last frame is repeated to fill a patch.

    frames: (K, 3, H, W), RGB in [0, 1]. Returns `pixel_values_videos` (patches, 3 * temporal * patch * patch) of
    `dtype`, differentiable to the frames, and `video_grid_thw` (1, 3) on the CPU.
    Equal to `Qwen3VLVideoProcessor` given the frames as float 0..255, which refuses K = 1: here it is two equal frames.
    """
    height, width = frames.shape[-2:]
    size = video_size(len(frames), height, width, settings)
    return resized_rows(frames, size, settings, dtype), _grid(len(frames), size, settings)


def preprocess_image(
    image: Tensor, settings: VisionSettings, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Preprocess one image (3, H, W), RGB in [0, 1], in the same way: `pixel_values` and `image_grid_thw` (1, 3)."""
    height, width = image.shape[-2:]
    size = smart_resize(1, height, width, 1, settings.factor, settings.min_pixels, settings.max_pixels)
    return resized_rows(image[None], size, settings, dtype), _grid(1, size, settings)


def preprocess_frames(
    frames: Tensor, side: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Resize frames (K, 3, H, W), RGB in [0, 1], to side x side and normalise them: (K, 3, side, side) of `dtype`.

    Equal to `InternVLVideoProcessor` given the frames as float 0..255. Computed as patch rows, one patch per frame.
    """
    whole = VisionSettings(side, 1, 1, image_mean=tuple(mean), image_std=tuple(std))
    return resized_rows(frames, (side, side), whole, dtype).view(-1, 3, side, side)
