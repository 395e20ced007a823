"""PEFT's LoRA layer with the fused operator as its forward; the rest stays PEFT's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from vlmteacher.checkpoints.quantized import dequantize, is_quantized
from vlmteacher.errors import InputError
from vlmteacher.ops.linear import is_plain
from vlmteacher.ops.lora_linear import Weight, lora_linear, lora_linear_group

# The largest allowed RMS of the difference from PEFT's layer, which rounds elsewhere, relative to PEFT's result.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class LoRALinear(PeftLinear):
    """A frozen linear layer with LoRA adapters, x (..., K) -> (..., N): PEFT's layer, computed by our operator.

    Parameters, their names, adapters, scaling, merging, saving and unloading are those of `peft.tuners.lora.Linear`.
    Its own forward runs where `vlmteacher.ops.lora_linear` does not apply: merged or disabled adapters, dropout in
    training, variants such as DoRA, mixed batches, a base layer that is not a frozen linear layer with a plain or a
    quantised weight.
    """

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int = 16, alpha: float | None = None, adapter_name: str = "default"
    ) -> LoRALinear:
        """Freeze `linear` and wrap it with a new adapter in float32, B = 0; an alpha of None is `rank`.

        Raises InputError: a rank below 1, or results that differ from PEFT's.
        """
        if rank < 1:
            raise InputError(f"the LoRA rank must be at least 1, not {rank}")
        config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha)
        layer = cls(
            linear.requires_grad_(False),
            adapter_name,
            config,
            r=rank,
            lora_alpha=config.lora_alpha,
        )
        for part in (layer.lora_A, layer.lora_B):
            part.float()
        layer.prove()
        return layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        factors = None if args or kwargs else self._factors(x)
        if factors is None:
            return super().forward(x, *args, **kwargs)
        return lora_linear(x, _weight(self.base_layer), _bias(self.base_layer, x), *factors)

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
        """A, B and the scaling of the active adapters together, or None where PEFT's own forward runs."""
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if not adapters or not self._applies(x, adapters):
            return None
        a, b = ([part[name].weight for name in adapters] for part in (self.lora_A, self.lora_B))
        scaling = [self.scaling[name] for name in adapters]
        if len(adapters) > 1:  # concatenated, they are one adapter whose rank is the sum
            a, scaled = [torch.cat(a)], [part * factor for part, factor in zip(b, scaling, strict=True)]
            b, scaling = [torch.cat(scaled, dim=1)], [1.0]
        return a[0], b[0], scaling[0]

    def _applies(self, x: Tensor, adapters: list[str]) -> bool:
        base = self.base_layer
        return (
            (is_plain(base) or is_quantized(base))
            and not base._forward_hooks
            and not base._forward_pre_hooks
            and not base.weight.requires_grad
            and x.is_floating_point()
            and not (self.disable_adapters or self.merged or self.fan_in_fan_out)
            and all(self._is_plain(name) for name in adapters)
        )

    def _is_plain(self, adapter: str) -> bool:
        dropout = self.lora_dropout[adapter]
        return (
            (isinstance(dropout, nn.Identity) or not dropout.training)
            and adapter not in self.lora_variant
            and self.lora_B[adapter].bias is None
        )

    def prove(self, name: str = "the layer") -> None:
        """Compare a forward and backward of three random rows, with a random B, with PEFT's. Raises InputError."""
        generator = torch.Generator().manual_seed(0)
        base, dtype = self.base_layer, _dtype(self.base_layer)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(base.weight.device)

        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if not self._applies(draw(1), adapters):
            return  # PEFT's own forward runs
        trained = [part[adapter].weight for part in (self.lora_A, self.lora_B) for adapter in adapters]
        before = [b.data for b in trained[len(adapters) :]]
        x = draw(3, base.in_features).to(dtype).requires_grad_()
        grad = draw(3, base.out_features).to(dtype)
        try:
            for b in trained[len(adapters) :]:
                b.data = draw(*b.shape).to(b.dtype)
            inputs = [x, *(weight for weight in trained if weight.requires_grad)]
            with torch.enable_grad():
                (ours, theirs) = (
                    (y.detach(), *torch.autograd.grad(y, inputs, grad)) for y in (self(x), super().forward(x))
                )
        finally:
            for b, data in zip(trained[len(adapters) :], before, strict=True):
                b.data = data
        for what, mine, peft in zip(("output", "dx", *["LoRA gradient"] * len(trained)), ours, theirs, strict=False):
            if not peft.isfinite().all():
                raise InputError(
                    f"{name}: PEFT's {what} is not finite in {dtype}: its weight or its LoRA (lora_A, lora_B) is"
                    " too large for this dtype"
                )
            error, size = ((mine - peft).float().square().mean().sqrt(), peft.float().square().mean().sqrt())
            difference = float(error / size) if size or error else 0.0  # A may be 0
            if not difference <= TOLERANCE[dtype]:
                raise InputError(
                    f"{name}: the fused LoRA's {what} differs from PEFT's by {difference:.1e} (allowed "
                    f"{TOLERANCE[dtype]:.0e}, {dtype}): use PEFT's layers (fused_lora=False)"
                )


def linear_group(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    """Apply layers to the same x, by one call of the operator where all are `LoRALinear`s without hooks."""
    plain = all(
        type(layer) is LoRALinear and not layer._forward_hooks and not layer._forward_pre_hooks for layer in layers
    )
    # Two comprehensions: torch.compile cannot trace a := inside of one.
    factors = [layer._factors(x) for layer in layers] if plain else []
    factors = [values for values in factors if values is not None]
    biases = [_bias(layer.base_layer, x) for layer in layers] if factors else []
    weights = [_weight(layer.base_layer) for layer in layers] if factors else []
    mixed = any(len({type(value) for value in values}) > 1 for values in (biases, weights))
    if len(factors) < len(layers) or mixed:
        return [layer(x) for layer in layers]
    a, b, scaling = zip(*factors, strict=True)
    return lora_linear_group(x, weights, None if biases[0] is None else biases, a, b, scaling)


def _weight(base: Any) -> Weight:
    """The weight of a frozen layer for `lora_linear`."""
    return partial(dequantize, base) if is_quantized(base) else base.weight


def _bias(base: Any, x: Tensor) -> Tensor | None:
    return base.bias.to(x.dtype) if base.bias is not None and is_quantized(base) else base.bias


def _dtype(base: Any) -> torch.dtype:
    """The dtype of a frozen layer's weight, or, where that is quantised, of its bias."""
    if not is_quantized(base):
        return base.weight.dtype
    return torch.float32 if base.bias is None else base.bias.dtype


def _is_fusible(module: Any) -> bool:
    """Whether this is PEFT's LoRA on a linear layer; on quantised ones PEFT has classes of its own."""
    return type(module) is PeftLinear or (
        isinstance(module, LoraLayer) and type(module) is not LoRALinear and is_quantized(module.base_layer)
    )


def fuse_lora(model: nn.Module) -> list[str]:
    """Turn PEFT's LoRA layers in `model` into `LoRALinear`s, in place; returns their names.

    One layer of each shape and dtype is compared with PEFT's forward and backward. Raises InputError where they
    differ; the layers are then unchanged.
    """
    layers = {name: module for name, module in model.named_modules() if _is_fusible(module)}
    before = {name: type(layer) for name, layer in layers.items()}
    proved: set[tuple[Any, ...]] = set()
    try:
        for name, layer in layers.items():
            layer.__class__ = LoRALinear  # keeps hooks and references; only the forward differs
            base = layer.base_layer
            ranks = tuple(layer.lora_A[adapter].weight.shape[0] for adapter in layer.lora_A)
            dtype, shape = _dtype(base), (base.out_features, base.in_features)
            kind = (shape, dtype, type(base), base.weight.device, base.bias is None, ranks)
            if kind not in proved and dtype in TOLERANCE and not base.weight.is_meta:
                layer.prove(name)
                proved.add(kind)
    except InputError:
        for name, layer in layers.items():
            layer.__class__ = before[name]
        raise
    return list(layers)
