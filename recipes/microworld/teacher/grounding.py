"""Training-only supervision of the tiny Teacher at the words of a question that name things, and at its end.

What decides whether so small a model learns to ground words: one layer's heads look from the word to the cells that the
thing named covers: an actor's in each frame pair (one head for each), another's in the first pair, whose first frame is
given and cannot be optimised (to the first token where there is no such thing). After that layer the word's own state
tells where the thing is, how large, how turned and of which colour; one layer later the last of these words and the
question mark tell in which pairs what is asked holds, and the mark of a question about all of the scenery looks to the
cells that have changed. The readouts are thrown away.
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

FIXED = 3  # heads that look from the word of what stays to the first pair; the others are free
BACK = -1  # the head that looks from a cell back to what it was at first, to see whether it has changed
LAYER = 1  # of the language model; DeepStack's features have been added to the visual tokens by then
SIDE = world.SIZE // world.CELL
STATE = 5  # x, y, size, cosine and sine of twice the angle


def thing_states(facts: Facts, scene: Scene, frames: Sequence[int]) -> Tensor:
    """(frames, things, `STATE`), each of order 1; NaN where a thing cannot be made out."""
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
    """The actors by the colour that they had at first: states (frames, colours, `STATE`), and whether there is one."""
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
    """The words of a batch that name things: row b, token index `at`; and what is true of the thing named.

    acts: it is one of the actors. there: (n, pairs) it can be made out in both frames. once: (n, pairs) there is one of
    it. states: (n, pairs, 2 frames, `STATE`). color: (n, pairs) in the second frame. half: (n,) half its extent.
    related: (n, pairs) what its question asks holds. last: (n,) it is the question's last such word.
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
    """(T, ...) booleans -> (pairs, ...): true in both frames of a pair."""
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
    """suffix (B, Q, L) token ids of the questions -> their colour words, each with the truth about what it names."""
    rows: dict[str, list[Any]] = {name: [] for name in Words.__annotations__}
    is_color = torch.isin(suffix, color_ids)
    for b, (questions, scene, fact) in enumerate(zip(asked, scenes, facts, strict=True)):
        nothing = ((0, 0), (0, 1))  # behind the things stands what a word names that names none of them
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
    """Centres (..., 2) in pixels, half sides (...) -> share (..., cells) of each square in each cell, row by row."""
    start = torch.arange(SIDE) * float(world.CELL)
    half = half[..., None, None]
    low = torch.maximum(where[..., None] - half, start)
    high = torch.minimum(where[..., None] + half, start + world.CELL)
    x, y = (high - low).clamp_min(0).unbind(-2)
    area = (y[..., :, None] * x[..., None, :]).flatten(-2)
    return area / area.sum(-1, keepdim=True).clamp_min(1e-6)


class Look:
    """Records what the attention of a layer is given, to compute some of its weights beside it."""

    def __init__(self, language: Any, layer: int) -> None:
        self.attention = language.layers[layer].self_attn
        self.hook = self.attention.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.hidden, (self.cos, self.sin) = kwargs["hidden_states"], kwargs["position_embeddings"]

    def log_weights(self, b: Tensor, at: Tensor, prefix: int) -> Tensor:
        """(n, heads, prefix): log of the attention from token `at` of row `b` to the video's tokens, among these."""
        attention = self.attention
        shape = (-1, attention.head_dim)
        q = attention.q_norm(attention.q_proj(self.hidden[b, at]).unflatten(-1, shape))
        k = attention.k_norm(attention.k_proj(self.hidden[:, :prefix]).unflatten(-1, shape))
        q = _rotate(q, self.cos[b, at], self.sin[b, at])
        k = _rotate(k, self.cos[:, :prefix], self.sin[:, :prefix])
        logits = torch.einsum("nhd,nphd->nhp", q.float(), k.float()[b]) * attention.scaling
        return logits.log_softmax(-1)

    def back(self, visual: Tensor) -> Tensor:
        """Cross-entropy of head `BACK`'s attention, among the visual tokens, from each to the same cell's first."""
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
    """The losses at the naming words and at the question marks."""

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
        looks: tuple[Look, Look],
        states: list[Tensor],
        visual: Tensor,
        words: Words,
        marks: Tensor,
        holds: Tensor,
        scenery: Tensor,
        changed: Tensor,
        prefix: int,
    ) -> dict[str, Tensor]:
        """looks: at `LAYER` and the next; states: (B, S, C) after each; visual (pairs * cells,): indices of the tokens.

        marks (B, Q): token indices of the question marks; holds (B, Q, pairs): whether what is asked holds; scenery
        (B, Q): the question is about all of the scenery; changed (B, pairs, cells): where that is not what it was.
        """
        look, seek = looks
        at_word = states[LAYER][words.b, words.at].float()
        later = states[LAYER + 1][words.b, words.at].float()
        where = (words.states[..., :2] + 0.5) * world.SIZE  # (n, pairs, 2 frames, 2)
        cells = coverage(where, words.half[:, None, None].expand(where.shape[:-1])).mean(-2)
        weights = look.log_weights(words.b, words.at, prefix)
        own = self._own(weights, visual)
        first = weights[:, :FIXED][..., torch.cat([visual[: SIDE**2], torch.zeros(1, dtype=torch.long)])]

        acts, stands = words.acts, ~words.acts & words.there[:, 0]
        there = (words.there & acts[:, None])[..., None, None]
        said = self.actor(at_word).view_as(words.states)
        shown = self.color(at_word).view(-1, self.pairs, NONE + 1)
        placed = self.place(at_word) * stands[:, None]
        return {
            "actor_look": _looking(own, cells, words.there)[acts].sum() / max(1, len(acts)),
            "fixed_look": _looking(first, cells[:, :1].expand(-1, FIXED, -1), words.there[:, :1].expand(-1, FIXED))[
                ~acts
            ].sum()
            / max(1, len(acts)),
            "actor_state": 10 * F.smooth_l1_loss(said * there, words.states * there, beta=0.02),
            "actor_color": F.cross_entropy(shown[acts].flatten(0, 1), words.color[acts].flatten()),
            "fixed_place": 10 * F.smooth_l1_loss(placed, words.states[:, 0, 0, :2] * stands[:, None], beta=0.02),
            "once": 2 * _bce(self.once(later)[acts], words.once[acts]),
            "related": 3 * _bce(self.related(later)[words.last], words.related[words.last]),
            "holds": 3 * _bce(self.holds(states[LAYER + 1].gather(1, _rows(marks, states[0])).float()), holds),
            "look_back": look.back(visual),
            "scenery_look": self._seeking(seek, visual, marks, scenery, changed, prefix),
        }

    def _seeking(
        self, seek: Look, visual: Tensor, marks: Tensor, scenery: Tensor, changed: Tensor, prefix: int
    ) -> Tensor:
        """From the question mark to the cells that have changed, once these know it: one layer later than they do."""
        b, q = scenery.nonzero(as_tuple=True)
        own = self._own(seek.log_weights(b, marks[b, q], prefix), visual)
        cells = changed[b] / changed[b].sum(-1, keepdim=True).clamp_min(1)
        return _looking(own, cells, changed[b].any(-1)).sum() / max(1, len(b))

    def _own(self, weights: Tensor, visual: Tensor) -> Tensor:
        """(n, pairs, cells + 1): log attention of head p to the cells of pair p, and to the first token."""
        own = weights[:, : self.pairs, visual].unflatten(-1, (self.pairs, -1)).diagonal(dim1=1, dim2=2).transpose(1, 2)
        return torch.cat([own, weights[:, : self.pairs, :1]], -1)


def _rows(at: Tensor, like: Tensor) -> Tensor:
    return at[..., None].expand(-1, -1, like.shape[-1])


def _looking(weights: Tensor, cells: Tensor, there: Tensor) -> Tensor:
    """(n,) divergence of attention (n, heads, cells + 1) from `cells`, or from the last where not `there`."""
    from_cells = torch.xlogy(cells, cells).sum(-1) - (cells * weights[..., :-1]).sum(-1)
    return torch.where(there, from_cells, -weights[..., -1]).mean(-1)


def _bce(logits: Tensor, truth: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, truth.float())
