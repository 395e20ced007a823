"""diffusers' Wan transformer with our operators between its products and attentions; the rest stays diffusers'.

Between two products a block reads and writes its tokens once instead of some ten times. The modulation is computed for
the two timesteps that exist, of a known first frame and of the other frames, instead of for every token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_wan as stock
from torch import Tensor, nn

from vlmteacher.errors import InputError
from vlmteacher.lora.fused_layer import TOLERANCE, linear_group
from vlmteacher.ops.ada_norm import ada_norm, gated_residual, residual_ada_norm
from vlmteacher.ops.qk_norm_rope import qk_norm_rope
from vlmteacher.reasoners.attention import attend
from vlmteacher.reasoners.own_tokens import own_count, own_tokens
from vlmteacher.reasoners.wan.reasoner import by_token

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in float64, diffusers computes a part in float32


class Modulation(NamedTuple):
    """The projected timesteps (B, R, 6, D) of a block's modulation. With R = 2, the first is for the first `first`
    tokens and the second for the rest; with R = 1 it is for all."""

    timesteps: Tensor
    first: int


# The classes below keep diffusers' names: diffusers and PEFT look models up by name and write it into saved configs.


class WanTransformerBlock(stock.WanTransformerBlock):
    """A block of the `WanTransformer3DModel` below; called by diffusers' own model it runs diffusers' own forward."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Any, rotary_emb: Any) -> Tensor:
        if not isinstance(temb, Modulation):
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        x, first = hidden_states, temb.first
        tables = temb.timesteps.permute(2, 0, 1, 3).float() + self.scale_shift_table.permute(1, 0, 2)[:, :, None]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = tables
        eps = self.norm1.eps

        norm = ada_norm(x, 1 + scale, shift, first, eps)
        y = self._attend(self.attn1, norm, None, rotary_emb)
        if isinstance(self.norm2, nn.Identity):
            x = norm = gated_residual(x, y, gate, first)
        else:
            weight, bias = (t.float().expand_as(gate) for t in (self.norm2.weight, self.norm2.bias))
            x, norm = residual_ada_norm(x, y, gate, weight, bias, first, self.norm2.eps)
        y = self._attend(self.attn2, norm, encoder_hidden_states, None)
        x, norm = residual_ada_norm(x, y, None, 1 + ffn_scale, ffn_shift, first, self.norm3.eps)
        return gated_residual(x, self.ffn(norm), ffn_gate, first)

    def _attend(self, attn: Any, x: Tensor, text: Tensor | None, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """`WanAttnProcessor`'s attention, to x itself or to the text."""
        if text is None:
            q, k, v = linear_group([attn.to_q, attn.to_k, attn.to_v], x)
        else:
            q, (k, v) = attn.to_q(x), linear_group([attn.to_k, attn.to_v], text)
        q, k = qk_norm_rope([q, k], [attn.norm_q.weight, attn.norm_k.weight], rope, attn.heads, attn.norm_q.eps)
        q, k, v = (t.unflatten(2, (attn.heads, -1)) for t in (q, k, v))
        y = attend(attn.processor, q, k, v, to_self=text is None)
        return attn.to_out[1](attn.to_out[0](y.flatten(2, 3)))


class WanTransformer3DModel(diffusers.WanTransformer3DModel):
    """diffusers' model, which also takes timesteps (B, 2): of the first latent frame's tokens, and of the others.

    diffusers' own forward runs where the operators do not apply: a timestep per token, an image encoder,
    attention_kwargs, autocast. Where ranks share the tokens, hooks of diffusers split those before the first block and
    put them together after the last.
    """

    takes_two_timesteps = True

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        frames, height, width = (
            size // patch for size, patch in zip(hidden_states.shape[2:], self.config.patch_size, strict=True)
        )
        tokens = frames * height * width
        by_frame = timestep.dim() == 2 and timestep.shape[1] == 2 != tokens
        if (
            (timestep.dim() == 2 and not by_frame)
            or encoder_hidden_states_image is not None
            or attention_kwargs
            or (not hidden_states.is_meta and torch.is_autocast_enabled(hidden_states.device.type))
        ):
            if by_frame:
                timestep = own_tokens(self, by_token(timestep, height * width, tokens), 1)
            given = encoder_hidden_states, encoder_hidden_states_image, return_dict
            return super().forward(hidden_states, timestep, *given, attention_kwargs=attention_kwargs)

        first = own_count(self, height * width if by_frame else 0, tokens)
        cos, sin = self.rope(hidden_states)  # each value twice, for the two channels of a pair
        rope = cos[0, :, 0, ::2].contiguous(), sin[0, :, 0, ::2].contiguous()
        x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        count = 2 if by_frame else 1
        temb, timesteps, text, _ = self.condition_embedder(
            timestep.flatten(), encoder_hidden_states, None, timestep_seq_len=count
        )
        modulation = Modulation(timesteps.unflatten(2, (6, -1)), first)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, text, modulation, rope)
            else:
                x = block(x, text, modulation, rope)

        shift, scale = (self.scale_shift_table.unsqueeze(0) + temb.unsqueeze(2)).float().unbind(2)
        x = self.proj_out(ada_norm(x, 1 + scale, shift, first, self.norm_out.eps))
        x = x.reshape(len(x), frames, height, width, *self.config.patch_size, -1)
        sample = x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _covers(block: nn.Module) -> bool:
    """Whether the operators compute the same as the block's parts."""
    if type(block) is not stock.WanTransformerBlock:
        return False
    attentions, norms = [block.attn1, block.attn2], [block.norm1, block.norm3]
    if not isinstance(block.norm2, nn.Identity):
        norms.append(block.norm2)
    return (
        all(type(norm) is stock.FP32LayerNorm for norm in norms)
        and all(type(norm) is nn.RMSNorm for attn in attentions for norm in (attn.norm_q, attn.norm_k))
        and all(type(attn.processor) is stock.WanAttnProcessor for attn in attentions)
        and all(attn.add_k_proj is None and not attn.fused_projections for attn in attentions)
        and not any(m._forward_hooks or m._forward_pre_hooks for m in (*norms, *attentions))
    )


def _prove(transformer: Any) -> None:
    """Compare a forward and backward of the first block on random tokens with diffusers' own. Raises InputError."""
    block, config = transformer.blocks[0], transformer.config
    device, dtype = transformer.device, transformer.dtype
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    width = config.num_attention_heads * config.attention_head_dim
    patches = [size * patch for size, patch in zip((3, 1, 2), config.patch_size, strict=True)]
    x, text, timesteps, grad = (
        draw(1, 6, width).requires_grad_(),
        draw(1, 5, width),
        draw(1, 2, 6, width),
        draw(1, 6, width),
    )
    cos, sin = transformer.rope(draw(1, 1, *patches))
    rope = tuple(t[0, :, 0, ::2].contiguous() for t in (cos, sin))
    with torch.enable_grad():
        for_ours, for_theirs = (Modulation(timesteps, 2), rope), (by_token(timesteps, 2, 6), (cos, sin))
        ours, theirs = (
            (y.detach(), *torch.autograd.grad(y, x, grad))
            for y in (block.forward(x, text, *each) for each in (for_ours, for_theirs))
        )
    for what, mine, stocks in zip(("output", "dx"), ours, theirs, strict=True):
        difference = float((mine - stocks).float().square().mean().sqrt() / stocks.float().square().mean().sqrt())
        if not difference <= TOLERANCE[dtype]:
            raise InputError(
                f"the fused Wan block's {what} differs from diffusers' by {difference:.1e} (allowed"
                f" {TOLERANCE[dtype]:.0e}, {dtype}): use diffusers' blocks (fused_lora=False)"
            )


def fuse_blocks(transformer: Any) -> bool:
    """Give diffusers' Wan transformer the forward above, in place. Returns False, and does nothing, where it does not
    apply.

    The first block is compared with diffusers' own. Raises InputError where they differ; the transformer is then
    unchanged.
    """
    known = type(transformer) is diffusers.WanTransformer3DModel and transformer.dtype in DTYPES
    if not known or not all(map(_covers, transformer.blocks)):
        return False
    transformer.__class__ = WanTransformer3DModel
    for block in transformer.blocks:
        block.__class__ = WanTransformerBlock
    try:
        if transformer.device.type != "meta":
            _prove(transformer)
    except InputError:
        unfuse_blocks(transformer)
        raise
    return True


def unfuse_blocks(transformer: Any) -> None:
    """Give the transformer diffusers' own forward again, in place."""
    if type(transformer) is WanTransformer3DModel:
        transformer.__class__ = diffusers.WanTransformer3DModel
        for block in transformer.blocks:
            block.__class__ = stock.WanTransformerBlock
