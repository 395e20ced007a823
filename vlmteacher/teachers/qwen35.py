"""Qwen3.5, dense and with experts, as the Teacher, on transformers' own `Qwen3_5ForConditionalGeneration`.

Most of its decoder layers mix tokens by the gated delta rule: a convolution over the last few tokens, and a state that
every token changes. Where the questions share a prefix, that state and the prefix's last tokens are computed once, and
each question continues from them; the other layers attend as those of Qwen3-VL do.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmteacher.ops.attention import attention
from vlmteacher.teachers.experts import is_sparse, sparse_mlp, sparse_values
from vlmteacher.teachers.prompt import Layout
from vlmteacher.teachers.qwen_vl import QwenVLTeacher
from vlmteacher.teachers.shared_prefix import Decoder, Keep, gated, partly_rotated, repeated


def _rotated(x: Tensor, norm: Any, cos: Tensor, sin: Tensor) -> Tensor:
    """Normalised heads (N, H, d), of which the angles rotate the first channels."""
    return partly_rotated(norm(x), cos, sin)


def _gated(heads: Tensor, gate: Tensor) -> Tensor:
    return (heads * gate.sigmoid()).flatten(1)


def _attend(h: Tensor, attn: Any, layout: Layout, rows: Tensor | None, backend: str | None) -> Tensor:
    """Softmax attention of h (N, C), its output gated: (N, C), or of `rows` only."""
    sees, cos, sin = layout.sees, layout.cos, layout.sin
    queries = attn.q_proj(h if rows is None else h[rows]).unflatten(-1, (-1, 2 * attn.head_dim))
    k, v = (proj(h).unflatten(-1, (-1, attn.head_dim)) for proj in (attn.k_proj, attn.v_proj))
    k = repeated(_rotated, k, attn.k_norm, cos, sin)
    if rows is not None:
        sees, cos, sin = layout.answers_see, cos[rows], sin[rows]
    q, gate = queries.chunk(2, -1)
    q = repeated(_rotated, q, attn.q_norm, cos, sin)
    heads = attention(q[None], k[None], v[None], sees, backend)[0]
    return attn.o_proj(repeated(_gated, heads, gate))


def _recur(h: Tensor, net: Any, layout: Layout, rows: Tensor | None) -> Tensor:
    """The gated delta rule on h (N, C): (N, C), or of `rows` only."""
    parts = (proj(h) for proj in (net.in_proj_qkv, net.in_proj_z, net.in_proj_b, net.in_proj_a))
    return net.out_proj(repeated(_delta_rule, *parts, net, layout, rows))


def _delta_rule(qkv: Tensor, z: Tensor, b: Tensor, a: Tensor, net: Any, layout: Layout, rows: Tensor | None) -> Tensor:
    """Convolution, delta rule and gated norm of projected tokens (N, values): (N, value heads * d), or of `rows`.

    The rule is transformers' own, with the kernels of the package fla where that is installed.
    """
    stock = sys.modules[type(net).__module__]
    beta, decay = b.sigmoid(), -net.A_log.float().exp() * F.softplus(a.float() + net.dt_bias)

    def run(tokens: Tensor, before: int, beta: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs (B, n, heads, d) of tokens (B, before + n, values), and the state after them."""
        kernel = net.conv1d.weight.squeeze(1), net.conv1d.bias
        mixed = stock.causal_conv1d_fn(tokens.transpose(1, 2), *kernel, activation=net.activation).transpose(1, 2)
        heads = mixed[:, before:].split([net.key_dim, net.key_dim, net.value_dim], -1)
        q, k, v = (
            x.unflatten(-1, (-1, d)) for x, d in zip(heads, 2 * [net.head_k_dim] + [net.head_v_dim], strict=True)
        )
        return stock.torch_chunk_gated_delta_rule(
            q, k, v, decay, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )

    prefix, ends = layout.prefix, (*layout.starts[1:], layout.tokens)
    output, state = run(qkv[None, :prefix], 0, beta[None, :prefix], decay[None, :prefix], None)
    outputs = [output[0]]
    if layout.tokens > prefix:  # the questions are a batch, padded at its end, where nothing is read
        lengths = [end - start for start, end in zip(layout.starts, ends, strict=True)]
        last = qkv[max(0, prefix - net.conv_kernel_size + 1) : prefix]
        tokens = pad_sequence([torch.cat([last, own]) for own in qkv[prefix:].split(lengths)], batch_first=True)
        beta, decay = (pad_sequence(x[prefix:].split(lengths), batch_first=True) for x in (beta, decay))
        output, _ = run(tokens, len(last), beta, decay, state.repeat(len(lengths), 1, 1, 1))
        outputs += [own[:length] for own, length in zip(output, lengths, strict=True)]
    mixed, z = torch.cat(outputs), z.unflatten(-1, (-1, net.head_v_dim))
    if rows is not None:
        mixed, z = mixed[rows], z[rows]
    return net.norm(mixed.flatten(0, 1), z.flatten(0, 1)).view(len(mixed), -1)


def _mlp(x: Tensor, layer: Any) -> Tensor:
    """The residual and the MLP, x (N, C) -> (N, C)."""
    if is_sparse(layer.mlp):
        return sparse_mlp(x, layer)
    h, mlp = repeated(layer.post_attention_layernorm, x), layer.mlp
    return x + mlp.down_proj(repeated(gated, mlp, mlp.gate_proj(h), mlp.up_proj(h)))


class HybridDecoder(Decoder):
    """Layers that attend, or recur by the gated delta rule; their MLP is dense or has experts.

    Products by frozen weights keep nothing of their input; norms, rotations, gates and the delta rule are repeated in
    the backward from what the products gave them.
    """

    parts: ClassVar = ("input_layernorm.eps", "post_attention_layernorm.eps", "mlp")
    kinds: ClassVar = ("full_attention", "linear_attention")

    def kept(self, layer: Any) -> dict[Keep, int]:
        hidden, mlp = len(layer.input_layernorm.weight), layer.mlp
        if hasattr(layer, "linear_attn"):
            net = layer.linear_attn
            mixer = net.conv_dim + net.value_dim + 2 * net.num_v_heads
        else:
            attn = layer.self_attn
            q, k = attn.q_proj.out_features // 2, attn.k_proj.out_features
            mixer = 4 * q + 3 * k  # q before and after norm and rotation, gate, output; k twice, v
        values = 2 * hidden + mixer
        more = sparse_values(mlp) + hidden if is_sparse(mlp) else 2 * mlp.gate_proj.out_features
        if hasattr(mlp, "shared_expert"):  # gate and up, act(gate); its output, whose weight needs it
            more += 3 * mlp.shared_expert.intermediate_size + hidden
        return {Keep.ALL: values + more, Keep.ATTENTION: values, Keep.INPUT: hidden}

    def run(self, x: Tensor, layer: Any, layout: Layout, last: bool, keep: Keep, backend: str | None) -> Tensor:
        rows = layout.answers if last else None
        h = repeated(layer.input_layernorm, x)
        if hasattr(layer, "linear_attn"):
            mixed = _recur(h, layer.linear_attn, layout, rows)
        else:
            mixed = _attend(h, layer.self_attn, layout, rows, backend)
        x = (x if rows is None else x[rows]) + mixed
        return _mlp(x, layer) if keep == Keep.ALL else repeated(_mlp, x, layer)


class Qwen35Teacher(QwenVLTeacher):
    """A frozen Qwen3.5. Its prompts are Qwen3-VL's, and so is its vision tower, without DeepStack."""

    architecture = "Qwen3_5ForConditionalGeneration"
    decoder = HybridDecoder()


class Qwen35MoeTeacher(Qwen35Teacher):
    """A frozen Qwen3.5 with experts."""

    architecture = "Qwen3_5MoeForConditionalGeneration"
