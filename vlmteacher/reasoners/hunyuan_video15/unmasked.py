"""diffusers' HunyuanVideo-1.5 transformer without masks, for texts without padding."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from vlmteacher.reasoners.attention import attend


def drop_masks(transformer: Any) -> None:
    """Let a `HunyuanVideo15Transformer3DModel` attend to all of its text tokens, in place; its masks are ignored then.

    The stock model makes a mask of (all tokens)^2 in every block, 2.5 GB for 121 frames of 480p, which is kept for the
    backward. It also moves the padding by boolean indices, whose sizes neither a trace nor a CUDA graph can know.
    """
    transformer.forward = MethodType(_forward, transformer)
    for block in transformer.transformer_blocks:
        block.attn.set_processor(UnmaskedAttention())


def _forward(
    self: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    timestep_r: Tensor | None = None,
    encoder_hidden_states_2: Tensor | None = None,
    encoder_attention_mask_2: Tensor | None = None,
    image_embeds: Tensor | None = None,
    return_dict: bool = False,
) -> tuple[Tensor]:
    """The stock forward for inputs without padding: image, quoted words and prompt, in this order, then the blocks."""
    rotary = self.rope(hidden_states)
    temb = self.time_embed(timestep, timestep_r=timestep_r)
    texts = (
        self.context_embedder(encoder_hidden_states, timestep),
        self.context_embedder_2(encoder_hidden_states_2),
        self.image_embedder(image_embeds),
    )
    text = torch.cat([x + kind for x, kind in zip(texts, self.cond_type_embed.weight, strict=True)][::-1], 1)
    size = [n // p for n, p in zip(hidden_states.shape[2:], self.x_embedder.proj.kernel_size, strict=True)]
    video = self.x_embedder(hidden_states)
    for block in self.transformer_blocks:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            video, text = self._gradient_checkpointing_func(block, video, text, temb, None, rotary)
        else:
            video, text = block(video, text, temb, None, rotary)
    patches = self.proj_out(self.norm_out(video, temb)).unflatten(1, size)  # (B, T, h, w, C p_t p p)
    patches = patches.unflatten(-1, (-1, *self.x_embedder.proj.kernel_size)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return (patches.flatten(6, 7).flatten(4, 5).flatten(2, 3),)


class UnmaskedAttention:
    """The attention processor of the blocks: joint attention of video and text without a mask."""

    _attention_backend = None  # diffusers' `set_attention_backend` sets it
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        from diffusers.models.embeddings import apply_rotary_emb

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1))

        def joint(project: nn.Module, norm: nn.Module, project_text: nn.Module, norm_text: nn.Module) -> Tensor:
            turned = apply_rotary_emb(norm(heads(project(hidden_states))), image_rotary_emb, sequence_dim=1)
            return torch.cat([turned, norm_text(heads(project_text(encoder_hidden_states)))], 1)

        attended = attend(
            self,
            joint(attn.to_q, attn.norm_q, attn.add_q_proj, attn.norm_added_q),
            joint(attn.to_k, attn.norm_k, attn.add_k_proj, attn.norm_added_k),
            torch.cat([heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(encoder_hidden_states))], 1),
        )
        video, text = attended.flatten(2).split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        return attn.to_out[0](video), attn.to_add_out(text)
