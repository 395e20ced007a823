"""Pack the bits of a tensor, eight to a byte."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pack_bits(bits: Tensor) -> Tensor:
    """(..., N) bool -> (..., ceil(N / 8)) uint8: bit n % 8 of byte n // 8."""
    whole = F.pad(bits, (0, -bits.shape[-1] % 8))
    eight = whole.clone(memory_format=torch.contiguous_format).view(torch.int64)
    return ((eight * 0x0102040810204080) >> 56).to(torch.uint8)  # byte n, 0 or 1, lands in bit n of the highest byte


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack_bits`: (..., n) bool."""
    bytes_ = packed.to(torch.int64, memory_format=torch.contiguous_format)
    spread = (bytes_ * 0x0101010101010101) & (0x8040201008040201 - 2**64)
    return spread.view(torch.uint8)[..., :n] != 0
