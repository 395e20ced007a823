"""Decoder layers whose MLP has experts, of which a token passes some; for all families with such language models."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from vlmteacher.teachers.shared_prefix import LLAMA, Decoder, Keep, repeated


def is_sparse(mlp: Any) -> bool:
    """Whether an MLP has experts, of which a token passes some."""
    return hasattr(mlp, "experts")


def sparse_values(mlp: Any) -> int:
    """The number of values that an MLP with experts keeps of one token in torch's graph.

    Of every expert that it passes: gate and up, act(gate), and the output, whose product with the router's weight needs
    it; the router's logits and probabilities, in float32.
    """
    experts, gate = mlp.experts, mlp.gate
    return gate.top_k * (3 * experts.intermediate_dim + experts.hidden_dim) + 3 * gate.num_experts


def sparse_mlp(x: Tensor, layer: Any) -> Tensor:
    """The residual and an MLP with experts, transformers' own: x (N, C) -> (N, C).

    The choice of experts has no gradient; that of their weights goes through the router. Frozen weights keep nothing.
    """
    h = repeated(layer.post_attention_layernorm, x)
    return x + layer.mlp(h[None])[0]


class SparseDecoder(Decoder):
    """Llama-like layers in which the MLP of some or all has experts."""

    parts: ClassVar = tuple(part for part in Decoder.parts if not part.startswith("mlp."))

    def check(self, language: Any, name: str) -> None:
        if not is_sparse(language.layers[0].mlp):
            LLAMA.check(language, name)
        super().check(language, name)

    def kept(self, layer: Any) -> dict[Keep, int]:
        if not is_sparse(layer.mlp):
            return super().kept(layer)
        values = self.kept_without_mlp(layer)
        return values | {Keep.ALL: values[Keep.ALL] + sparse_values(layer.mlp)}

    def finish(self, x: Tensor, heads: Tensor, layer: Any, keep: Keep) -> Tensor:
        if not is_sparse(layer.mlp):
            return super().finish(x, heads, layer, keep)
        x = x + layer.self_attn.o_proj(heads)
        return sparse_mlp(x, layer) if keep == Keep.ALL else repeated(sparse_mlp, x, layer)
