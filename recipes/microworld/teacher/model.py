"""The tiny Teacher: its vocabulary, its network, and a forward pass for training."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from recipes.microworld.teacher.data import ask_text, task_text
from vlmteacher.microworld import world
from vlmteacher.microworld.facts import facts_of
from vlmteacher.microworld.questions import STYLE, ask, right_queries
from vlmteacher.microworld.tokenizer import check_words, kept_tokenizer
from vlmteacher.ops.attention import Spans, attention
from vlmteacher.teachers.preprocessing import VisionSettings
from vlmteacher.teachers.qwen_vl import QwenVLTeacher, video_placeholder

PATCH = 8
VIDEO_PROCESSOR = {
    "size": {"shortest_edge": 1024, "longest_edge": 25165824},
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
TOKENS = (world.SIZE // PATCH // 2) ** 2  # merged visual tokens per frame pair


def corpus() -> list[str]:
    """Texts that the tokenizer is trained on: questions, prompts, times and query lists of the world.

    Every word in them becomes one token. The words of colours must: `grounding.find_words` looks for their tokens.
    """
    lines = [video_placeholder(range(world.NUM_FRAMES), world.FPS, 1), "<|im_start|>assistant\nYes No"]
    rng = np.random.default_rng(0)
    for family in world.FAMILIES:
        for _ in range(60):
            scene = world.sample_scene(rng, family)
            lines += [ask_text(task_text(scene, rng)), ask_text(world.write_prompt(scene, rng))]
            lines.append(json.dumps(right_queries(scene).to_dict()))
            facts = facts_of(scene, [scene.things] * 2)
            lines += [q.text + " Answer Yes or No." for q in ask(scene, facts, rng, 10)]
    return lines


def build(config: dict[str, Any], vocabulary: Path) -> QwenVLTeacher:
    """The untrained Teacher, a small `Qwen3VLForConditionalGeneration`; the folder `vocabulary` keeps its tokenizer."""
    tokenizer = kept_tokenizer(vocabulary, corpus, 1000)
    check_words(tokenizer, world.FAMILIES)
    ids = tokenizer.convert_tokens_to_ids
    width = config["width"]
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": width,
                "intermediate_size": config["mlp"],
                "num_hidden_layers": config["layers"],
                "num_attention_heads": width // 32,
                "num_key_value_heads": width // 32,
                "head_dim": 32,
                "max_position_embeddings": 4096,
                "initializer_range": 0.07,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [6, 5, 5],
                    "mrope_interleaved": True,
                },
                "pad_token_id": tokenizer.pad_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "tie_word_embeddings": True,
            },
            vision_config={
                "depth": config["vision_layers"],
                "hidden_size": width,
                "intermediate_size": config["vision_mlp"],
                "num_heads": width // 32,
                "patch_size": PATCH,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
                "out_hidden_size": width,
                "num_position_embeddings": (world.SIZE // PATCH) ** 2,
                "deepstack_visual_indexes": [1],
                "initializer_range": 0.07,
            },
            image_token_id=ids("<|image_pad|>"),
            video_token_id=ids("<|video_pad|>"),
            vision_start_token_id=ids("<|vision_start|>"),
            vision_end_token_id=ids("<|vision_end|>"),
            tie_word_embeddings=True,
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    settings = VisionSettings(patch_size=PATCH).updated(VIDEO_PROCESSOR, "VIDEO_PROCESSOR")
    teacher = QwenVLTeacher(model, tokenizer, settings)
    model.model.language_model.set_attn_implementation(SPANS)
    model.requires_grad_(True).train()
    return teacher


SPANS = "vlmteacher_spans"  # the library's attention in transformers, which shortens a training step by a third


def _attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    spans: Spans,
    backend: str | None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; q, k, v (B, heads, S, d), where autocast leaves q and k in float32."""
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    return attention(q, k, v, spans, backend), None


AttentionInterface.register(SPANS, _attend)


class PackedForward:
    """Runs the model's own modules on videos of one size, with all frame pairs of a batch in one attention call."""

    def __init__(self, teacher: QwenVLTeacher) -> None:
        self.teacher = teacher
        self.visual = teacher.model.model.visual
        grid = torch.tensor([[1, world.SIZE // PATCH, world.SIZE // PATCH]])
        config = self.visual.config
        self.places, self.weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=self.visual.num_grid_per_side,
            mode=self.visual.interpolation_mode,
            align_corners=self.visual.interpolation_align_corners,
            spatial_merge_size=config.spatial_merge_size,
            kwargs={},
        )
        positions = get_vision_position_ids(grid, config.spatial_merge_size, kwargs={})
        self.cos, self.sin = self.visual.rotary_pos_emb(self.visual.pos_embed.weight, positions)

    def to(self, device: torch.device) -> None:
        """Move the constants to a device."""
        self.places, self.weights, self.cos, self.sin = (
            x.to(device) for x in (self.places, self.weights, self.cos, self.sin)
        )

    def encode(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Encode patches (S, P, D) of S frame pairs to merged tokens and DeepStack features, both (S, P/4, C)."""
        visual = self.visual
        x = visual.patch_embed(patches) + (visual.pos_embed(self.places) * self.weights[:, :, None]).sum(1)
        deep = None
        for layer, block in enumerate(visual.blocks):
            h = block.norm1(x)
            q, k, v = block.attn.qkv(h).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            q, k = (t * self.cos + _rotate_half(t) * self.sin for t in (q, k))
            # Not `scaled_dot_product_attention`: in bfloat16 that takes five times as long for 64 tokens.
            weights = (q.to(v.dtype) @ k.to(v.dtype).transpose(-1, -2) * block.attn.scaling).softmax(-1)
            h = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
            x = x + block.attn.proj(h)
            x = x + block.mlp(block.norm2(x))
            if layer in visual.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(layer)]
                deep = merger(x.flatten(0, 1)).unflatten(0, (len(x), -1))
        return visual.merger(x.flatten(0, 1)).unflatten(0, (len(x), -1)), deep

    def read(
        self,
        ids: Tensor,
        positions: Tensor,
        spans: Spans,
        merged: Tensor,
        deep: Tensor,
        pad: int,
        backend: str | None = None,
    ) -> list[Tensor]:
        """Hidden states (B, S, C) after each layer of the language model, the last one normalised.

        ids: (B, S), in which `pad` marks the places of the visual tokens `merged`. positions: (3, B, S). backend: of
        `attention`.
        """
        language = self.teacher.model.model.language_model
        embeds = language.embed_tokens(ids)
        visual = ids == pad
        embeds = embeds.masked_scatter(visual[..., None], merged.to(embeds.dtype))
        states: list[Tensor] = []
        hooks = [layer.register_forward_hook(lambda m, i, o: states.append(o)) for layer in language.layers]
        last = language(
            inputs_embeds=embeds,
            attention_mask=spans.mask()[None, None],  # unused: `_attend` takes `spans`
            spans=spans,
            backend=backend,
            position_ids=positions,
            visual_pos_masks=visual,
            deepstack_visual_embeds=[deep.flatten(0, 1)],
            use_cache=False,
        ).last_hidden_state
        for hook in hooks:
            hook.remove()
        return [*states, last]


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def save(teacher: QwenVLTeacher, path: Path) -> None:
    """Write a transformers directory with tokenizer, processor settings and ``teacher.json``."""
    teacher.model.save_pretrained(path)
    teacher.tokenizer.save_pretrained(path)
    (path / "video_preprocessor_config.json").write_text(json.dumps(VIDEO_PROCESSOR, indent=2) + "\n")
    (path / "preprocessor_config.json").write_text(json.dumps(VIDEO_PROCESSOR, indent=2) + "\n")
    (path / "teacher.json").write_text(json.dumps(asdict(STYLE), indent=2) + "\n")
