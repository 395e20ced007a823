"""All questions about one video in one pass of the language model, on the packed chats of `prompt.Layout`.

The tokens that all chats share are read once; each question attends to them and to itself, and its positions continue
where they end. The losses equal those of one pass per question. The decoder layers are the checkpoint's own modules,
run by functions that rely on frozen weights and save little for the backward.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from vlmteacher.errors import InputError
from vlmteacher.ops.attention import attention
from vlmteacher.ops.elementwise import rotate
from vlmteacher.ops.linear import is_plain, linear_backward
from vlmteacher.ops.rms_norm import rms_norm_backward, rms_norm_forward
from vlmteacher.ops.swiglu import swiglu, swiglu_backward
from vlmteacher.teachers.prompt import Layout


class Keep(enum.IntEnum):
    """What a decoder layer keeps for its backward."""

    ALL = 0  # no product is repeated
    ATTENTION = 1  # all but the MLP's part: its first two products are repeated
    INPUT = 2  # the input only: the whole layer is repeated


def _normalized(norm: Any, x: Tensor) -> Tensor:
    return rms_norm_forward(x, norm.weight, norm.variance_epsilon)


def _norm_backward(norm: Any, x: Tensor, grad: Tensor, added: Tensor | None = None) -> Tensor:
    return rms_norm_backward(grad, x, norm.weight, norm.variance_epsilon, added)


def _is_silu(act: nn.Module) -> bool:
    return isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation"


def gated(mlp: Any, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up."""
    return swiglu(gate, up) if _is_silu(mlp.act_fn) else mlp.act_fn(gate) * up


def _gated_backward(mlp: Any, gate: Tensor, up: Tensor, grad: Tensor) -> Sequence[Tensor]:
    if _is_silu(mlp.act_fn):
        return swiglu_backward(grad, gate, up)
    with torch.enable_grad():
        gate, up = (t.detach().requires_grad_() for t in (gate, up))
        return torch.autograd.grad(mlp.act_fn(gate) * up, (gate, up), grad)


def _through(linear: nn.Module, grad: Tensor) -> Tensor:
    """The gradient at the input of a frozen linear layer; other classes, as quantised layers, compute their own."""
    if is_plain(linear):
        return linear_backward(grad, linear.weight)
    with torch.enable_grad():
        x = grad.new_zeros(*grad.shape[:-1], linear.in_features, requires_grad=True)
        return torch.autograd.grad(linear(x), x, grad)[0]


class _Project(torch.autograd.Function):
    """x (N, C) -> rotated queries of `rows` (all, if None), rotated keys and values, each (N, heads, d)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: Any, cos: Tensor, sin: Tensor, rows: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        attn = layer.self_attn
        h = _normalized(layer.input_layernorm, x)
        asking = h if rows is None else h[rows]  # the tokens that need queries
        q, k, v = (
            proj(t).unflatten(-1, (-1, attn.head_dim))
            for proj, t in ((attn.q_proj, asking), (attn.k_proj, h), (attn.v_proj, h))
        )
        ctx.layer, ctx.angles, ctx.rows = layer, (cos, sin), rows
        ctx.has_norm = hasattr(attn, "q_norm")
        ctx.save_for_backward(x, *((q, k) if ctx.has_norm and keep else ()))
        if ctx.has_norm:
            q, k = _normalized(attn.q_norm, q), _normalized(attn.k_norm, k)
        return rotate(q, *_at(rows, cos, sin)), rotate(k, cos, sin), v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        x, *before = ctx.saved_tensors
        attn, (cos, sin), rows = ctx.layer.self_attn, ctx.angles, ctx.rows
        q_cos, q_sin = _at(rows, cos, sin)
        dq, dk = rotate(dq, q_cos, -q_sin), rotate(dk, cos, -sin)
        if ctx.has_norm:
            if not before:
                h = _normalized(ctx.layer.input_layernorm, x)
                before = [attn.q_proj(h if rows is None else h[rows]), attn.k_proj(h)]
                before = [t.unflatten(-1, (-1, attn.head_dim)) for t in before]
            q, k = before
            dq, dk = _norm_backward(attn.q_norm, q, dq), _norm_backward(attn.k_norm, k, dk)
        asked = _through(attn.q_proj, dq.flatten(1))
        grad = _through(attn.k_proj, dk.flatten(1)) + _through(attn.v_proj, dv.flatten(1))
        grad = grad.add_(asked) if rows is None else grad.index_add_(0, rows, asked)
        return _norm_backward(ctx.layer.input_layernorm, x, grad), None, None, None, None, None


def _at(rows: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return (cos, sin) if rows is None else (cos[rows], sin[rows])


class _Finish(torch.autograd.Function):
    """The rest of a decoder layer: x (N, C) and the heads' outputs (N, H * d) -> output projection, residual, MLP."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: Tensor, layer: Any, keep: bool) -> Tensor:
        x = x + layer.self_attn.o_proj(heads)
        h = _normalized(layer.post_attention_layernorm, x)
        gate, up = layer.mlp.gate_proj(h), layer.mlp.up_proj(h)
        ctx.layer = layer
        ctx.save_for_backward(x, *((gate, up) if keep else ()))
        return x + layer.mlp.down_proj(gated(layer.mlp, gate, up))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, *before = ctx.saved_tensors
        layer, mlp = ctx.layer, ctx.layer.mlp
        if not before:
            h = _normalized(layer.post_attention_layernorm, x)
            before = [mlp.gate_proj(h), mlp.up_proj(h)]
        gate, up = before
        d_gate, d_up = _gated_backward(mlp, gate, up, _through(mlp.down_proj, grad))
        dh = _through(mlp.gate_proj, d_gate) + _through(mlp.up_proj, d_up)
        dx = _norm_backward(layer.post_attention_layernorm, x, dh, grad)
        return dx, _through(layer.self_attn.o_proj, dx), None, None


def partly_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (N, H, d), of which the angles (N, 1, r / 2) rotate the first r channels."""
    turned = 2 * cos.shape[-1]
    return torch.cat([rotate(x[..., :turned], cos, sin), x[..., turned:]], -1)


def repeated(function: Callable[..., Any], *arguments: Any) -> Any:
    """The value of a function that keeps its arguments alone for the backward, which computes it again."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class Decoder:
    """Runs the decoder layers of a frozen language model on packed chats; this one those that are like Llama's.

    A family with others overrides the methods. parts: what every layer must have.
    """

    parts: ClassVar[Sequence[str]] = (
        *(f"{norm}.variance_epsilon" for norm in ("input_layernorm", "post_attention_layernorm")),
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
    kinds: ClassVar[Sequence[str]] = ("full_attention",)  # of the config's layer_types

    def check(self, language: Any, name: str) -> None:
        """Raise InputError for a language model with other layers. name: of the model."""
        for part in self.parts:
            value: Any = language.layers[0]
            for step in part.split("."):
                value = getattr(value, step, None)
            if value is None:
                raise InputError(
                    f"teacher {name!r}: its language model has no {part}; only Llama-like decoder layers are supported"
                )
        if set(getattr(language.config, "layer_types", None) or ()) - set(self.kinds):
            raise InputError(f"teacher {name!r}: its language model attends in sliding windows, which is not supported")

    def kept(self, layer: Any) -> dict[Keep, int]:
        """The number of values that a layer keeps of one token, by level."""
        values = self.kept_without_mlp(layer)
        return values | {Keep.ALL: values[Keep.ALL] + 2 * layer.mlp.gate_proj.out_features}

    def kept_without_mlp(self, layer: Any) -> dict[Keep, int]:
        """The same of all but the MLP."""
        attn, hidden = layer.self_attn, len(layer.input_layernorm.weight)
        q, k = (proj.out_features for proj in (attn.q_proj, attn.k_proj))
        attention = 2 * hidden + 2 * q + 2 * k  # x, x + attention; q, output; k, v
        before_norm = q + k if hasattr(attn, "q_norm") else 0
        return {Keep.ALL: attention + before_norm, Keep.ATTENTION: attention, Keep.INPUT: hidden}

    def run(self, x: Tensor, layer: Any, layout: Layout, last: bool, keep: Keep, backend: str | None) -> Tensor:
        """The output of a layer for x (N, C), differentiable; of the last layer for the A places of answers only.

        keep: ALL or ATTENTION; what depends on it is the backward's memory and no bit of a result.
        """
        rows = layout.answers if last else None  # the other outputs of the last layer are not used
        q, k, v = _Project.apply(x, layer, layout.cos, layout.sin, rows, keep == Keep.ALL)
        heads = attention(q[None], k[None], v[None], layout.answers_see if last else layout.sees, backend)
        return self.finish(x if rows is None else x[rows], heads[0].flatten(1), layer, keep)

    def finish(self, x: Tensor, heads: Tensor, layer: Any, keep: Keep) -> Tensor:
        """The rest of a layer after attention: output projection, residual, MLP."""
        return _Finish.apply(x, heads, layer, keep == Keep.ALL)


LLAMA = Decoder()


def kept_bytes(layers: nn.ModuleList, tokens: int, decoder: Decoder = LLAMA) -> dict[Keep, int]:
    """The bytes that decoder layers keep of `tokens` tokens, by level."""
    first: Any = layers[0]
    each = [decoder.kept(layer) for layer in layers]
    size = tokens * first.input_layernorm.weight.element_size()
    return {level: size * sum(values[level] for values in each) for level in Keep}


def keep_level(layers: nn.ModuleList, tokens: int, budget: int, decoder: Decoder = LLAMA) -> Keep:
    """The level that keeps the most of `tokens` tokens within `budget` bytes; `Keep.INPUT` where none does."""
    sizes = kept_bytes(layers, tokens, decoder)
    return next((level for level in Keep if sizes[level] <= budget), Keep.INPUT)


def answer_losses(
    language: Any,
    head: nn.Module,
    layout: Layout,
    video: Tensor,
    deepstack: Sequence[Tensor] = (),
    keep: Keep = Keep.ALL,
    attention_backend: str | None = None,
    decoder: Decoder = LLAMA,
) -> Tensor:
    """-log P(answer) of every question, natural logarithm, (1+M,) float32.

    Args:
        language: a frozen decoder of transformers (`embed_tokens`, `layers`, `norm`); head: its LM head.
        video: (visual tokens, C), the embeddings that replace the placeholders.
        deepstack: (visual tokens, C) each, added to the outputs of the first layers.
        keep: what the layers keep for the backward; changes no bit of the result.
        attention_backend: see `ops.attention`.
        decoder: runs the layers.
    """
    embeds = language.embed_tokens(layout.ids)
    x = embeds.index_copy(0, layout.video, video.to(embeds.dtype))
    for index, layer in enumerate(language.layers):
        last = index + 1 == len(language.layers)
        if keep == Keep.INPUT and x.requires_grad:
            x = repeated(decoder.run, x, layer, layout, last, Keep.ALL, attention_backend)
        else:
            x = decoder.run(x, layer, layout, last, keep, attention_backend)
        if index < len(deepstack) and not last:
            x = x.index_add(0, layout.video, deepstack[index].to(x.dtype))
    logits = head(language.norm(x)).float()
    per_token = F.cross_entropy(logits, layout.targets, reduction="none")
    return per_token.new_zeros(layout.questions).index_add(0, layout.owners, per_token)
