"""Qwen3-VL as the Teacher, on transformers' own `Qwen3VLForConditionalGeneration`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmteacher.ops.elementwise import gelu, rotate
from vlmteacher.teachers.preprocessing import VisionSettings, preprocess_image, resized_rows, video_size
from vlmteacher.teachers.prompt import Clip
from vlmteacher.teachers.visual_checkpoint import LinearPatchEmbed, attend
from vlmteacher.teachers.vlm import VLMTeacher
from vlmteacher.torch_modes import keepable

IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
TEXT_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN = 0, 1, 2  # transformers' mm_token_type_ids


def video_placeholder(
    frame_indices: Sequence[int], fps: float, tokens_per_patch: int, temporal_patch_size: int = 2
) -> str:
    """The text of a video in the prompt: for each temporal patch (frame pair) its time in seconds and visual tokens.

    The time is the mean of the first and last frame's; the last frame is repeated to fill a patch.
    tokens_per_patch: merged visual tokens of one temporal patch. Source: transformers, processing_qwen3_vl.py.
    """
    tokens = VISION_START + VIDEO_PAD * tokens_per_patch + VISION_END
    times = Clip(tuple(frame_indices), fps, (0, 0)).seconds(temporal_patch_size)
    return "".join(f"<{(first + last) / 2:.1f} seconds>{tokens}" for first, last in times)


class QwenTokens(VLMTeacher):
    """The base of the Qwen-VL families: their tokens, patches and images."""

    token_ids: ClassVar = {
        "image_token_id": IMAGE_PAD,
        "video_token_id": VIDEO_PAD,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    takes_goal_image = True
    video_mark = VISION_START + VIDEO_PAD + VISION_END
    image_mark = VISION_START + IMAGE_PAD + VISION_END
    visual_pads = (IMAGE_PAD, VIDEO_PAD)

    def __init__(self, model: Any, tokenizer: Any, video: VisionSettings, image: VisionSettings | None = None) -> None:
        super().__init__(model, tokenizer, video, image)
        self.frames_per_patch = video.temporal_patch_size
        if not isinstance(self.visual.patch_embed, LinearPatchEmbed):
            self.visual.patch_embed = LinearPatchEmbed(self.visual.patch_embed)
        self._tables: dict[Any, Any] = {}

    @property
    def visual(self) -> Any:
        return self.model.model.visual

    def grid(self, clip: Clip) -> Tensor:
        """`video_grid_thw` (1, 3): temporal patches, and patches of a frame in height and width."""
        patches = [side // self.video.patch_size for side in clip.size]
        return torch.tensor([[-(-clip.num_frames // self.frames_per_patch), *patches]])

    def grids(self, clip: Clip) -> dict[str, Tensor]:
        """The grids of a clip and of a picture of the goal, by the names of the model's inputs."""
        goal = {"image_grid_thw": torch.tensor([clip.goal.grid])} if clip.goal else {}
        return {"video_grid_thw": self.grid(clip), **goal}

    def token_inputs(self, ids: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": self._token_types(ids)}

    def image_inputs(self, pixels: Tensor) -> tuple[str, dict[str, Tensor]]:
        values, grid = preprocess_image(pixels, self.image)
        placeholder = VISION_START + IMAGE_PAD * (int(grid.prod()) // self.image.merge_size**2) + VISION_END
        return placeholder, {"pixel_values": values, "image_grid_thw": grid}

    def stock_inputs(self, frames: Tensor, clip: Clip) -> dict[str, Tensor]:
        return {
            "pixel_values_videos": resized_rows(frames, clip.size, self.video),
            "video_grid_thw": self.grid(clip),
        }

    def stock_encoder(self, clip: Clip) -> Callable[[Tensor], list[Tensor]]:
        grid = self.grid(clip)  # stays on the CPU: transformers makes a Python list of the segments' lengths
        places = self.stock_places(grid)

        def encode(frames: Tensor) -> list[Tensor]:
            inputs = self.stock_inputs(frames, clip)
            rows = inputs["pixel_values_videos"].to(self.model.dtype)
            output = self.visual(rows, grid_thw=grid, return_dict=True, **places)
            return [output.pooler_output, *getattr(output, "deepstack_features", ())]

        return encode

    def stock_places(self, grid: Tensor) -> dict[str, Tensor]:
        """Inputs of the vision tower that follow from `video_grid_thw` (1, 3), on the tower's device."""
        from transformers.vision_utils import get_vision_position_ids

        return {"position_ids": get_vision_position_ids(grid, self.video.merge_size).to(self.device)}

    def _token_types(self, input_ids: Tensor) -> Tensor:
        types = torch.full_like(input_ids, TEXT_TOKEN)
        types[input_ids == self.model.config.image_token_id] = IMAGE_TOKEN
        types[input_ids == self.model.config.video_token_id] = VIDEO_TOKEN
        return types


class QwenVLTeacher(QwenTokens):
    """A frozen Qwen3-VL.

    The model is frozen, set to evaluation mode and given `LinearPatchEmbed`; the arguments are those of `VLMTeacher`.
    """

    architecture = "Qwen3VLForConditionalGeneration"

    @staticmethod
    def processor_defaults(config: Any) -> VisionSettings:
        vision = config.vision_config
        return VisionSettings(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)

    def resized(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        return video_size(num_frames, height, width, self.video)

    def video_text(self, clip: Clip) -> str:
        tokens = self.patches_per_frame(clip.size) // self.video.merge_size**2
        return video_placeholder(clip.indices, clip.fps, tokens, self.frames_per_patch)

    def positions(self, ids: Tensor, clip: Clip) -> Tensor:
        return self.model.model.get_rope_index(ids, self._token_types(ids), **self.grids(clip))[0]

    def encode_rows(self, rows: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """See `VLMTeacher.encode_rows`. All frame pairs go through every block as one batch."""
        from transformers.activations import GELUTanh

        visual = self.visual
        deep = getattr(visual, "deepstack_visual_indexes", ())  # Qwen3.5 has no DeepStack
        places, cos, sin = self._table(size)
        x = visual.patch_embed(rows).unflatten(0, (-1, len(places)))
        x = x + places.to(x.dtype)
        deepstack = []
        act = visual.blocks[0].mlp.act_fn
        activation = gelu if type(act) is GELUTanh else act
        for index, block in enumerate(visual.blocks):
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(2)
            x = x + block.attn.proj(attend(rotate(q, cos, sin), rotate(k, cos, sin), v, self.attention_backend))
            x = x + block.mlp.linear_fc2(activation(block.mlp.linear_fc1(block.norm2(x))))
            if index in deep:
                merger = visual.deepstack_merger_list[deep.index(index)]
                deepstack.append(merger(x.flatten(0, 1)))
        return visual.merger(x.flatten(0, 1)), *deepstack

    def stock_places(self, grid: Tensor) -> dict[str, Tensor]:
        places, weights = self._interpolation(grid)
        return super().stock_places(grid) | {
            "interp_indices": places.to(self.device),
            "interp_weights": weights.to(self.device),
        }

    def _interpolation(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """The interpolation of the position embeddings for P patches: (P, 4) indices and weights."""
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        visual = self.visual
        return get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=self.video.merge_size,
        )

    @keepable()
    def _table(self, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Position embeddings (P, C) and rotary (cos, sin), (P, 1, d / 2) each, of one frame pair's P patches."""
        from transformers.vision_utils import get_vision_position_ids

        visual = self.visual
        key = (size, self.device, visual.pos_embed.weight.dtype)
        if key not in self._tables:
            grid = torch.tensor([[1, *(side // self.video.patch_size for side in size)]])
            places, weights = self._interpolation(grid)
            embeds = visual.pos_embed(places.to(self.device)) * weights.to(self.device)[:, :, None]
            positions = get_vision_position_ids(grid, self.video.merge_size).to(self.device)
            self._tables[key] = embeds.sum(1), *half_angles(visual.rotary_pos_emb(embeds, positions))
        return self._tables[key]


def half_angles(angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The first halves (P, 1, d / 2) of transformers' rotary (cos, sin), (P, d) each, which repeat them."""
    cos, sin = (x[:, None, : x.shape[-1] // 2] for x in angles)
    return cos, sin
