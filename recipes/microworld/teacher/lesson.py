"""Stage ``teacher``: a tiny ``Qwen3VLForConditionalGeneration`` that watches, judges and writes queries.

All questions of a video are packed behind it in one sequence, each seeing the video and itself with positions that
restart after the video: exactly what separate passes compute, at a fraction of the cost. Besides the answers, facts of
each frame pair are read out, by heads that are thrown away, from the visual tokens and from the language model's
``<|vision_end|>`` tokens: without that supervision a model of this size stays at chance for very long.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from recipes.microworld.teacher.data import Batch, ask_text, task_text
from recipes.microworld.teacher.grounding import LAYER, Grounding, Look, find_words, in_pairs
from recipes.microworld.teacher.losses import Readout, accuracies, cell_truth, climbed, pair_truth
from recipes.microworld.teacher.model import PATCH, TOKENS, PackedForward
from vlmteacher.microworld import world
from vlmteacher.microworld.questions import right_queries
from vlmteacher.microworld.scene import Scene
from vlmteacher.ops.attention import Spans
from vlmteacher.ops.patchify import patchify
from vlmteacher.optimization.objective import teacher_frame_indices
from vlmteacher.optimization.reward import vqa_objective
from vlmteacher.teachers.prompt import pack, shared_length
from vlmteacher.teachers.qwen_vl import QwenVLTeacher

FRAMES = 12  # K: what the Teacher sees of a video
REPORTED = (
    *("l_states", "l_there", "l_flags", "cells", "changed"),
    *("actor_look", "actor_state", "actor_color", "once", "fixed_look", "fixed_place", "related", "holds"),
    *("look_back", "scenery_look"),
)


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
        self.clip = teacher.clip(self.indices, world.FPS, world.SIZE, world.SIZE)
        self.known: dict[str, list[int]] = {}
        self.prefix_positions: Tensor | None = None

    def to(self, device: torch.device) -> Lesson:
        """Read there; `judge` and `write` stay on the CPU."""
        self.teacher.model.to(device)
        self.packed.to(device)
        return self

    def question_ids(self, question: str) -> list[int]:
        if question not in self.known:
            self.known[question] = self.teacher.chats(self.clip, [question])[0].prompt
        return self.known[question]

    def read(self, frames: Tensor, texts: list[list[str]], backend: str | None = None) -> Reading:
        """frames (B, K, 3, H, W) in [0, 1] and the same number of questions about each video.

        backend: of `attention` in the language model.
        """
        batch, pairs = len(frames), FRAMES // 2
        patches = torch.stack([patchify(f, PATCH, 2, 2, (0.5,) * 3, (0.5,) * 3) for f in frames])
        merged, deep = self.packed.see(patches.view(batch * pairs, -1, patches.shape[-1]))

        rows = [[self.question_ids(text) for text in questions] for questions in texts]
        prompts = [ids for row in rows for ids in row]
        prefix = shared_length(prompts)
        longest = max(map(len, prompts)) - prefix
        packs = [pack(row, prefix, longest) for row in rows]
        ids = torch.tensor([packed.ids for packed in packs])
        ends = torch.tensor([[len(r) for r in row] for row in rows]) + torch.tensor(packs[0].starts) - prefix - 1
        if self.prefix_positions is None or self.prefix_positions.shape[-1] != prefix:
            self.prefix_positions = self.teacher.positions(ids[:1, :prefix], self.clip)
        after = self.prefix_positions.max() + 1
        tail = (after + torch.arange(longest)).repeat(len(rows[0])).view(1, 1, -1).expand(3, 1, -1)
        device = frames.device
        positions = torch.cat([self.prefix_positions, tail], -1).to(device).expand(3, batch, -1)
        ids, ends = ids.to(device), ends.to(device)
        spans = Spans(packs[0].spans().to(device), ids.shape[1])
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
            head = self.teacher.chat_ids(ask_text(task_text(scene, rng)), "image", image)
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
        types = self.teacher.token_inputs(rows)
        positions, _ = self.teacher.model.model.get_rope_index(rows, image_grid_thw=grid, **types)
        ends = torch.arange(1, rows.shape[1] + 1)
        causal = Spans(torch.stack([ends, ends, ends], 1).int(), len(ends))
        pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        last = self.packed.read(rows, positions, causal, merged, deep, pad)[-1]
        logits = self.teacher.model.lm_head(last).float().flatten(0, 1)
        return F.cross_entropy(logits, goal.flatten(), reduction="sum") / len(scenes)
