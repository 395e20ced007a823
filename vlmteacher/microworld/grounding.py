"""Training-only supervision of the tiny Teacher at the words of a question that name the ball and the box.

What decides whether so small a model learns to ground words: one layer's heads look from the word to the cells that the
thing named covers, the ball's in each frame pair (one head for each), the box's in the first pair, whose first frame is
given and cannot be optimised (to the first token where it is not there); after that layer the word's own state tells
where it is, and one layer later whether the ball is in that box. The readouts are thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmteacher.microworld import world
from vlmteacher.microworld.scene import Scene

FIXED = 3  # heads that look from the box's word to the first pair; the others are free
BACK = -1  # the head that looks from a cell back to what it was at first, to see whether it has changed
LAYER = 1  # of the language model; DeepStack's features have been added to the visual tokens by then
SIDE = world.SIZE // world.CELL


@dataclass(frozen=True)
class Words:
    """The naming words of a batch: row b, token index `at`, color named. All (n,)."""

    b: Tensor
    at: Tensor
    color: Tensor


def find_words(suffix: Tensor, color_ids: Tensor, prefix: int) -> tuple[Words, Words]:
    """suffix (B, Q, L) token ids of the questions -> their ball words (first colour) and box words (second colour)."""
    match = suffix[..., None] == color_ids  # (B, Q, L, colours)
    order = match.any(-1).cumsum(-1)
    named = match.float().argmax(-1)
    found = []
    for place in (1, 2):
        b, q, at = (match.any(-1) & (order == place)).nonzero(as_tuple=True)
        found.append(Words(b, prefix + q * suffix.shape[-1] + at, named[b, q, at]))
    return found[0], found[1]


def coverage(where: Tensor, half: float) -> Tensor:
    """Centres (..., 2) in pixels -> share (..., cells) of a square of that half side in each cell, row by row."""
    start = torch.arange(SIDE) * float(world.CELL)
    low = torch.maximum(where[..., None] - half, start)
    high = torch.minimum(where[..., None] + half, start + world.CELL)
    x, y = (high - low).clamp_min(0).unbind(-2)
    area = (y[..., :, None] * x[..., None, :]).flatten(-2)
    return area / area.sum(-1, keepdim=True).clamp_min(1e-6)


def box_centres(scenes: Sequence[Scene]) -> Tensor:
    """(B, colours, 2): where the box of each colour stands, NaN where there is none."""
    centres = torch.full((len(scenes), len(world.COLORS), 2), float("nan"))
    for row, scene in zip(centres, scenes, strict=True):
        for box in scene.boxes:
            row[list(world.COLORS).index(box.color)] = torch.tensor([box.x, box.y])
    return centres


class Look:
    """Records what `LAYER`'s attention is given, to compute some of its weights beside it."""

    def __init__(self, language: Any) -> None:
        self.attention = language.layers[LAYER].self_attn
        self.hook = self.attention.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.hidden, (self.cos, self.sin) = kwargs["hidden_states"], kwargs["position_embeddings"]

    def log_weights(self, words: Words, prefix: int) -> Tensor:
        """(n, heads, prefix): log of the attention from each word to the video's tokens, among these."""
        attention = self.attention
        shape = (-1, attention.head_dim)
        q = attention.q_norm(attention.q_proj(self.hidden[words.b, words.at]).unflatten(-1, shape))
        k = attention.k_norm(attention.k_proj(self.hidden[:, :prefix]).unflatten(-1, shape))
        q = _rotate(q, self.cos[words.b, words.at], self.sin[words.b, words.at])
        k = _rotate(k, self.cos[:, :prefix], self.sin[:, :prefix])
        logits = torch.einsum("nhd,nphd->nhp", q.float(), k.float()[words.b]) * attention.scaling
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
    """The losses at the naming words; `told` as from ``train_teacher.pair_truth``."""

    def __init__(self, width: int, pairs: int) -> None:
        super().__init__()
        self.pairs = pairs
        self.ball_place = nn.Linear(width, 4 * pairs)
        self.box_place = nn.Linear(width, 2)
        self.ball_there = nn.Linear(width, pairs)
        self.ball_inside = nn.Linear(width, pairs)

    def forward(
        self,
        look: Look,
        states: list[Tensor],
        visual: Tensor,
        words: tuple[Words, Words],
        told: dict[str, Tensor],
        centres: Tensor,
        prefix: int,
    ) -> dict[str, Tensor]:
        """states: (B, S, C) after each layer; visual (pairs * cells,): the visual tokens' indices."""
        ball, box = words
        placed, related = states[LAYER], states[LAYER + 1]

        color = told["color"][ball.b]  # (n, pairs)
        where = told["position"][ball.b].unflatten(-1, (2, 2))  # (n, pairs, 2 frames, 2)
        there = (color == ball.color[:, None]) & where.isfinite().all(-1).all(-1)
        cells = coverage(where.nan_to_num(), world.RADIUS).mean(-2)
        at = (where.nan_to_num() / world.SIZE - 0.5).flatten(-2)
        said = self.ball_place(placed[ball.b, ball.at].float()).unflatten(-1, (self.pairs, 4))
        once = there & (told["count_a"][ball.b] == 1) & (told["count_b"][ball.b] == 1)
        losses = {
            "ball_look": _looking(self._own(look, ball, visual, prefix), cells, there),
            "ball_place": 10 * F.smooth_l1_loss(said * there[..., None], at * there[..., None], beta=0.02),
            "ball_word": 3 * _bce(self.ball_there(related[ball.b, ball.at].float()), once),
        }

        centre = centres[box.b, box.color]  # (n, 2)
        stands = centre.isfinite().all(-1)
        cells = coverage(centre.nan_to_num(), world.BOX_HALF)[:, None].expand(-1, FIXED, -1)
        at = (centre.nan_to_num() / world.SIZE - 0.5) * stands[:, None]
        said = self.box_place(placed[box.b, box.at].float()) * stands[:, None]
        inside = told["inside_b"][box.b] == box.color[:, None]
        first = look.log_weights(box, prefix)[:, :FIXED]
        first = first[..., torch.cat([visual[: SIDE**2], torch.zeros(1, dtype=torch.long)])]
        losses |= {
            "box_look": _looking(first, cells, stands[:, None].expand(-1, FIXED)),
            "box_place": 10 * F.smooth_l1_loss(said, at, beta=0.02),
            "box_word": 3 * _bce(self.ball_inside(related[box.b, box.at].float()), inside),
        }
        return losses | {"look_back": look.back(visual)}

    def _own(self, look: Look, words: Words, visual: Tensor, prefix: int) -> Tensor:
        """(n, pairs, cells + 1): log attention of head p to the cells of pair p, and to the first token."""
        weights = look.log_weights(words, prefix)[:, : self.pairs]
        own = weights[..., visual].unflatten(-1, (self.pairs, -1)).diagonal(dim1=1, dim2=2).transpose(1, 2)
        return torch.cat([own, weights[..., :1]], -1)


def _looking(weights: Tensor, cells: Tensor, there: Tensor) -> Tensor:
    """Cross-entropy of attention (n, heads, cells + 1) against `cells`, or against the last where not `there`."""
    return 0.5 * torch.where(there, -(cells * weights[..., :-1]).sum(-1), -weights[..., -1]).mean()


def _bce(logits: Tensor, truth: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, truth.float())
