"""Attention of diffusers' HunyuanVideo blocks without masks, for texts without padding, by our own operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmteacher.reasoners.attention import attend
from vlmteacher.reasoners.hunyuan_video15.unmasked import UnmaskedAttention


def drop_masks(transformer: Any) -> None:
    """Let the blocks of a `HunyuanVideoTransformer3DModel` attend to all tokens, in place; masks are ignored then.

    A mask, even of ones, keeps torch from its fastest attention.
    """
    for block in transformer.transformer_blocks:
        block.attn.set_processor(UnmaskedAttention())
    for block in transformer.single_transformer_blocks:
        block.attn.set_processor(SingleStreamAttention())


class SingleStreamAttention:
    """The attention processor of the single-stream blocks, where one set of layers serves video and text."""

    _attention_backend = None  # diffusers' `set_attention_backend` sets it
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        from diffusers.models.embeddings import apply_rotary_emb

        tokens = hidden_states.shape[1]
        joint = torch.cat([hidden_states, encoder_hidden_states], 1)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1))

        def turned(project: nn.Module, norm: nn.Module) -> Tensor:
            x = norm(heads(project(joint)))
            return torch.cat([apply_rotary_emb(x[:, :tokens], image_rotary_emb, sequence_dim=1), x[:, tokens:]], 1)

        attended = attend(self, turned(attn.to_q, attn.norm_q), turned(attn.to_k, attn.norm_k), heads(attn.to_v(joint)))
        video, text = attended.flatten(2).tensor_split([tokens], 1)
        return video, text
