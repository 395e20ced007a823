"""GLM-4.1V, 4.5V and 4.6V as Teachers, on transformers' own `Glm4vForConditionalGeneration`, and that with experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmteacher.checkpoints.hub import find_file
from vlmteacher.checkpoints.pretrained import json_object
from vlmteacher.errors import InputError
from vlmteacher.ops.attention import attention
from vlmteacher.ops.elementwise import rotate
from vlmteacher.ops.rms_norm import rms_norm
from vlmteacher.ops.swiglu import swiglu
from vlmteacher.teachers.experts import is_sparse, sparse_mlp, sparse_values
from vlmteacher.teachers.preprocessing import CLIP_MEAN, CLIP_STD, VisionSettings, preprocess_video, video_size
from vlmteacher.teachers.prompt import Clip, Layout
from vlmteacher.teachers.qwen_vl import IMAGE_TOKEN, TEXT_TOKEN, VIDEO_TOKEN, QwenTokens, half_angles
from vlmteacher.teachers.shared_prefix import Decoder, Keep, partly_rotated, repeated
from vlmteacher.teachers.visual_checkpoint import attend
from vlmteacher.torch_modes import keepable

IMAGE, VIDEO = "<|image|>", "<|video|>"
START, END = "<|begin_of_image|>", "<|end_of_image|>"
VIDEO_START, VIDEO_END = "<|begin_of_video|>", "<|end_of_video|>"
NO_THOUGHT, ANSWER_START, ANSWER_END = "<think></think>", "<answer>", "</answer>"
BOX = "<|begin_of_box|>"
TENTHS = "Glm46VProcessor"  # the processor whose timestamps have tenths of seconds
CHAT_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>\n{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% elif part.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
    "{% else %}<|begin_of_video|><|video|><|end_of_video|>{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def _neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (N, H, d), of whose first channels the angles (N, 1, r / 2) rotate neighbours.

    The rotated channels come in another order, even ones first: attention sums over them.
    """
    turned = 2 * cos.shape[-1]
    halves = x[..., :turned].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return torch.cat([rotate(halves, cos, sin), x[..., turned:]], -1)


def _normed(layer: Any, name: str, x: Tensor) -> Tensor:
    """The norm of this name, or x where the layer has none: layers with experts have none behind attention and MLP."""
    norm = getattr(layer, name, None)
    return x if norm is None else rms_norm(x, norm.weight, norm.variance_epsilon)


def _mlp(x: Tensor, layer: Any) -> Tensor:
    """The residual and the MLP, x (N, C) -> (N, C)."""
    mlp = layer.mlp
    if is_sparse(mlp):
        return sparse_mlp(x, layer)
    h = _normed(layer, "post_attention_layernorm", x)
    together = hasattr(mlp, "gate_up_proj")
    gate, up = mlp.gate_up_proj(h).chunk(2, -1) if together else (mlp.gate_proj(h), mlp.up_proj(h))
    return x + _normed(layer, "post_mlp_layernorm", mlp.down_proj(swiglu(gate, up)))


class GlmDecoder(Decoder):
    """GLM-4's layers: some channels of a head are rotated, and dense layers have norms behind attention and MLP too."""

    parts: ClassVar = ("post_self_attn_layernorm", "post_mlp_layernorm", "self_attn.q_proj.bias", "mlp.gate_up_proj")
    rotated: ClassVar = staticmethod(_neighbours)

    def check(self, language: Any, name: str) -> None:
        super().check(language, name)
        if (act := language.config.hidden_act) != "silu":
            raise InputError(f"teacher {name!r}: its language model's hidden_act is {act!r}; only silu is supported")

    def kept(self, layer: Any) -> dict[Keep, int]:
        attn, mlp, hidden = layer.self_attn, layer.mlp, len(layer.input_layernorm.weight)
        q, k = (proj.out_features for proj in (attn.q_proj, attn.k_proj))
        behind = hidden if hasattr(layer, "post_mlp_layernorm") else 0
        values = 2 * hidden + behind + 2 * q + 2 * k  # x, x + attention, its norm's input; q, output; k, v
        if is_sparse(mlp):
            shared = mlp.shared_experts.intermediate_size
            more = sparse_values(mlp) + hidden + 3 * shared  # gate, up and their product
        else:
            more = 2 * mlp.down_proj.in_features + behind
        return {Keep.ALL: values + more, Keep.ATTENTION: values, Keep.INPUT: hidden}

    def run(self, x: Tensor, layer: Any, layout: Layout, last: bool, keep: Keep, backend: str | None) -> Tensor:
        attn, h = layer.self_attn, _normed(layer, "input_layernorm", x)
        sees, cos, sin = layout.sees, layout.cos, layout.sin
        k, v = (proj(h).unflatten(-1, (-1, attn.head_dim)) for proj in (attn.k_proj, attn.v_proj))
        k = self.rotated(k, cos, sin)
        if last:  # the other outputs are not used
            sees = layout.answers_see
            x, h, cos, sin = (t[layout.answers] for t in (x, h, cos, sin))
        q = self.rotated(attn.q_proj(h).unflatten(-1, (-1, attn.head_dim)), cos, sin)
        heads = attn.o_proj(attention(q[None], k[None], v[None], sees, backend)[0].flatten(1))
        x = x + _normed(layer, "post_self_attn_layernorm", heads)
        return _mlp(x, layer) if keep == Keep.ALL else repeated(_mlp, x, layer)


class GlmMoeDecoder(GlmDecoder):
    """The same with experts in all layers but the first, and without the norms behind."""

    parts: ClassVar = ("input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "mlp")
    rotated: ClassVar = staticmethod(partly_rotated)


class GlmTeacher(QwenTokens):
    """A frozen GLM-4.1V. A video is a list of images, one of each frame pair, with the time of its first frame behind.

    Its answers are read where such a model writes them: behind a thought of nothing, and Yes or No in the box of a
    final answer.
    """

    architecture = "Glm4vForConditionalGeneration"
    decoder = GlmDecoder()
    token_ids: ClassVar = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_start_token_id": START,
        "image_end_token_id": END,
        "video_start_token_id": VIDEO_START,
        "video_end_token_id": VIDEO_END,
    }
    video_mark, image_mark = VIDEO, IMAGE
    takes_goal_image = False  # transformers' own class takes images or a video, which have one token, and never both
    visual_pads = (VIDEO, IMAGE)
    has_tenths = False

    def __init__(self, model: Any, tokenizer: Any, video: VisionSettings, image: VisionSettings | None = None) -> None:
        known = tokenizer.get_vocab()
        if "enable_thinking" not in str(tokenizer.chat_template) and ANSWER_START in known:
            self.opening = NO_THOUGHT + ANSWER_START
        self.before_answer = BOX if BOX in known else ""
        self.closing_ids = [known[ANSWER_END]] if ANSWER_END in known else []
        super().__init__(model, tokenizer, video, image)

    @classmethod
    def from_parts(cls, path_or_id: str, model: Any, tokenizer: Any, local_files_only: bool) -> GlmTeacher:
        """See `VLMTeacher.from_parts`."""
        teacher = super().from_parts(path_or_id, model, tokenizer, local_files_only)
        assert isinstance(teacher, GlmTeacher)
        files = (
            find_file(path_or_id, name, local_files_only)
            for name in ("processor_config.json", "preprocessor_config.json")
        )
        classes = [json_object(file).get("processor_class") for file in files if file]
        teacher.has_tenths = TENTHS in (*classes, getattr(tokenizer, "_processor_class", None))
        return teacher

    @classmethod
    def adopt(cls, model: Any, processor: Any, name: str) -> GlmTeacher:
        """See `VLMTeacher.adopt`."""
        teacher = super().adopt(model, processor, name)
        assert isinstance(teacher, GlmTeacher)
        teacher.has_tenths = type(processor).__name__ == TENTHS
        return teacher

    @staticmethod
    def processor_defaults(config: Any) -> VisionSettings:
        vision = config.vision_config
        return VisionSettings(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            min_pixels=112 * 112,
            max_pixels=28 * 28 * 2 * 30_000,
            image_mean=CLIP_MEAN,
            image_std=CLIP_STD,
        )

    @classmethod
    def with_vision_tokens(cls, tokenizer: Any) -> Any:
        """See `VLMTeacher.with_vision_tokens`."""
        tokenizer.add_special_tokens({"additional_special_tokens": [*cls.token_ids.values(), ANSWER_START, BOX]})
        tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer

    @property
    def end_ids(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        return [*dict.fromkeys([*super().end_ids, *ends, *self.closing_ids])]

    def resized(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        return video_size(num_frames, height, width, self.video)

    def grid(self, clip: Clip) -> Tensor:
        """`video_grid_thw` (T, 3), of one image for each frame pair: 1, and its patches in height and width."""
        pairs = -(-clip.num_frames // self.frames_per_patch)
        return torch.tensor([[1, *(side // self.video.patch_size for side in clip.size)]]).expand(pairs, -1)

    def video_text(self, clip: Clip) -> str:
        image = START + IMAGE * (self.patches_per_frame(clip.size) // self.video.merge_size**2) + END
        times = [first for first, _ in clip.seconds(self.frames_per_patch)]
        return "".join(image + (f"{time:.1f} seconds" if self.has_tenths else str(int(time))) for time in times)

    def positions(self, ids: Tensor, clip: Clip) -> Tensor:
        return self.model.model.get_rope_index(ids, self._token_types(ids), video_grid_thw=self.grid(clip))[0]

    def _token_types(self, input_ids: Tensor) -> Tensor:
        """Videos are written with the token of images, between marks of their own."""
        start, end = self.tokenizer.convert_tokens_to_ids([VIDEO_START, VIDEO_END])
        in_video = (input_ids == start).cumsum(-1) > (input_ids == end).cumsum(-1)
        visual = torch.where(in_video, VIDEO_TOKEN, IMAGE_TOKEN)
        return torch.where(input_ids == self.model.config.image_token_id, visual, TEXT_TOKEN)

    def image_inputs(self, pixels: Tensor) -> tuple[str, dict[str, Tensor]]:
        values, grid = preprocess_video(pixels[None], self.image)  # the limits count an image twice
        return IMAGE * (int(grid.prod()) // self.image.merge_size**2), {"pixel_values": values, "image_grid_thw": grid}

    def encode_rows(self, rows: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """See `VLMTeacher.encode_rows`. All frame pairs go through every block as one batch."""
        visual, merge = self.visual, self.video.merge_size
        places, cos, sin = self._table(size)
        x = visual.post_conv_layernorm(visual.patch_embed(rows)).unflatten(0, (-1, len(places))) + places
        for block in visual.blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(2)
            x = x + block.attn.proj(attend(rotate(q, cos, sin), rotate(k, cos, sin), v, self.attention_backend))
            x = x + block.mlp(block.norm2(x))
        x = visual.post_layernorm(x).reshape(-1, merge, merge, x.shape[-1]).permute(0, 3, 1, 2).flatten(1)
        return (visual.merger(F.linear(x, visual.downsample.weight.flatten(1), visual.downsample.bias)),)

    def stock_encoder(self, clip: Clip) -> Callable[[Tensor], list[Tensor]]:
        from transformers.vision_utils import get_vision_position_ids

        visual, merge, grid = self.visual, self.video.merge_size, self.grid(clip)
        lengths = grid.prod(1)
        ends = F.pad(lengths.cumsum(0), (1, 0))  # stays on the CPU: transformers makes a Python list of it
        places = get_vision_position_ids(grid, merge).to(self.device)

        def encode(frames: Tensor) -> list[Tensor]:  # the tower's own forward reads all of these on one device
            rows = self.stock_inputs(frames, clip)["pixel_values_videos"].to(self.model.dtype)
            x = visual.post_conv_layernorm(visual.patch_embed(rows))
            angles = visual.rotary_pos_emb(x, places)
            x = visual.embeddings(x, lengths.tolist(), grid.to(self.device), *places.unbind(1))
            for block in visual.blocks:
                x = block(x, cu_seqlens=ends, position_embeddings=angles)
            x = visual.post_layernorm(x).view(-1, merge, merge, x.shape[-1]).permute(0, 3, 1, 2)
            return [visual.merger(visual.downsample(x).flatten(1))]

        return encode

    @keepable()
    def _table(self, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Position embeddings (P, C) and rotary (cos, sin), (P, 1, d / 2) each, of one frame pair's P patches."""
        from transformers.vision_utils import get_vision_position_ids

        visual = self.visual
        weight = visual.embeddings.position_embedding.weight
        key = (size, self.device, weight.dtype)
        if key not in self._tables:
            grid = torch.tensor([[1, *(side // self.video.patch_size for side in size)]])
            positions = get_vision_position_ids(grid, self.video.merge_size).to(self.device)
            nothing = torch.zeros(len(positions), weight.shape[1], dtype=weight.dtype, device=self.device)
            rest = [len(positions)], grid.to(self.device), *positions.unbind(1)
            embeds = visual.embeddings(nothing, *rest).detach()
            self._tables[key] = embeds, *half_angles(visual.rotary_pos_emb(embeds, positions))
        return self._tables[key]

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (x[..., ::2] for x in super().rotary(positions))  # of neighbours, who have the same
        return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)


class GlmMoeTeacher(GlmTeacher):
    """A frozen GLM-4.5V or 4.6V, with experts. Its vision tower and prompts are those of GLM-4.1V."""

    architecture = "Glm4vMoeForConditionalGeneration"
    decoder = GlmMoeDecoder()

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return QwenTokens.rotary(self, positions)
