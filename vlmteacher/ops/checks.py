"""Checks of an operator's arguments, the same for every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmteacher.errors import InputError


def expect(name: str, t: Tensor, shape: Sequence[int | None], dtype: torch.dtype, device: torch.device) -> None:
    """Raise InputError unless t has this shape (None: any size), dtype and device."""
    fits = len(t.shape) == len(shape) and all(want in (None, size) for want, size in zip(shape, t.shape, strict=True))
    if not fits or t.dtype != dtype or t.device != device:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(f"{name} must be {dtype} ({sizes}) on {device}, not {t.dtype} {tuple(t.shape)} on {t.device}")
