"""Merging a LoRA into the weights of a transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlmteacher.errors import InputError
from vlmteacher.lora.formats.lora import LoRA


@torch.no_grad()
def merge_lora(transformer: nn.Module, lora: LoRA) -> float:
    """Add `lora` to the weights of `transformer`, in float32, rounded to their dtype once.

    Returns the share of the update that the rounding lost: RMS(rounding) / RMS(update), about 0 in float32. Raises
    InputError when it does not fit; the weights are then as they were. Also when a weight did not change by as much as
    scale B A is large, or became infinite; the transformer is then to be loaded again.
    """
    lora = lora.fitted(transformer)

    def weight(name: str) -> Tensor:
        return transformer.get_submodule(name).weight if name in lora.layers else transformer.get_parameter(name)

    names = (*lora.layers, *lora.differences)
    for name in names:
        if not (dtype := weight(name).dtype).is_floating_point or dtype.itemsize < 2:
            raise InputError(
                f"{lora.source} cannot be merged: {name} is quantised ({dtype}): take weights that are not"
            )
    lost = size = 0.0
    for name in names:
        old, layer = weight(name), lora.layers.get(name)
        update = (layer.update() if layer else lora.differences[name].float()).to(old.device).reshape(old.shape)
        before = old.to(torch.float32, copy=True)
        old.copy_(before + update)
        new = weight(name)
        change = new.float() - before
        norm = layer.norm() if layer else float(update.norm())
        _check_merged(lora, name, new, float(change.norm()), norm)
        lost += float((change - update).square().sum())
        size += norm**2
    return math.sqrt(lost / size) if size else 0.0


def _check_merged(lora: LoRA, name: str, weight: Tensor, change: float, norm: float) -> None:
    """Raise InputError where a merged `weight` did not change by `norm`, up to the rounding of its dtype.

    A rounded value is off by at most half its eps, which bounds the norm of all roundings by that of the weight.
    """
    rounding = (torch.finfo(weight.dtype).eps + torch.finfo(torch.float32).eps) * float(weight.float().norm())
    if not (math.isfinite(change) and abs(change - norm) <= rounding + 1e-3 * norm):
        raise InputError(
            f"{lora.source}: {name} changed by {change:.3g} instead of {norm:.3g} ({weight.dtype}): load the model"
            " again, in another dtype"
        )
