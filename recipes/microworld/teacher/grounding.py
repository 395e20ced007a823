"""Training-only supervision of the Teacher at the words of a question that name things, and at its question mark.

Without it so small a model does not learn to ground words. Attention heads of one layer are trained to attend from the
word to the cells that the named thing covers: for an actor in every frame pair, with a head for each; for other things
in the first pair, whose first frame is given and cannot be optimised; and to the first token where there is no such
thing. After that layer the word's hidden state must tell the thing's position, size, angle and colour. One layer later
the last such word and the question mark must tell in which pairs the asked condition holds, and the mark of a question
about all of the scenery attends to the cells that have changed. The readouts are discarded after training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmteacher.microworld import world
from vlmteacher.microworld.facts import NONE, Facts, reach
from vlmteacher.microworld.questions import Question
from vlmteacher.microworld.scene import Scene

FIXED = 3  # heads that attend from a word for scenery to the first pair; the others are free
BACK = -1  # the head that attends from a cell to the same cell of the first pair, to tell whether it has changed
LAYER = 1  # of the language model; DeepStack's features have been added to the visual tokens before it
SIDE = world.SIZE // world.CELL
STATE = 5  # x, y, size, cosine and sine of twice the angle


def thing_states(facts: Facts, scene: Scene, frames: Sequence[int]) -> Tensor:
    """States of the things, (frames, things, `STATE`), of order 1; NaN where a thing is not visible."""
    bars = np.asarray([x.shape == "bar" for x in scene.things])
    turn = np.deg2rad(2 * facts.angle[frames])
    values = [
        *(np.moveaxis(facts.position[frames], -1, 0) / world.SIZE - 0.5),
        facts.size[frames] / 32,
        0.25 * np.cos(turn) * bars,
        0.25 * np.sin(turn) * bars,
    ]
    return torch.from_numpy(np.stack(values, -1)).float()


def by_color(scene: Scene, facts: Facts, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
    """States of the actors by first colour, (frames, colours, `STATE`), and whether there is exactly one of each."""
    every = thing_states(facts, scene, frames)
    states = torch.full((len(frames), len(world.COLORS), STATE), float("nan"))
    there = torch.zeros(states.shape[:2])
    for i in scene.actors:
        color = list(world.COLORS).index(scene.things[i].color)
        states[:, color] = every[:, i]
        there[:, color] = torch.from_numpy(facts.count[frames, i] == 1).float()
    return states, there


@dataclass(frozen=True)
class Words:
    """The n words of a batch that name things, and the truth about the named things.

    Attributes:
        b, at: (n,) row and token index of the word.
        acts: (n,) whether the thing is an actor.
        there: (n, pairs) whether it is visible in both frames.
        once: (n, pairs) whether there is exactly one of it.
        states: (n, pairs, 2 frames, `STATE`).
        color: (n, pairs) index of its colour in the second frame.
        half: (n,) half its extent in pixels.
        related: (n, pairs) whether the condition that the question asks about holds.
        last: (n,) whether it is the question's last such word.
    """

    b: Tensor
    at: Tensor
    acts: Tensor
    there: Tensor
    once: Tensor
    states: Tensor
    color: Tensor
    half: Tensor
    related: Tensor
    last: Tensor


def in_pairs(values: np.ndarray, indices: Sequence[int]) -> np.ndarray:
    """Booleans (T, ...) -> (pairs, ...): whether they are true in both frames of a pair."""
    return values[indices[0::2]] & values[indices[1::2]]


def find_words(
    suffix: Tensor,
    color_ids: Tensor,
    prefix: int,
    asked: Sequence[Sequence[Question]],
    scenes: Sequence[Scene],
    facts: Sequence[Facts],
    indices: Sequence[int],
) -> Words:
    """Find the colour words among the token ids of the questions, suffix (B, Q, L), with the truth about each."""
    rows: dict[str, list[Any]] = {name: [] for name in Words.__annotations__}
    is_color = torch.isin(suffix, color_ids)
    for b, (questions, scene, fact) in enumerate(zip(asked, scenes, facts, strict=True)):
        nothing = ((0, 0), (0, 1))  # the entry after the things is for a word that names none of them
        states = F.pad(thing_states(fact, scene, indices), (0, 0, 0, 1), value=torch.nan).unflatten(0, (-1, 2))
        once = torch.from_numpy(in_pairs(np.pad(fact.count == 1, nothing), indices))
        color = torch.from_numpy(np.pad(fact.color[indices[1::2]], nothing, constant_values=NONE))
        halves = [*(reach(x) for x in scene.things), 1.0]
        for q, question in enumerate(questions):
            places = is_color[b, q].nonzero()[:, 0].tolist()
            for k, (place, name) in enumerate(zip(places, question.names, strict=True)):
                i = len(scene.things) if name is None else name
                values = {
                    "b": b,
                    "at": prefix + q * suffix.shape[-1] + place,
                    "acts": i in scene.actors or (name is None and k == 0),
                    "there": states[:, :, i].isfinite().all(-1).all(-1),
                    "once": once[:, i],
                    "states": states[:, :, i].nan_to_num(),
                    "color": color[:, i],
                    "half": halves[i],
                    "related": torch.from_numpy(in_pairs(question.holds, indices)),
                    "last": k == len(places) - 1,
                }
                for field, value in values.items():
                    rows[field].append(value)
    return Words(
        **{
            name: torch.stack(column) if isinstance(column[0], Tensor) else torch.tensor(column)
            for name, column in rows.items()
        }
    )


def coverage(where: Tensor, half: Tensor) -> Tensor:
    """The share (..., cells) of a square in each cell, row by row; centres (..., 2) and half sides (...) in pixels."""
    start = torch.arange(SIDE) * float(world.CELL)
    half = half[..., None, None]
    low = torch.maximum(where[..., None] - half, start)
    high = torch.minimum(where[..., None] + half, start + world.CELL)
    x, y = (high - low).clamp_min(0).unbind(-2)
    area = (y[..., :, None] * x[..., None, :]).flatten(-2)
    return area / area.sum(-1, keepdim=True).clamp_min(1e-6)


class AttentionProbe:
    """Records the input of a layer's attention, from which it computes some of the attention weights."""

    def __init__(self, language: Any, layer: int) -> None:
        self.attention = language.layers[layer].self_attn
        self.hook = self.attention.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.hidden, (self.cos, self.sin) = kwargs["hidden_states"], kwargs["position_embeddings"]

    def log_weights(self, b: Tensor, at: Tensor, prefix: int) -> Tensor:
        """Log attention weights (n, heads, prefix) of token `at` in row `b`, over the video's `prefix` tokens."""
        attention = self.attention
        shape = (-1, attention.head_dim)
        q = attention.q_norm(attention.q_proj(self.hidden[b, at]).unflatten(-1, shape))
        k = attention.k_norm(attention.k_proj(self.hidden[:, :prefix]).unflatten(-1, shape))
        q = _rotate(q, self.cos[b, at], self.sin[b, at])
        k = _rotate(k, self.cos[:, :prefix], self.sin[:, :prefix])
        logits = torch.einsum("nhd,nphd->nhp", q.float(), k.float()[b]) * attention.scaling
        return logits.log_softmax(-1)

    def back(self, visual: Tensor) -> Tensor:
        """Cross-entropy of head `BACK`: every visual token should attend to the first one of its cell."""
        attention, cells = self.attention, SIDE**2
        shape = (-1, attention.head_dim)
        hidden, cos, sin = (x[:, visual] for x in (self.hidden, self.cos, self.sin))
        q = _rotate(attention.q_norm(attention.q_proj(hidden).unflatten(-1, shape)), cos, sin)[:, cells:, BACK]
        k = _rotate(attention.k_norm(attention.k_proj(hidden).unflatten(-1, shape)), cos, sin)[:, :, BACK]
        logits = q.float() @ k.float().transpose(1, 2) * attention.scaling  # (B, later tokens, tokens)
        now = torch.arange(len(visual))
        logits = logits.masked_fill(now[cells:, None] < now, -torch.inf)
        target = (now[cells:] % cells).expand(len(logits), -1)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (..., heads, d) by cos and sin (..., d)."""
    a, b = x.chunk(2, -1)
    return x * cos[..., None, :] + torch.cat((-b, a), -1) * sin[..., None, :]


class Grounding(nn.Module):
    """The losses at the words that name things and at the question marks."""

    def __init__(self, width: int, pairs: int) -> None:
        super().__init__()
        self.pairs = pairs
        self.actor = nn.Linear(width, pairs * 2 * STATE)
        self.color = nn.Linear(width, pairs * (NONE + 1))
        self.place = nn.Linear(width, 2)
        self.once = nn.Linear(width, pairs)
        self.related = nn.Linear(width, pairs)
        self.holds = nn.Linear(width, pairs)

    def forward(
        self,
        probes: tuple[AttentionProbe, AttentionProbe],
        states: list[Tensor],
        visual: Tensor,
        words: Words,
        marks: Tensor,
        holds: Tensor,
        scenery: Tensor,
        changed: Tensor,
        prefix: int,
    ) -> dict[str, Tensor]:
        """The losses by name.

        probes: of `LAYER` and the next layer. states: (B, S, C) after each layer. visual: (pairs * cells,) indices of
        the visual tokens. marks: (B, Q) indices of the question marks. holds: (B, Q, pairs) whether the asked condition
        holds. scenery: (B, Q) whether the question is about all of the scenery. changed: (B, pairs, cells) where the
        scenery has changed. prefix: number of the video's tokens.
        """
        word_probe, mark_probe = probes
        at_word = states[LAYER][words.b, words.at].float()
        later = states[LAYER + 1][words.b, words.at].float()
        where = (words.states[..., :2] + 0.5) * world.SIZE  # (n, pairs, 2 frames, 2)
        cells = coverage(where, words.half[:, None, None].expand(where.shape[:-1])).mean(-2)
        weights = word_probe.log_weights(words.b, words.at, prefix)
        own = self._own(weights, visual)
        first = weights[:, :FIXED][..., torch.cat([visual[: SIDE**2], torch.zeros(1, dtype=torch.long)])]

        acts, still = words.acts, ~words.acts & words.there[:, 0]
        there = (words.there & acts[:, None])[..., None, None]
        state = self.actor(at_word).view_as(words.states)
        color = self.color(at_word).view(-1, self.pairs, NONE + 1)
        place = self.place(at_word) * still[:, None]
        return {
            "actor_look": _attention_loss(own, cells, words.there)[acts].sum() / max(1, len(acts)),
            "fixed_look": _attention_loss(
                first, cells[:, :1].expand(-1, FIXED, -1), words.there[:, :1].expand(-1, FIXED)
            )[~acts].sum()
            / max(1, len(acts)),
            "actor_state": 10 * F.smooth_l1_loss(state * there, words.states * there, beta=0.02),
            "actor_color": F.cross_entropy(color[acts].flatten(0, 1), words.color[acts].flatten()),
            "fixed_place": 10 * F.smooth_l1_loss(place, words.states[:, 0, 0, :2] * still[:, None], beta=0.02),
            "once": 2 * _bce(self.once(later)[acts], words.once[acts]),
            "related": 3 * _bce(self.related(later)[words.last], words.related[words.last]),
            "holds": 3 * _bce(self.holds(states[LAYER + 1].gather(1, _rows(marks, states[0])).float()), holds),
            "look_back": word_probe.back(visual),
            "scenery_look": self._scenery(mark_probe, visual, marks, scenery, changed, prefix),
        }

    def _scenery(
        self, probe: AttentionProbe, visual: Tensor, marks: Tensor, scenery: Tensor, changed: Tensor, prefix: int
    ) -> Tensor:
        """The question mark should attend to the changed cells, one layer after those can tell that they have."""
        b, q = scenery.nonzero(as_tuple=True)
        own = self._own(probe.log_weights(b, marks[b, q], prefix), visual)
        cells = changed[b] / changed[b].sum(-1, keepdim=True).clamp_min(1)
        return _attention_loss(own, cells, changed[b].any(-1)).sum() / max(1, len(b))

    def _own(self, weights: Tensor, visual: Tensor) -> Tensor:
        """Log attention weights (n, pairs, cells + 1) of head p over the cells of pair p, and of the first token."""
        own = weights[:, : self.pairs, visual].unflatten(-1, (self.pairs, -1)).diagonal(dim1=1, dim2=2).transpose(1, 2)
        return torch.cat([own, weights[:, : self.pairs, :1]], -1)


def _rows(at: Tensor, like: Tensor) -> Tensor:
    return at[..., None].expand(-1, -1, like.shape[-1])


def _attention_loss(weights: Tensor, cells: Tensor, there: Tensor) -> Tensor:
    """KL divergence (n,) of log attention (n, heads, cells + 1) from `cells`; from its last entry where not `there`."""
    from_cells = torch.xlogy(cells, cells).sum(-1) - (cells * weights[..., :-1]).sum(-1)
    return torch.where(there, from_cells, -weights[..., -1]).mean(-1)


def _bce(logits: Tensor, truth: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, truth.float())
