"""The rotation of rotary position embedding in Triton: one program per token, with all of its heads.

The definition is vlmteacher/ops/elementwise.py. GELU is torch's there: one kernel forward and one backward, which keeps
its input alone, so that there is nothing to gain.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rotate_kernel(
    x, cos, sin, out, tokens, heads, half, of_item, of_token, of_head, sign, HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (channel < half)
    place = token % tokens
    c = tl.load(cos + place * half + channel, mask=channel < half, other=0.0)
    s = tl.load(sin + place * half + channel, mask=channel < half, other=0.0) * sign
    start = x + token // tokens * of_item + place * of_token + head * of_head + channel
    a = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(start + half, mask=inside, other=0.0).to(tl.float32)
    to = out + (token * heads + head) * 2 * half + channel
    tl.store(to, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    tl.store(to + half, (b * c + a * s).to(out.dtype.element_ty), mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """x (B, N, H, d), of any strides, by the angles of cos and sin (N, 1, d / 2) float32; `back`: the other way."""
    items, tokens, heads, channels = x.shape
    if x.stride(3) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        block = triton.next_power_of_2(heads) * triton.next_power_of_2(channels // 2)
        with torch.cuda.device_of(x):
            rotate_kernel[(items * tokens,)](
                x, cos.contiguous(), sin.contiguous(), out, tokens, heads, channels // 2, *x.stride()[:3],
                -1.0 if back else 1.0, HEADS=triton.next_power_of_2(heads),
                BLOCK=triton.next_power_of_2(channels // 2), num_warps=min(max(block // 256, 1), 16),
            )  # fmt: skip
    return out


def examples() -> None:
    """Launch the kernel on tensors without data, for the compile table.

    Queries and keys of Qwen3-VL-4B's layers, heads of its vision tower (strided, 64 channels), and odd sizes.
    """
    for dtype, heads, channels in (
        (torch.bfloat16, 32, 128), (torch.bfloat16, 8, 128), (torch.float32, 16, 64), (torch.bfloat16, 3, 66),
    ):  # fmt: skip
        x = torch.empty(1, 3520, 3 * heads, channels, dtype=dtype, device="meta")
        angles = torch.empty(3520, 1, channels // 2, device="meta")
        rotate(x[:, :, :heads], angles, angles, False)
