"""The banded matrices of torch's antialiased bicubic interpolation: resizing maps frames X to Y X Z^T.

The two matrices depend on the sizes alone; the gradient is the same map with their transposes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlmteacher.torch_modes import keepable


class Band(NamedTuple):
    """The rows of a banded matrix: row i has `weight[i]` at columns start[i], start[i] + 1, ..., zeros elsewhere.

    start: (rows,) int32, ascending; weight: (rows, taps). start[i] + taps is at most the number of columns.
    """

    start: Tensor
    weight: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Band:
        """The band of a dense matrix."""
        columns = matrix.shape[1]
        present = matrix != 0
        first = present.int().argmax(1).where(present.any(1), columns - 1)
        last = columns - 1 - present.flip(1).int().argmax(1)
        last = last.where(present.any(1), 0)
        first, last = first.flip(0).cummin(0).values.flip(0), last.cummax(0).values  # a weight within may be zero
        taps = int((last - first).max()) + 1
        start = first.clamp(max=columns - taps)
        return cls(start.int(), matrix.gather(1, start[:, None] + torch.arange(taps, device=matrix.device)))


def resize_matrix(size_in: int, size_out: int) -> Tensor:
    """The (size_out, size_in) float64 matrix by which torch's antialiased bicubic interpolation maps one axis.

    Its weights are the cubic with a = -0.5 of the distance, in output pixels if the axis shrinks, in input pixels if it
    grows; each row sums to one, at the borders too. Source: `HelperInterpBase` and `HelperInterpCubic` in torch's
    aten/src/ATen/native/cpu/UpSampleKernel.cpp (align_corners=False).
    """
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    to, of = (torch.arange(n, dtype=torch.float64, device="cpu") + 0.5 for n in (size_out, size_in))
    x = (of - scale * to[:, None]).abs() / stretch
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)).where(x < 2, 0.0)
    return weight / weight.sum(1, keepdim=True)


@functools.lru_cache(maxsize=64)
@keepable()
def _bands(size_in: int, size_out: int, backward: bool, dtype: torch.dtype, device: torch.device) -> Band:
    matrix = resize_matrix(size_in, size_out)
    start, weight = Band.of(matrix.T if backward else matrix)
    return Band(start.to(device), weight.to(device, dtype))


def resize_bands(x: Tensor, size_in: Sequence[int], size_out: Sequence[int], backward: bool) -> list[Tensor]:
    """The tables that a backend resizes by: start and weight of the vertical band, then of the horizontal one.

    Empty if the sizes are equal. On x's device; float64 if x is, else float32. backward: of the transposed matrices.
    """
    if list(size_in) == list(size_out):
        return []
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [t for a, b in zip(size_in, size_out, strict=True) for t in _bands(a, b, backward, dtype, x.device)]
