"""The surrogate decoder's convolutions on CPUs: our C++ kernels, and the vendor's between two passes of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmteacher.ops.processors import in_use
from vlmteacher.torch_modes import keepable


class Cpp:
    """The C++ backend. It takes packed weights, which are cached on the frozen weight."""

    @staticmethod
    def conv3x3(x: Tensor, taps: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        packed = _packed(weight, taps.shape[1], rest[-1], False)
        return torch.ops.vlmteacher_cpp.conv3x3(x, taps, packed, weight.shape[0], *rest)

    @staticmethod
    def conv3x3_backward(grad: Tensor, signs: Tensor, taps: Tensor, frames: int, weight: Tensor, *rest: Any) -> Tensor:
        packed = _packed(weight, taps.shape[1], rest[-1], True)
        channels = weight.shape[-1] // taps.shape[1]
        return torch.ops.vlmteacher_cpp.conv3x3_backward(grad, signs, taps, frames, packed, channels, *rest)


class Vendor:
    """The vendor's convolutions, channels last, between two passes of ours: for bfloat16 on processors with AMX.

    The backward is a convolution of the gradients that read a frame, with the weight reversed; of an upsampled image it
    has 4x4 taps and stride 2.
    """

    @staticmethod
    def conv3x3(
        x: Tensor, taps: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, rows: Tensor | None,
        slope: float | None, upscale: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        cpp = torch.ops.vlmteacher_cpp
        inputs = cpp.conv3x3_gather(x, taps, None, 0.0, upscale).permute(0, 3, 1, 2)
        y = F.conv2d(inputs, weight.permute(0, 3, 1, 2), bias, padding=1).permute(0, 2, 3, 1).contiguous()
        return y, cpp.conv3x3_finish(y, residual, rows, None, slope, True)

    @staticmethod
    def conv3x3_backward(
        grad: Tensor, signs: Tensor, taps: Tensor, frames: int, weight: Tensor, residual: Tensor | None,
        residual_signs: Tensor | None, slope: float | None, upscale: int,
    ) -> Tensor:  # fmt: skip
        cpp = torch.ops.vlmteacher_cpp
        readers = cpp.conv3x3_readers(taps, frames)
        masks = (None, 0.0) if slope is None else (signs, slope)
        inputs = cpp.conv3x3_gather(grad, readers, *masks, 1).permute(0, 3, 1, 2)
        turned = _cached(weight, ("reversed", taps.shape[1], upscale), _reversed)
        dx = F.conv2d(inputs, turned, None, stride=upscale, padding=1).permute(0, 2, 3, 1).contiguous()
        if residual is not None:
            more_signs = None if slope is None else residual_signs
            cpp.conv3x3_finish(dx, residual, readers[:, 0].contiguous(), more_signs, slope, False)
        return dx


def _reversed(weight: Tensor, _: str, sources: int, upscale: int) -> Tensor:
    """The weight (C, T * N, k, k) of the gradient's convolution."""
    parts = weight.float().chunk(sources, -1)
    turned = torch.cat([part.permute(3, 0, 1, 2) for part in parts], 1).flip(2, 3)
    if upscale == 2:
        turned = sum(F.pad(turned, (b, 1 - b, a, 1 - a)) for a in (0, 1) for b in (0, 1))
    return turned.to(weight.dtype).contiguous(memory_format=torch.channels_last)


def _packed(weight: Tensor, *options: Any) -> Tensor:
    return _cached(
        weight, (in_use(), *options), lambda weight, _, *rest: torch.ops.vlmteacher_cpp.conv3x3_pack(weight, *rest)
    )


@keepable()
def _cached(weight: Tensor, key: tuple[Any, ...], make: Callable[..., Tensor]) -> Tensor:
    """make(weight, *key), kept on the frozen weight."""
    cache: dict[Any, Tensor] = weight.__dict__.setdefault("packed", {})
    whole = (*key, weight._version)
    if whole not in cache:
        for old in [k for k in cache if k[-1] != weight._version]:
            del cache[old]
        cache[whole] = make(weight, *key)
    return cache[whole]
