"""Merging a LoRA into the weights of a transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlmteacher.checkpoints.quantized import is_quantized
from vlmteacher.errors import InputError
from vlmteacher.lora.formats.lora import LoRA


@torch.no_grad()
def merge_lora(transformer: nn.Module, lora: LoRA) -> float:
    """Add `lora` to the weights of `transformer`, computed in float32 and rounded to their dtype once.

    Returns the share of the update that is lost by rounding: RMS(rounding) / RMS(update), about 0 in float32. Raises
    InputError for a LoRA that does not fit or quantised weights, before any weight changes; and for a weight whose
    change is not of the norm of the update, after which the transformer must be loaded again.
    """
    lora = lora.fitted(transformer)

    def weight(name: str) -> Tensor:
        return transformer.get_submodule(name).weight if name in lora.layers else transformer.get_parameter(name)

    names = (*lora.layers, *lora.differences)
    for name in names:
        dtype = weight(name).dtype
        packed = name in lora.layers and is_quantized(transformer.get_submodule(name))
        if packed or not dtype.is_floating_point or dtype.itemsize < 2:
            raise InputError(
                f"{lora.source} cannot be merged: {name} is quantised ({dtype}): give weights that are not"
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
    """Raise InputError unless the `change` of a merged `weight` is `norm`, up to the rounding of its dtype.

    Rounding changes a value by at most half its eps, so the norm of all roundings is bounded by eps times the weight's.
    """
    if not math.isfinite(change):
        raise InputError(
            f"{lora.source}: {name} ({lora.keys.get(name, (name,))[0]}) with its update is not finite in"
            f" {weight.dtype}: load the model again, in another dtype or without this LoRA"
        )
    rounding = (torch.finfo(weight.dtype).eps + torch.finfo(torch.float32).eps) * float(weight.float().norm())
    if not abs(change - norm) <= rounding + 1e-3 * norm:
        raise InputError(
            f"{lora.source}: {name} changed by {change:.3g} instead of {norm:.3g} ({weight.dtype}): load the model"
            " again, in another dtype"
        )
