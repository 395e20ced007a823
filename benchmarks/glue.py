"""The parts of a Wan block between its products, forward + backward, against diffusers' own; and the whole block.

    python -m benchmarks.glue [--json] [--dtype float32]

The operators' stock side is given its tables, copied for every token, for nothing; in the block it adds them up, as
diffusers does in each one. Both blocks have our LoRA layers, so that the rest of the block is what differs. The
`memory_ratio` is of the bytes that autograd keeps.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from benchmarks.memory import saved_bytes
from benchmarks.timing import arguments, compare, publish
from vlmteacher.checkpoints.pretrained import cast
from vlmteacher.lora.adapter import add_lora, lora_parameters
from vlmteacher.ops.ada_norm import ada_norm, gated_residual, residual_ada_norm
from vlmteacher.ops.qk_norm_rope import qk_norm_rope
from vlmteacher.reasoners.wan.blocks import Modulation, unfuse_blocks
from vlmteacher.reasoners.wan.reasoner import by_token

# case, latent frames, height and width in tokens, heads, their channels, hidden channels, the text's tokens
SIZES = [
    ("microworld", (4, 4, 4), 4, 64, 768, 64),
    ("mid", (9, 12, 12), 8, 64, 2048, 512),
    ("Wan 5B, few tokens", (3, 12, 12), 24, 128, 14336, 512),
]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation inside `WanAttnProcessor`, whose function cannot be called from outside."""
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(x)


class Case(NamedTuple):
    ours: Callable[[], Any]
    stock: Callable[[], Any]
    wanted: Sequence[Tensor]  # what ours is differentiated by
    stock_wanted: Sequence[Tensor]
    weights: Sequence[Tensor] = ()


def cases(size: tuple[Any, ...], dtype: torch.dtype, device: str) -> dict[str, Case]:
    """The parts of a block of that size, and the block."""
    _, grid, heads, channels, hidden, text_tokens = size
    tokens, first, width = grid[0] * grid[1] * grid[2], grid[1] * grid[2], heads * channels
    stock: Any = WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=channels, in_channels=16, out_channels=16, text_dim=64,
        freq_dim=64, ffn_dim=hidden, num_layers=1, rope_max_seq_len=64,
    )  # fmt: skip
    stock = cast(stock.requires_grad_(False), dtype).to(device)
    fused = copy.deepcopy(stock)
    for network in (stock, fused):
        add_lora(network, 16, seed=0)
    unfuse_blocks(stock)
    block, stock_block = fused.blocks[0], stock.blocks[0]
    norm, attention = stock_block.norm3, stock_block.attn1

    x, y, q, k = (torch.randn(1, tokens, width, device=device).to(dtype).requires_grad_() for _ in range(4))
    text = torch.randn(1, text_tokens, width, device=device).to(dtype)
    timesteps = torch.randn(1, 2, 6, width, device=device).to(dtype)
    shift, scale, gate = torch.randn(3, 1, 2, width, device=device)
    shifts, scales, gates, each_timestep = (by_token(t, first, tokens) for t in (shift, scale, gate, timesteps))
    cos, sin = stock.rope(torch.empty(1, 16, grid[0], 2 * grid[1], 2 * grid[2], device=device))
    rope = cos[0, :, 0, ::2].contiguous(), sin[0, :, 0, ::2].contiguous()
    norms = [attention.norm_q, attention.norm_k]

    def stock_residual() -> Tensor:
        return (x.float() + y * gates).type_as(x)

    def stock_norm(x: Tensor) -> Tensor:
        return (norm(x.float()) * (1 + scales) + shifts).type_as(x)

    def stock_both() -> tuple[Tensor, Tensor]:
        out = stock_residual()
        return out, stock_norm(out)

    def stock_attention() -> list[Tensor]:
        return [turned(of(t).unflatten(2, (heads, -1)), cos, sin) for of, t in zip(norms, (q, k), strict=True)]

    def ours_attention() -> list[Tensor]:
        ys = qk_norm_rope([q, k], [of.weight for of in norms], rope, heads, attention.norm_q.eps)
        return [t.unflatten(2, (heads, -1)) for t in ys]

    def trained(network: Any) -> list[Tensor]:
        return [x, *lora_parameters(network)]

    return {
        "LayerNorm, modulation": Case(lambda: ada_norm(x, 1 + scale, shift, first), lambda: stock_norm(x), [x], [x]),
        "gated residual": Case(lambda: gated_residual(x, y, gate, first), stock_residual, [x, y], [x, y]),
        "the two": Case(lambda: residual_ada_norm(x, y, gate, 1 + scale, shift, first), stock_both, [x, y], [x, y]),
        "q, k: norm, RoPE": Case(ours_attention, stock_attention, [q, k], [q, k]),
        "block": Case(
            lambda: block(x, text, Modulation(timesteps, first), rope),
            lambda: stock_block(x, text, each_timestep, (cos, sin)),
            trained(fused),
            trained(stock),
            [*fused.parameters(), *stock.parameters()],
        ),
    }


def both(forward: Callable[[], Any], wanted: Sequence[Tensor]) -> Callable[[], object]:
    made = forward()
    made = [made] if isinstance(made, Tensor) else list(made)
    grads = [torch.randn_like(t) for t in made]

    def run() -> object:
        made = forward()
        return torch.autograd.grad([made] if isinstance(made, Tensor) else list(made), wanted, grads)

    return run


def suite_case(name: str, side: str) -> Callable[[], object]:
    """Forward + backward of one part of the packaged Reasoner's block, by ours or by diffusers' expression."""
    case = cases(SIZES[0], torch.bfloat16, "cpu")[name]
    return both(case.ours, case.wanted) if side == "ours" else both(case.stock, case.stock_wanted)


PARTS = ("LayerNorm, modulation", "gated residual", "the two", "q, k: norm, RoPE")
SUITE = {name: functools.partial(suite_case, name) for name in PARTS}


def main() -> None:
    settings = arguments(__doc__ or "", "bfloat16")
    torch.manual_seed(0)
    rows = []
    for size in SIZES:
        for name, case in cases(size, getattr(torch, settings.dtype), settings.device).items():
            run, stock = both(case.ours, case.wanted), both(case.stock, case.stock_wanted)
            row = compare(f"{size[0]}: {name}", run, stock, settings.pairs, settings.device)
            saved, stock_saved = (saved_bytes(f, case.weights)[0] for f in (case.ours, case.stock))
            rows.append(row | {"memory_ratio": saved / stock_saved, "saved_bytes": saved, "stock_bytes": stock_saved})
    publish("glue", settings, rows)


if __name__ == "__main__":
    main()
