"""Linear layers whose weights a library keeps quantised: bitsandbytes, torchao, and GGUF as diffusers keeps it.

The library keeps the weight, the product is ours: y = x W^T + b with the dequantised W, made again in the backward, so
that results and gradients are exactly those of a network with these weights. The libraries' own products do not give
that. On a CPU with AVX512-BF16 bitsandbytes' 4-bit layer repacks the weights at the first product without a gradient,
and passes none from then on. Its 8-bit layer rounds the activations too, and passes a straight-through gradient, as
torchao's dynamic ones do. Observed in bitsandbytes 0.50 and torchao 0.18; never run on a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from vlmteacher.errors import InputError
from vlmteacher.ops.linear import linear_backward, linear_forward

METHODS = ("bitsandbytes", "torchao", "gguf")  # quant_method of those whose layers are known here
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}  # BitsAndBytesConfig


def is_quantized(layer: Any) -> bool:
    """Whether the weight of a layer is kept quantised by one of `METHODS`."""
    return _dequantizer(layer) is not None


def is_gguf(network: nn.Module) -> bool:
    """Whether weights of a network are diffusers' `GGUFParameter`s."""
    return any(type(weight).__name__ == "GGUFParameter" for weight in network.parameters())


def dequantize(layer: Any, dtype: torch.dtype) -> Tensor:
    """The dequantised W (out, in) of a layer with a quantised weight."""
    make = _dequantizer(layer)
    assert make is not None
    return make(layer.weight).to(dtype)


def use_exact_products(network: nn.Module) -> list[Any]:
    """Make every quantised layer compute x W^T + b with its dequantised W, and pass the gradient to x only.

    Returns these layers. Raises InputError for weights that bitsandbytes has repacked for its own products.
    """
    layers = [layer for layer in network.modules() if is_quantized(layer)]
    for layer in layers:
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise InputError("bitsandbytes has run this network on the CPU, and repacked its weights: load it again")
        layer.forward = MethodType(_forward, layer)
    return layers


def fill(network: Any, state: dict[str, Tensor], config: Any, device: torch.device) -> None:
    """Give a network of diffusers the weights `state`, those that `config` names quantised on `device`, in place.

    state: all parameters and saved buffers by name; it is emptied, so that no weight is held twice. config: a
    quantization_config of diffusers. The layers compute by `use_exact_products`.
    """
    from diffusers.quantizers import DiffusersAutoQuantizer
    from diffusers.utils import get_module_from_name

    # diffusers extends the config's lists; `validate_environment`, which wants a GPU of bitsandbytes, is left out.
    quantizer = DiffusersAutoQuantizer.from_config(copy.deepcopy(config), pre_quantized=False)
    keep = [*(network._keep_in_fp32_modules or ())]
    quantizer.preprocess_model(network, device_map=None, keep_in_fp32_modules=keep, state_dict=state)
    for name in list(state):
        value = state.pop(name)
        if quantizer.check_if_quantized_param(network, value, name, state, param_device=device):
            quantizer.create_quantized_param(network, value, name, device, state, [])
            continue
        module, leaf = get_module_from_name(network, name)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value
    quantizer.postprocess_model(network)
    quantizer.offload = False  # as `validate_environment` sets it, for saving
    network.hf_quantizer = quantizer
    network.register_to_config(quantization_config=quantizer.quantization_config)
    use_exact_products(network.requires_grad_(False).eval())


def _dequantizer(layer: Any) -> Callable[[Any], Tensor] | None:
    """What makes a plain tensor of the layer's weight; None where it is one. The libraries need not be installed."""
    weight = getattr(layer, "weight", None)
    if weight is None or type(weight) in (nn.Parameter, Tensor) or not isinstance(layer, nn.Linear):
        return None
    return next((DEQUANTIZERS[kind.__name__] for kind in type(weight).__mro__ if kind.__name__ in DEQUANTIZERS), None)


def _four_bits(weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def _eight_bits(weight: Any) -> Tensor:
    if weight.SCB.device != weight.device:  # bitsandbytes leaves it behind when a network moves
        weight.SCB = weight.SCB.to(weight.device)
    return weight.data * (weight.SCB / 127)[:, None]


def dequantize_gguf(weight: Any) -> Tensor:
    """The plain tensor of a GGUFParameter of diffusers, computed in float32; diffusers' own layers take float16."""
    from diffusers.quantizers.gguf.utils import GGML_QUANT_SIZES, dequantize_functions

    sizes = GGML_QUANT_SIZES[weight.quant_type]  # numbers and bytes of a block
    blocks = weight.as_tensor().view(torch.uint8).reshape(-1, sizes[1])
    return dequantize_functions[weight.quant_type](blocks, *sizes, torch.float32).reshape(weight.quant_shape)


# class of the weight -> its dequantised values
DEQUANTIZERS: dict[str, Callable[[Any], Tensor]] = {
    "Params4bit": _four_bits,
    "Int8Params": _eight_bits,
    "TorchAOBaseTensor": lambda weight: weight.dequantize(),
    "GGUFParameter": dequantize_gguf,
}


def _forward(layer: Any, x: Tensor) -> Tensor:
    return _Product.apply(x, layer)


class _Product(torch.autograd.Function):
    """x W^T + b. Saves neither x nor the dequantised W, which the backward makes again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return linear_forward(x, dequantize(layer, x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return linear_backward(grad, dequantize(ctx.layer, grad.dtype)), None
