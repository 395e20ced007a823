"""Stage ``teacher``: a tiny ``Qwen3VLForConditionalGeneration`` that watches, judges and writes queries.

All questions of a video are packed behind it in one sequence, each seeing the video and itself with positions that
restart after the video: exactly what separate passes compute, at a fraction of the cost. Besides the answers, facts of
each frame pair are read out, by heads that are thrown away, from the visual tokens and from the language model's
``<|vision_end|>`` tokens: without that supervision a model of this size stays at chance for very long.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from recipes.microworld.collect import load
from recipes.microworld.teacher.grounding import LAYER, STATE, Grounding, Look, by_color, find_words, in_pairs
from recipes.microworld.training import adopt, load_config, train
from vlmteacher.checkpoints.pretrained import load_network, load_tokenizer
from vlmteacher.microworld import corruptions, splits, world
from vlmteacher.microworld.facts import FASTEST, Facts, facts_of
from vlmteacher.microworld.families import FAMILIES
from vlmteacher.microworld.questions import STYLE, Question, ask, own_questions, right_queries
from vlmteacher.microworld.scene import Scene, Track
from vlmteacher.microworld.tokenizer import kept_tokenizer
from vlmteacher.ops.attention import Spans, attention
from vlmteacher.ops.patchify import patchify
from vlmteacher.optimization.loop import teacher_frame_indices
from vlmteacher.optimization.reward import vqa_objective
from vlmteacher.queries import query_prompt
from vlmteacher.teachers.preprocessing import VisionSettings
from vlmteacher.teachers.qwen_vl import QwenVLTeacher, video_placeholder

SAVE_EVERY = 250
FRAMES = 12  # K: what the Teacher sees of a video
PATCH = 8
VIDEO_PROCESSOR = {
    "size": {"shortest_edge": 1024, "longest_edge": 25165824},
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
TOKENS = (world.SIZE // PATCH // 2) ** 2  # merged visual tokens of a frame pair

# How often each kind of video is shown, where it makes sense in the family; kinds that only one family has: `OWN`.
OWN = 2.0
MIX = {
    "right": 8.0,
    "static": 0.5,
    "backwards": 0.5,
    "final_only": 0.5,
    "half_finished": 1.5,
    "mistaken": 2.0,
    "wrong_target": 4.0,
    "near_miss": 1.5,
    "wall_crossing": 2.0,
    "teleport": 2.0,
    "vanish": 2.0,
    "fade_through": 1.5,
    "duplicate": 2.0,
    "ghost": 3.0,
    "wrong_color": 1.5,
    "eroded_scenery": 7.0,
    "disguise": 4.0,
    "another_instance": 0.0,
}


def corpus() -> list[str]:
    """Texts that the tokenizer is trained on: every question, prompt, time and query list of the world.

    So every word in them is one token: the colours' words must be, for what names a thing is found by them.
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


def ask_text(task: str) -> str:
    return query_prompt(task, STYLE.query_instruction)


def task_text(scene: Scene, rng: np.random.Generator) -> str:
    """A prompt for the scene in one of many wordings, the world's own among them."""
    family = FAMILIES[scene.family]
    if not family.paraphrases or rng.random() < 0.5:
        return world.write_prompt(scene, rng)
    return family.paraphrase(scene, rng)


def build(config: dict[str, Any], vocabulary: Path) -> QwenVLTeacher:
    """The untrained Teacher: real class, small config, own tokenizer, kept in the folder `vocabulary`."""
    tokenizer = kept_tokenizer(vocabulary, corpus, 1000)
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


SPANS = "vlmteacher_spans"  # transformers' name for our attention, which takes a third less of a training step


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
    """As transformers calls it: q, k, v (B, heads, S, d); the rotation leaves q and k in float32 under autocast."""
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    return attention(q, k, v, spans, backend), None


AttentionInterface.register(SPANS, _attend)


class PackedForward:
    """Runs the model's own modules over equal-sized videos, all frame pairs of the batch in one attention call."""

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
        """Follow the model there."""
        self.places, self.weights, self.cos, self.sin = (
            x.to(device) for x in (self.places, self.weights, self.cos, self.sin)
        )

    def see(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """patches (S, P, D) of S frame pairs -> merged tokens (S, P/4, C) and the DeepStack features, same shape."""
        visual = self.visual
        x = visual.patch_embed(patches) + (visual.pos_embed(self.places) * self.weights[:, :, None]).sum(1)
        deep = None
        for layer, block in enumerate(visual.blocks):
            h = block.norm1(x)
            q, k, v = block.attn.qkv(h).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            q, k = (t * self.cos + _rotate_half(t) * self.sin for t in (q, k))
            # Written out: PyTorch's fused kernel takes five times as long over 64 tokens in bfloat16.
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
        """Hidden states (B, S, C) of the embedding and of each layer, the last one normalised."""
        language = self.teacher.model.model.language_model
        embeds = language.embed_tokens(ids)
        seen = ids == pad
        embeds = embeds.masked_scatter(seen[..., None], merged.to(embeds.dtype))
        states: list[Tensor] = []
        hooks = [layer.register_forward_hook(lambda m, i, o: states.append(o)) for layer in language.layers]
        last = language(
            inputs_embeds=embeds,
            attention_mask=spans.mask()[None, None],  # as it is; `spans` is what the attention takes
            spans=spans,
            backend=backend,
            position_ids=positions,
            visual_pos_masks=seen,
            deepstack_visual_embeds=[deep.flatten(0, 1)],
            use_cache=False,
        ).last_hidden_state
        for hook in hooks:
            hook.remove()
        return [*states, last]


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def distort(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur, noise and a tint, as a small decoder leaves them."""
    if rng.random() < 0.6:
        side = float(rng.uniform(0, 0.25))
        for axis in (1, 2):
            frames = side * (np.roll(frames, 1, axis) + np.roll(frames, -1, axis)) + (1 - 2 * side) * frames
    if rng.random() < 0.5:
        frames = frames + rng.normal(0, rng.uniform(0, 0.05), frames.shape)
    if rng.random() < 0.3:
        frames = frames + rng.normal(0, 0.03, (1, 1, 1, 3))
    return np.clip(frames, 0, 1).astype(np.float32)


Row = tuple[np.ndarray, Scene, Facts]
"""A video (T, H, W, 3) in [0, 1], its scene, and the facts of it."""


def draw_track(
    rng: np.random.Generator, outside: float = 0.0, families: Sequence[str] = world.FAMILIES
) -> tuple[Scene, Track]:
    """A training scene of one of the families and a video of it, of some kind of `MIX`, as a track."""
    scene = splits.training_scene(rng, str(rng.choice(families)), outside)
    names = [kind for kind in ("right", *corruptions.kinds(scene.family)) if MIX.get(kind, OWN)]
    weights = np.asarray([MIX.get(kind, OWN) for kind in names])
    kind = str(rng.choice(names, p=weights / weights.sum()))
    return scene, world.perform(scene) if kind == "right" else corruptions.corrupt(kind, scene, rng)


def lesson(rng: np.random.Generator, outside: float = 0.0, families: Sequence[str] = world.FAMILIES) -> Row:
    """A rendered video with its facts, of a share `outside` of them of a scene out of domain."""
    scene, track = draw_track(rng, outside, families)
    return distort(world.draw(track), rng), scene, facts_of(scene, track)


def faded(row: Row, way: float, rng: np.random.Generator) -> tuple[np.ndarray, list[Question], list[float]]:
    """A video faded over into the right one of its scene, and with it what the answers should be, No 0 and Yes 1.

    way: 0 for the video itself, 1 for the right one. Four of the task's own questions, the goal twice where there are
    but three. A Teacher that answers so (mixup, arXiv 1710.09412) has gradients that point to the right video.
    """
    video, scene, facts = row
    track = world.perform(scene)
    questions, right = (own_questions(scene, f) for f in (facts, facts_of(scene, track)))
    count = [*range(len(questions)), 0][:4]
    share = float(np.interp(way, (0.0, 0.9, 1.0), (0.0, 0.5, 1.0)))  # likely only where little is left of the wrong
    yes = [(1 - share) * questions[k].answer + share * right[k].answer for k in count]
    frames = (1 - way) * video + way * distort(world.draw(track), rng)
    return frames, [questions[k] for k in count], yes


@dataclass(frozen=True)
class Batch:
    """Videos and the same number of questions about each.

    frames: (B, T, 3, H, W) in [0, 1]. yes: (B, questions) in [0, 1], how far Yes is right; else as the questions say.
    """

    frames: Tensor
    scenes: list[Scene]
    facts: list[Facts]
    asked: list[list[Question]]
    yes: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[Row], asked: list[list[Question]], yes: Tensor | None = None) -> Batch:
        videos, scenes, facts = zip(*rows, strict=True)
        frames = torch.from_numpy(np.stack(videos)).permute(0, 1, 4, 2, 3).float()
        return cls(frames, list(scenes), list(facts), asked, yes)


def blend(rows: list[Row], rng: np.random.Generator) -> Batch:
    """Videos on their way to the right ones, and the tasks' own questions."""
    frames, asked, yes = zip(*(faded(row, float(rng.uniform()), rng) for row in rows), strict=True)
    mixed = [(video, scene, facts) for video, (_, scene, facts) in zip(frames, rows, strict=True)]
    return Batch.of(mixed, list(asked), torch.tensor(yes))


class Readout(nn.Module):
    """Training-only heads that tell the facts of a frame pair from one vector, the actors told apart by colour."""

    SIZES: ClassVar = {"states": len(world.COLORS) * 2 * STATE, "there": len(world.COLORS), "flags": 3}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.Linear(width, sum(self.SIZES.values()))

    def forward(self, x: Tensor, truth: dict[str, Tensor]) -> dict[str, Tensor]:
        out = dict(zip(self.SIZES, self.heads(self.norm(x)).split(list(self.SIZES.values()), -1), strict=True))
        known = truth["states"].isfinite()
        said = out["states"].view_as(truth["states"]) * known
        return {
            "states": 60 * F.smooth_l1_loss(said, truth["states"].nan_to_num(), beta=0.02),
            "there": 3 * F.binary_cross_entropy_with_logits(out["there"], truth["there"]),
            "flags": 3 * F.binary_cross_entropy_with_logits(out["flags"], truth["flags"]),
        }


def pair_truth(scenes: Sequence[Scene], facts: Sequence[Facts], indices: list[int]) -> dict[str, Tensor]:
    """Targets (B, pairs, ...) of `Readout` for the frames that the Teacher sees.

    states: (colours, 2 frames, `STATE`) of the actor that had the colour at first; there: (colours,) whether there is
    one of it in both frames; flags: something jumped, touched a block, changed in the scenery.
    """
    rows: dict[str, list[Tensor]] = {"states": [], "there": [], "flags": []}
    for scene, f in zip(scenes, facts, strict=True):
        states, there = by_color(scene, f, indices)
        step = np.hypot(*np.moveaxis(np.diff(f.position[indices], axis=0), -1, 0)) / np.diff(indices)[:, None]
        jumped = np.concatenate([[False], (step > FASTEST).any(1)]) | f.jumped[indices].any(1)
        flags = [~in_pairs(~x, range(len(indices))) for x in (jumped, f.touching[indices], ~f.intact[indices])]
        rows["states"].append(states.unflatten(0, (-1, 2)).transpose(1, 2))
        rows["there"].append(there[0::2] * there[1::2])
        rows["flags"].append(torch.from_numpy(np.stack(flags, 1)).float())
    return {name: torch.stack(values) for name, values in rows.items()}


def cell_truth(frames: Tensor) -> Tensor:
    """(B, K, 3, H, W) -> (B, pairs, cells, 8): how much of each colour and of blocks is in each merged cell."""
    frames = frames[..., ::2, ::2]  # a quarter of the pixels tells as much
    palette = frames.new_tensor([*world.COLORS.values(), world.BLOCK_COLOR, world.BACKGROUND])
    distance = (frames[:, :, None] - palette[None, None, :, :, None, None]).square().sum(3)
    share = (-distance / 0.02).softmax(2)
    size = PATCH
    cells = F.avg_pool2d(share.flatten(0, 1), size).unflatten(0, frames.shape[:2])  # (B, K, 8, h, w)
    pairs = 0.5 * (cells[:, 0::2] + cells[:, 1::2])
    return pairs.flatten(3).transpose(2, 3) * 4  # a ball fills about a third of a cell


@dataclass(frozen=True)
class Reading:
    """What the model makes of videos and questions packed behind them.

    ids: (B, S), the first `prefix` of each row those of the video, then questions of `longest` each. merged: the visual
    tokens (frame pairs, cells, C). states: (B, S, C) of each layer. yes, no: (B, questions), log P of the answers.
    """

    ids: Tensor
    prefix: int
    longest: int
    merged: Tensor
    states: list[Tensor]
    yes: Tensor
    no: Tensor


REPORTED = (
    *("l_states", "l_there", "l_flags", "cells", "changed"),
    *("actor_look", "actor_state", "actor_color", "once", "fixed_look", "fixed_place", "related", "holds"),
    *("look_back", "scenery_look"),
)


class Lesson:
    """One training step's computation: answers, read-outs and cells; and now and then writing queries."""

    def __init__(self, teacher: QwenVLTeacher, config: dict[str, Any]) -> None:
        width = config["width"]
        self.teacher, self.config = teacher, config
        self.packed = PackedForward(teacher)
        language = teacher.model.model.language_model
        self.looks = Look(language, LAYER), Look(language, LAYER + 1)
        self.heads = nn.ModuleDict(
            {
                "pair_vision": Readout(2 * width),
                "pair_language": Readout(width),
                "pair_last": Readout(width),
                "cells": nn.Linear(width, 8),
                "changed": nn.Linear(width, 1),
                "grounding": Grounding(width, FRAMES // 2),
            }
        )
        tokenizer = teacher.tokenizer
        ids = tokenizer.convert_tokens_to_ids
        self.video_pad, self.vision_end = ids("<|video_pad|>"), ids("<|vision_end|>")
        colors = [tokenizer(f" {c}", add_special_tokens=False).input_ids for c in world.COLORS]
        self.color_ids = torch.tensor([row[0] for row in colors if len(row) == 1])
        (self.mark,) = tokenizer("?", add_special_tokens=False).input_ids
        self.yes, self.no = (tokenizer(w, add_special_tokens=False).input_ids[0] for w in ("Yes", "No"))
        self.indices = teacher_frame_indices(world.NUM_FRAMES, FRAMES)
        self.placeholder = video_placeholder(self.indices, world.FPS, TOKENS)
        self.known: dict[str, list[int]] = {}
        self.prefix_positions: Tensor | None = None

    def to(self, device: torch.device) -> Lesson:
        """Read there; `judge` and `write` stay on the CPU."""
        self.teacher.model.to(device)
        self.packed.to(device)
        return self

    def question_ids(self, question: str) -> list[int]:
        if question not in self.known:
            self.known[question] = self.teacher._question_ids(question, self.placeholder)[0]
        return self.known[question]

    def read(self, frames: Tensor, texts: list[list[str]], backend: str | None = None) -> Reading:
        """frames (B, K, 3, H, W) in [0, 1] and the same number of questions about each video.

        backend: of `attention` in the language model.
        """
        batch, pairs = len(frames), FRAMES // 2
        patches = torch.stack([patchify(f, PATCH, 2, 2, (0.5,) * 3, (0.5,) * 3) for f in frames])
        merged, deep = self.packed.see(patches.view(batch * pairs, -1, patches.shape[-1]))

        rows = [[self.question_ids(text) for text in questions] for questions in texts]
        prefix = _shared(rows)
        longest = max(len(r) for row in rows for r in row) - prefix
        count, length = len(rows[0]), prefix + len(rows[0]) * longest
        ids = torch.zeros(batch, length, dtype=torch.long)
        ends = torch.zeros(batch, count, dtype=torch.long)
        for b, row in enumerate(rows):
            ids[b, :prefix] = torch.tensor(row[0][:prefix])
            for q, r in enumerate(row):
                start = prefix + q * longest
                ids[b, start : start + len(r) - prefix] = torch.tensor(r[prefix:])
                ends[b, q] = start + len(r) - prefix - 1
        if self.prefix_positions is None or self.prefix_positions.shape[-1] != prefix:
            grid = torch.tensor([[pairs, world.SIZE // PATCH, world.SIZE // PATCH]])
            one = ids[:1, :prefix]
            self.prefix_positions, _ = self.teacher.model.model.get_rope_index(
                one, self.teacher._token_types(one), video_grid_thw=grid
            )
        after = self.prefix_positions.max() + 1
        tail = (after + torch.arange(longest)).repeat(count).view(1, 1, -1).expand(3, 1, -1)
        device = frames.device
        positions = torch.cat([self.prefix_positions, tail], -1).to(device).expand(3, batch, -1)
        ids, ends = ids.to(device), ends.to(device)
        here = torch.arange(length, device=device)
        start = prefix + (here - prefix) // longest * longest  # of the question that the token is in
        table = torch.stack([(here + 1).clamp_max(prefix), start.clamp_min(prefix), here + 1], 1)
        spans = Spans(table.int(), length)
        states = self.packed.read(ids, positions, spans, merged, deep, self.video_pad, backend)
        hidden = states[-1][torch.arange(batch, device=device)[:, None], ends]
        likely = self.teacher.model.lm_head(hidden).float().log_softmax(-1)
        return Reading(ids, prefix, longest, merged, states, likely[..., self.yes], likely[..., self.no])

    def objective(self, frames: Tensor, questions: Sequence[list[str]], goal_weight: float) -> Tensor:
        """(B,) what an optimisation lets fall, on frames (B, K, 3, H, W); its gradient at them has one too."""
        most = max(len(row) for row in questions)
        texts = [(row * most)[:most] for row in questions]  # the first again, unweighed, where there are fewer
        bf16 = torch.autocast(frames.device.type, torch.bfloat16, enabled=self.config["bf16"])
        with bf16, sdpa_kernel(SDPBackend.MATH):  # the only one whose gradient has one
            losses = -self.read(frames, texts, backend="sdpa").yes
        rows = zip(losses, questions, strict=True)
        return torch.stack([vqa_objective(row[: len(asked)], goal_weight) for row, asked in rows])

    def judge(self, shown: Batch) -> tuple[Tensor, dict]:
        """The loss and what is reported of it; `answer_loss` is that of the answers alone."""
        scenes, facts, asked = shown.scenes, shown.facts, shown.asked
        frames = shown.frames[:, self.indices]
        reading = self.read(frames, [[q.text for q in questions] for questions in asked])
        ids, prefix, longest = reading.ids, reading.prefix, reading.longest
        merged, states = reading.merged, reading.states
        batch, pairs, count = len(frames), FRAMES // 2, len(asked[0])
        truth = torch.tensor([[q.answer for q in questions] for questions in asked])
        share = truth.float() if shown.yes is None else shown.yes
        self.answer_loss = -(share * reading.yes + (1 - share) * reading.no).mean()

        told = pair_truth(scenes, facts, self.indices)
        pooled = torch.cat([merged.mean(1), merged.amax(1)], -1).view(batch, pairs, -1).float()
        at_end = (ids[0] == self.vision_end).nonzero()[:, 0]
        middle = states[len(states) // 2 - 1][:, at_end].float()
        losses = {f"v_{k}": v for k, v in self.heads["pair_vision"](pooled, told).items() if k != "flags"}
        losses |= {f"l_{k}": v for k, v in self.heads["pair_language"](middle, told).items()}
        losses |= {f"e_{k}": 0.5 * v for k, v in self.heads["pair_last"](states[-1][:, at_end].float(), told).items()}
        cells = self.heads["cells"](merged.float()).view(batch, pairs, -1, 8)
        losses["cells"] = 5 * F.smooth_l1_loss(cells, cell_truth(frames), beta=0.1)
        visual = (ids[0, :prefix] == self.video_pad).nonzero()[:, 0]
        changed = torch.from_numpy(np.stack([f.changed[self.indices[1::2]] for f in facts])).float()
        seen = self.heads["changed"](states[LAYER][:, visual].float()).view(changed.shape)
        losses["changed"] = 4 * F.binary_cross_entropy_with_logits(seen, changed, 1 + 9 * changed)
        suffix = ids[:, prefix:].unflatten(1, (-1, longest))
        words = find_words(suffix, self.color_ids, prefix, asked, scenes, facts, self.indices)
        marks = prefix + torch.arange(count) * longest + (suffix == self.mark).float().argmax(-1)
        holds = torch.from_numpy(np.stack([[in_pairs(q.holds, self.indices) for q in row] for row in asked]))
        scenery = torch.tensor([[q.kind == "scenery" for q in row] for row in asked])
        losses |= self.heads["grounding"](self.looks, states, visual, words, marks, holds, scenery, changed, prefix)
        report = {k: float(v.detach()) for k, v in losses.items() if k in REPORTED}
        right = ((reading.yes > reading.no) == truth).tolist()
        report |= accuracies(asked, scenes, right)
        total = self.config["answer_weight"] * self.answer_loss + sum(losses.values())
        return total, report

    def mislead(self, shown: Batch) -> Batch:
        """Frames a step, of 0 to the adversary's most, up the gradient of the answers' loss.

        An optimisation takes such steps; the truth stays what it was. A Teacher that withstands them has gradients
        that change what is seen (adversarial training, arXiv 1706.06083; one step, arXiv 2001.03994).
        """
        frames = shown.frames.detach().requires_grad_()
        self.judge(replace(shown, frames=frames))
        (gradient,) = torch.autograd.grad(self.answer_loss, frames)
        return replace(shown, frames=climbed(frames, gradient, self.config["adversary"]))

    def keep(self, shown: Batch, known: Lesson) -> tuple[Tensor, dict[str, float]]:
        """How far answers, and the way in which frames would have to change for a Yes, are not those of `known`.

        Divergence of the answers, and 1 - cosine of the objectives' gradients at the frames (Sobolev training, arXiv
        1706.04859): so something else is learnt and an optimisation is led as before.
        """
        texts = [[q.text for q in questions] for questions in shown.asked]

        def look(lesson: Lesson, learns: bool) -> tuple[Tensor, Tensor]:
            frames = shown.frames[:, self.indices].detach().requires_grad_()
            with sdpa_kernel(SDPBackend.MATH):  # the only one whose gradient has one
                reading = lesson.read(frames, texts, backend="sdpa")
            objective = torch.stack([vqa_objective(-row) for row in reading.yes]).sum()
            (gradient,) = torch.autograd.grad(objective, frames, create_graph=learns)
            likely = torch.stack([reading.yes, reading.no])
            rest = (1 - likely.exp().sum(0)).clamp_min(1e-6).log()
            return torch.cat([likely, rest[None]]), gradient.flatten(1)

        told, led = look(self, True)
        before, ahead = look(known, False)
        answers = F.kl_div(told, before.detach(), reduction="sum", log_target=True) / told[0].numel()
        cosine = F.cosine_similarity(led, ahead, dim=1).mean()
        report = {"kept_answers": float(answers.detach()), "kept_cosine": float(cosine.detach())}
        return self.config["answer_weight"] * answers + self.config["keep"] * (1 - cosine), report

    def write(self, scenes: list[Scene], rng: np.random.Generator) -> Tensor:
        """Cross-entropy of the right queries, given prompt and first frame, in the form that `generate` sees.

        A sum over the words of each: nearly all of them are the same for every task of a family, and in a mean the few
        that have to be read off the picture would not count beside the answers' loss.
        """
        tokenizer = self.teacher.tokenizer
        image = "<|vision_start|>" + "<|image_pad|>" * TOKENS + "<|vision_end|>"
        ids, targets, patches = [], [], []
        for scene in scenes:
            prompt = self.teacher._chat(ask_text(task_text(scene, rng)), "image", image)
            head = tokenizer(prompt, add_special_tokens=False).input_ids
            tail = tokenizer(json.dumps(right_queries(scene).to_dict()), add_special_tokens=False).input_ids
            tail = [*tail, tokenizer.eos_token_id]
            ids.append(torch.tensor(head + tail))
            targets.append(torch.tensor([-100] * (len(head) - 1) + tail + [-100]))
            first = torch.from_numpy(world.draw([scene.things])).permute(0, 3, 1, 2)
            patches.append(patchify(first, PATCH, 2, 2, (0.5,) * 3, (0.5,) * 3))
        merged, deep = self.packed.see(torch.stack(patches))
        rows = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        goal = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
        grid = torch.tensor([[1, world.SIZE // PATCH, world.SIZE // PATCH]]).expand(len(rows), 3)
        positions, _ = self.teacher.model.model.get_rope_index(
            rows, self.teacher._token_types(rows), image_grid_thw=grid
        )
        ends = torch.arange(1, rows.shape[1] + 1)
        causal = Spans(torch.stack([ends, ends, ends], 1).int(), len(ends))
        pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        last = self.packed.read(rows, positions, causal, merged, deep, pad)[-1]
        logits = self.teacher.model.lm_head(last).float().flatten(0, 1)
        return F.cross_entropy(logits, goal.flatten(), reduction="sum") / len(scenes)


def climbed(frames: Tensor, gradient: Tensor, most: float) -> Tensor:
    """Frames (B, K, 3, H, W) a step of 0 to `most` up the signs of a gradient, smoothed as by a decoder."""
    smooth = F.avg_pool2d(gradient.flatten(0, 1), 3, 1, 1).view_as(frames)
    size = most * torch.rand(len(frames), 1, 1, 1, 1).to(frames)
    return (frames.detach() + size * smooth.sign()).clamp(0, 1)


def accuracies(asked: list[list[Question]], scenes: list[Scene], right: list[list[bool]]) -> dict[str, float]:
    """Shares of right answers where the answer is yes and where it is no: in all, and for each family's own kinds."""
    sums: dict[str, list[bool]] = {}
    for questions, scene, row in zip(asked, scenes, right, strict=True):
        for question, correct in zip(questions, row, strict=True):
            said = "yes" if question.answer else "no"
            for name in (said, f"{scene.family}/{said}", f"{scene.family}/{question.kind}/{said}"):
                sums.setdefault(name, []).append(correct)
    return {name: float(np.mean(values)) for name, values in sums.items()}


def _shared(rows: list[list[list[int]]]) -> int:
    """Length of the prefix that all questions of a batch have in common (the video)."""
    everything = [r for row in rows for r in row]
    limit = min(len(r) for r in everything)
    return next(i for i in range(limit + 1) if i == limit or any(r[i] != everything[0][i] for r in everything))


def main(out: Path, init: Path | None = None) -> None:
    """Stage ``teacher``, from scratch or from the weights of a pair's Teacher in `init`."""
    config = load_config("teacher")
    torch.manual_seed(config["seed"])
    lessons = Lesson(build(config, out / "tokenizer"), config)
    if init:
        known = load_network(Qwen3VLForConditionalGeneration, init, dtype=torch.float32)
        adopt(lessons.teacher.model, known, lessons.teacher.tokenizer, load_tokenizer(init))
    fit(lessons, lambda rng: [lesson(rng, config["outside"]) for _ in range(config["batch"])], out, warmup=100)


class Source:
    """Where the rows of batches come from: some families, a share `outside` of the new lessons out of domain.

    groups: collected rows by kind; with a share of 0 or 1 only those in or out of domain, of these families.
    """

    def __init__(self, groups: dict[str, list[Row]], families: Sequence[str], outside: float) -> None:
        def fits(scene: Scene) -> bool:
            return scene.family in families and (0 < outside < 1 or (world.split_of(scene) == "ood") == bool(outside))

        self.groups = {kind: [row for row in rows if fits(row[1])] for kind, rows in groups.items()}
        self.families, self.outside = families, outside

    def draw(self, rng: np.random.Generator, counts: dict[str, int], batch: int) -> list[Row]:
        """So many of each kind, where there are any, and new lessons to make `batch`."""
        rows = []
        for kind, count in counts.items():
            for _ in range(count if self.groups[kind] else 0):
                video, scene, facts = self.groups[kind][int(rng.integers(len(self.groups[kind])))]
                rows.append((video.astype(np.float32) / 255, scene, facts))
        return rows + [lesson(rng, self.outside, self.families) for _ in range(batch - len(rows))]


def finetune(start: Path, collected: Path, out: Path) -> None:
    """Stage ``teacher-finetune``: go on from `start`; `collected` rows of each batch are of these kinds.

    Where the settings' `learn` names families, or is "outside" for all that is out of domain, that alone is learnt
    from; of the rest, every other step keeps the judging as it was.
    """
    config = load_config("teacher") | load_config("teacher_finetune")
    torch.manual_seed(config["seed"])
    lessons = Lesson(build(config, start.parent / "tokenizer"), config)
    modules = torch.load(start, weights_only=True)["modules"]
    lessons.teacher.model.load_state_dict(modules["teacher"])
    lessons.heads.load_state_dict(modules["heads"], strict=False)  # a head added since starts afresh
    groups = {kind: load(sorted(collected.glob(f"{kind}-*.pt"))) for kind in config["collected"]}
    if config["learn"] == "outside":
        learned, held = Source(groups, world.FAMILIES, 1.0), Source(groups, world.FAMILIES, 0.0)
    else:
        families = tuple(config["learn"] or world.FAMILIES)
        others = tuple(family for family in world.FAMILIES if family not in families)
        learned, held = (Source(groups, names, config["outside"]) for names in (families, others))

    def draw(source: Source, rng: np.random.Generator) -> list[Row]:
        return source.draw(rng, config["collected"], config["batch"])

    hold = None
    if held.families:
        known = Lesson(copy.deepcopy(lessons.teacher), config)
        known.teacher.model.requires_grad_(False)

        def hold(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
            rows = draw(held, rng)
            return lessons.keep(Batch.of(rows, [ask(s, f, rng, 4) for _, s, f in rows]), known)

    fit(lessons, partial(draw, learned), out, warmup=50, hold=hold)


def scenes_to_write(rng: np.random.Generator, count: int, outside: float) -> list[Scene]:
    """Training scenes to write queries for, the families as often as their `query_weight` says."""
    weights = np.asarray([FAMILIES[family].query_weight for family in world.FAMILIES])
    chosen = rng.choice(world.FAMILIES, count, p=weights / weights.sum())
    return [splits.training_scene(rng, str(family), outside) for family in chosen]


def fit(
    lessons: Lesson,
    draw: Callable[[np.random.Generator], list[Row]],
    out: Path,
    *,
    warmup: int,
    hold: Callable[[np.random.Generator], tuple[Tensor, dict[str, float]]] | None = None,
) -> None:
    """Train on the rows that `draw` gives, writing queries now and then; save the Teacher to ``out/teacher``.

    hold: the loss of every step with an odd index instead; an even `blend_every` blends on none but these.
    """
    config, teacher = lessons.config, lessons.teacher

    def step(index: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=config["bf16"]):
            if config["write_every"] and index % config["write_every"] == config["write_every"] - 1:
                loss = lessons.write(scenes_to_write(rng, config["batch"], config["outside"]), rng)
                return loss, {"write": float(loss.detach())}
            if hold and index % 2:
                return hold(rng)
            rows = draw(rng)
            blended = config["blend_every"] and index % config["blend_every"] == 1
            if blended:
                shown = blend(rows, rng)
            else:
                shown = Batch.of(rows, [ask(s, f, rng, config["questions"]) for _, s, f in rows])
            if config["adversary"]:
                shown = lessons.mislead(shown)
            loss, report = lessons.judge(shown)
            if blended:
                loss = config["answer_weight"] * lessons.answer_loss
                report = {"blend": float(lessons.answer_loss.detach())}
        return loss, report

    train(
        {"teacher": teacher.model, "heads": lessons.heads},
        step,
        out,
        steps=config["steps"],
        learning_rate=config["learning_rate"],
        seed=config["seed"],
        warmup=warmup,
        save_every=SAVE_EVERY,
        log_every=50,
    )
    save(teacher, out / "teacher")


def save(teacher: QwenVLTeacher, path: Path) -> None:
    """Write a normal transformers directory with tokenizer and video processor settings."""
    teacher.model.save_pretrained(path)
    teacher.tokenizer.save_pretrained(path)
    (path / "video_preprocessor_config.json").write_text(json.dumps(VIDEO_PROCESSOR, indent=2) + "\n")
    (path / "preprocessor_config.json").write_text(json.dumps(VIDEO_PROCESSOR, indent=2) + "\n")
    (path / "teacher.json").write_text(json.dumps(asdict(STYLE), indent=2) + "\n")
