"""The computation of a training step of the Teacher: answers, supervision by facts, and writing queries.

All questions of a video are packed behind it in one sequence. Each attends to the video and to itself, with positions
that restart after the video: the same as separate passes, at a fraction of the cost. Besides the answers, training-only
heads read the facts of each frame pair from the visual tokens and from the language model's ``<|vision_end|>`` tokens:
without that supervision a model of this size stays at chance for very long.
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
from recipes.microworld.teacher.grounding import LAYER, AttentionProbe, Grounding, find_words, in_pairs
from recipes.microworld.teacher.losses import Readout, accuracies, cell_truth, pair_truth, perturbed
from recipes.microworld.teacher.model import PATCH, TOKENS, PackedForward
from recipes.microworld.training import in_bfloat16
from vlmteacher.microworld import world
from vlmteacher.microworld.questions import right_queries
from vlmteacher.microworld.scene import Scene
from vlmteacher.ops.attention import Spans
from vlmteacher.ops.patchify import patchify
from vlmteacher.optimization.frames import teacher_frame_indices
from vlmteacher.optimization.reward import vqa_objective
from vlmteacher.teachers.prompt import pack, shared_length
from vlmteacher.teachers.qwen_vl import QwenVLTeacher

FRAMES = 12  # K: frames of a video that the Teacher is given
REPORTED = (
    *("l_states", "l_there", "l_flags", "cells", "changed"),
    *("actor_look", "actor_state", "actor_color", "once", "fixed_look", "fixed_place", "related", "holds"),
    *("look_back", "scenery_look"),
)


@dataclass(frozen=True)
class Reading:
    """The model's output for videos with questions packed behind them.

    Attributes:
        ids: (B, S); the first `prefix` tokens of a row are the video's, then come questions of `longest` tokens each.
        merged: the visual tokens, (B * frame pairs, cells, C).
        states: hidden states (B, S, C) after each layer.
        yes, no: (B, questions), log probabilities of the answers.
    """

    ids: Tensor
    prefix: int
    longest: int
    merged: Tensor
    states: list[Tensor]
    yes: Tensor
    no: Tensor


class Lesson:
    """The losses of a Teacher, and the training-only `heads` that some of them need.

    config: `width` of the model, `bf16`, and the weights `answer_weight`, `adversary` and `keep` of the losses.
    """

    def __init__(self, teacher: QwenVLTeacher, config: dict[str, Any]) -> None:
        width = config["width"]
        self.teacher, self.config = teacher, config
        self.packed = PackedForward(teacher)
        language = teacher.model.model.language_model
        self.probes = AttentionProbe(language, LAYER), AttentionProbe(language, LAYER + 1)
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
        """Move what `read` and `objective` need to a device; `judge` and `write` are for the CPU."""
        self.teacher.model.to(device)
        self.packed.to(device)
        return self

    def question_ids(self, questions: Sequence[str]) -> list[list[int]]:
        """The token ids of a video and each of the questions about it."""
        if new := list(dict.fromkeys(question for question in questions if question not in self.known)):
            chats = self.teacher.chats(self.clip, new)
            self.known.update((question, chat.prompt) for question, chat in zip(new, chats, strict=True))
        return [self.known[question] for question in questions]

    def read(self, frames: Tensor, texts: list[list[str]], backend: str | None = None) -> Reading:
        """Run the model on frames (B, K, 3, H, W) in [0, 1] and the same number of questions about each video.

        backend: backend of `attention` in the language model.
        """
        batch, pairs = len(frames), FRAMES // 2
        patches = torch.stack([patchify(f, PATCH, 2, 2, (0.5,) * 3, (0.5,) * 3) for f in frames])
        merged, deep = self.packed.encode(patches.view(batch * pairs, -1, patches.shape[-1]))

        prompts = self.question_ids([text for questions in texts for text in questions])
        rows = [prompts[i : i + len(texts[0])] for i in range(0, len(prompts), len(texts[0]))]
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
        """The objective (B,) that the method minimises, on frames (B, K, 3, H, W); twice differentiable at them."""
        most = max(len(row) for row in questions)
        texts = [(row * most)[:most] for row in questions]  # fewer questions are repeated, and the repetitions ignored
        bf16 = in_bfloat16(self.config["bf16"], frames.device.type)
        with bf16, sdpa_kernel(SDPBackend.MATH):  # the only one that is twice differentiable
            losses = -self.read(frames, texts, backend="sdpa").yes
        rows = zip(losses, questions, strict=True)
        return torch.stack([vqa_objective(row[: len(asked)], goal_weight) for row, asked in rows])

    def judge(self, shown: Batch) -> tuple[Tensor, dict]:
        """The loss of the answers and of all readouts, and metrics; `answer_loss` becomes that of the answers alone."""
        scenes, facts, asked = shown.scenes, shown.facts, shown.asked
        frames = shown.frames[:, self.indices]
        reading = self.read(frames, [[q.text for q in questions] for questions in asked])
        ids, prefix, longest = reading.ids, reading.prefix, reading.longest
        merged, states = reading.merged, reading.states
        batch, pairs, count = len(frames), FRAMES // 2, len(asked[0])
        truth = torch.tensor([[q.answer for q in questions] for questions in asked])
        share = truth.float() if shown.yes is None else shown.yes
        self.answer_loss = -(share * reading.yes + (1 - share) * reading.no).mean()

        targets = pair_truth(scenes, facts, self.indices)
        pooled = torch.cat([merged.mean(1), merged.amax(1)], -1).view(batch, pairs, -1).float()
        at_end = (ids[0] == self.vision_end).nonzero()[:, 0]
        middle = states[len(states) // 2 - 1][:, at_end].float()
        losses = {f"v_{k}": v for k, v in self.heads["pair_vision"](pooled, targets).items() if k != "flags"}
        losses |= {f"l_{k}": v for k, v in self.heads["pair_language"](middle, targets).items()}
        losses |= {
            f"e_{k}": 0.5 * v for k, v in self.heads["pair_last"](states[-1][:, at_end].float(), targets).items()
        }
        cells = self.heads["cells"](merged.float()).view(batch, pairs, -1, 8)
        losses["cells"] = 5 * F.smooth_l1_loss(cells, cell_truth(frames), beta=0.1)
        visual = (ids[0, :prefix] == self.video_pad).nonzero()[:, 0]
        changed = torch.from_numpy(np.stack([f.changed[self.indices[1::2]] for f in facts])).float()
        logits = self.heads["changed"](states[LAYER][:, visual].float()).view(changed.shape)
        losses["changed"] = 4 * F.binary_cross_entropy_with_logits(logits, changed, 1 + 9 * changed)
        suffix = ids[:, prefix:].unflatten(1, (-1, longest))
        words = find_words(suffix, self.color_ids, prefix, asked, scenes, facts, self.indices)
        marks = prefix + torch.arange(count) * longest + (suffix == self.mark).float().argmax(-1)
        holds = torch.from_numpy(np.stack([[in_pairs(q.holds, self.indices) for q in row] for row in asked]))
        scenery = torch.tensor([[q.kind == "scenery" for q in row] for row in asked])
        losses |= self.heads["grounding"](self.probes, states, visual, words, marks, holds, scenery, changed, prefix)
        report = {k: float(v.detach()) for k, v in losses.items() if k in REPORTED}
        right = ((reading.yes > reading.no) == truth).tolist()
        report |= accuracies(asked, scenes, right)
        total = self.config["answer_weight"] * self.answer_loss + sum(losses.values())
        return total, report

    def perturb(self, shown: Batch, rng: np.random.Generator) -> Batch:
        """Move the frames along the gradient of the answers' loss, by a step of up to `adversary`; answers stay.

        A Teacher that withstands the steps an optimisation would take has gradients that change the content of a video
        (adversarial training, arXiv 1706.06083; with one step, arXiv 2001.03994).
        """
        frames = shown.frames.detach().requires_grad_()
        self.judge(replace(shown, frames=frames))
        (gradient,) = torch.autograd.grad(self.answer_loss, frames)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        return replace(shown, frames=perturbed(frames, gradient, self.config["adversary"], generator))

    def keep(self, shown: Batch, known: Lesson) -> tuple[Tensor, dict[str, float]]:
        """A loss that keeps the answers and the objective's gradient at the frames as those of `known`, and metrics.

        KL divergence of the answers, and 1 - cosine of the gradients (Sobolev training, arXiv 1706.04859).
        """
        texts = [[q.text for q in questions] for questions in shown.asked]

        def evaluate(lesson: Lesson, differentiable: bool) -> tuple[Tensor, Tensor]:
            frames = shown.frames[:, self.indices].detach().requires_grad_()
            with sdpa_kernel(SDPBackend.MATH):  # the only one that is twice differentiable
                reading = lesson.read(frames, texts, backend="sdpa")
            objective = torch.stack([vqa_objective(-row) for row in reading.yes]).sum()
            (gradient,) = torch.autograd.grad(objective, frames, create_graph=differentiable)
            likely = torch.stack([reading.yes, reading.no])
            rest = (1 - likely.exp().sum(0)).clamp_min(1e-6).log()
            return torch.cat([likely, rest[None]]), gradient.flatten(1)

        own, gradient = evaluate(self, True)
        kept, kept_gradient = evaluate(known, False)
        answers = F.kl_div(own, kept.detach(), reduction="sum", log_target=True) / own[0].numel()
        cosine = F.cosine_similarity(gradient, kept_gradient, dim=1).mean()
        report = {"kept_answers": float(answers.detach()), "kept_cosine": float(cosine.detach())}
        return self.config["answer_weight"] * answers + self.config["keep"] * (1 - cosine), report

    def write(self, scenes: list[Scene], rng: np.random.Generator) -> Tensor:
        """Cross-entropy of the right queries given prompt and first frame, in the layout of `generate`.

        It is summed over the tokens of a scene's queries. Nearly all of them are the same for every task of a family;
        in a mean, the few that depend on the picture would have next to no weight.
        """
        tokenizer = self.teacher.tokenizer
        image = "<|vision_start|>" + "<|image_pad|>" * TOKENS + "<|vision_end|>"
        ids, targets, patches = [], [], []
        asked = [ask_text(task_text(scene, rng)) for scene in scenes]
        self.teacher.prepare(asked, "image", image)
        for scene, text in zip(scenes, asked, strict=True):
            head = self.teacher.chat_ids(text, "image", image)
            tail = tokenizer(json.dumps(right_queries(scene).to_dict()), add_special_tokens=False).input_ids
            tail = [*tail, tokenizer.eos_token_id]
            ids.append(torch.tensor(head + tail))
            targets.append(torch.tensor([-100] * (len(head) - 1) + tail + [-100]))
            first = torch.from_numpy(world.draw([scene.things])).permute(0, 3, 1, 2)
            patches.append(patchify(first, PATCH, 2, 2, (0.5,) * 3, (0.5,) * 3))
        merged, deep = self.packed.encode(torch.stack(patches))
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
