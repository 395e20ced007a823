"""Reasoners in fewer bits: what a transformer's linear layers keep, by a `quantization_config` of diffusers.

The weights are quantised after loading, layer by layer, so that single files and few-step LoRAs, which are merged
before, work as with plain ones. Products are those of the dequantised weights (`checkpoints/quantized.py`), and the
LoRA stays in float32 beside them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from vlmteacher.arguments import show
from vlmteacher.checkpoints.quantized import METHODS, NF4, fill, is_quantized, use_exact_products
from vlmteacher.errors import InputError, MissingExtra, first_line
from vlmteacher.lora.float8 import check_float8, quantize_reasoner
from vlmteacher.ops.linear import is_plain
from vlmteacher.placement import QUANTIZATIONS
from vlmteacher.reasoners.few_step_lora import EXPERTS

# One of `QUANTIZATIONS`: "keep" leaves transformers as their files have them, the others are those of `_our_config`. Or
# a BitsAndBytesConfig or TorchAoConfig of diffusers for all transformers, a dictionary of them by the names of
# `EXPERTS`, or a PipelineQuantizationConfig.
QuantizationConfig: TypeAlias = "str | Mapping[str, Any] | Any"
PACKAGES = {"4bit": "bitsandbytes", "8bit": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}


def check_precision(fp8: bool, given: QuantizationConfig | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError or MissingExtra for `fp8` or a quantization_config that cannot be used, before loading."""
    if fp8:
        check_float8(device, dtype)
        if given is not None:
            raise InputError("fp8 and quantization_config exclude each other: both replace the Reasoner's weights")
    if isinstance(given, str):
        if given not in QUANTIZATIONS:
            raise InputError(
                f"unknown quantization_config {given!r}: choose {', '.join(QUANTIZATIONS)}, or give one of diffusers"
            )
        if given in PACKAGES:
            _check_package(PACKAGES[given], given)
    elif given is not None:
        for name in EXPERTS:
            _config_for(name, given)


def kept_methods(given: QuantizationConfig | None) -> tuple[str, ...]:
    """The methods by which transformers that are quantised in their files stay so."""
    return METHODS if given == "keep" else ()


def reduce_precision(
    networks: Mapping[str, Any], fp8: bool, given: QuantizationConfig | None, device: torch.device
) -> dict[str, str]:
    """Quantise a Reasoner's transformers, in place, on `device`; return the entry of run.json.

    Raises InputError for a method that cannot quantise a transformer, "keep" where none is quantised in its files, and
    a quantization_config that names none of them.
    """
    if fp8:
        return quantize_reasoner(networks)
    if given is None:
        return {}
    done: dict[str, str] = {}
    for name in EXPERTS:
        if (network := networks.get(name)) is None:
            continue
        if given == "keep":
            if use_exact_products(network):
                done[name] = str(getattr(network.quantization_method, "value", network.quantization_method))
        elif config := _our_config(given, network) if isinstance(given, str) else _config_for(name, given):
            _quantize(network, name, config, device)
            done[name] = _describe(config)
    if given == "keep" and not done:
        raise InputError(
            "quantization_config keep: the transformer's files are not quantised by"
            f" {', '.join(METHODS)}: choose {', '.join(PACKAGES)}"
        )
    if not done:
        raise InputError(f"quantization_config names none of {', '.join(set(networks) & set(EXPERTS))}: name one")
    return {"quantization": ", ".join(f"{name} {what}" for name, what in done.items())}


def use_known_products(network: Any, label: str) -> None:
    """Let a loaded transformer that is quantised compute exact products. Raises InputError for an unknown method."""
    method = getattr(network, "quantization_method", None)
    if getattr(network, "is_quantized", False) and not use_exact_products(network):
        raise InputError(
            f"{label} is quantised by {getattr(method, 'value', method)}, whose layers are not known here: give plain"
            f" weights, or those of {', '.join(METHODS)}"
        )


def is_reduced(network: nn.Module) -> bool:
    """Whether layers of a network are quantised, by `fill` or in its files."""
    return any(is_quantized(layer) for layer in network.modules())


def saved_bytes(transformer: nn.Module) -> dict[str, int]:
    """The bytes of weights that each choice saves on a transformer without a LoRA, whose weights are plain."""
    per_layer = {
        "4bit": lambda n, outputs: -(-n // 2) + -(-n // 64) + 4 * -(-n // (64 * 256)),  # NF4, scales quantised again
        "8bit": lambda n, outputs: n + 4 * outputs,
        "int8": lambda n, outputs: n + 5 * outputs,  # scale and zero point
        "fp8": lambda n, outputs: n + 4 * outputs,
    }
    return {
        choice: sum(
            layer.weight.nbytes - size(layer.weight.numel(), layer.out_features) for layer in _inside(transformer)
        )
        for choice, size in per_layer.items()
    }


def made_bytes(transformer: nn.Module) -> int:
    """The most bytes of one weight, dequantised in float32 and then cast to its dtype, for its product."""
    return max(4 * layer.weight.numel() + layer.weight.nbytes for layer in _inside(transformer))


def _check_package(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(f"a Reasoner in {what} needs {package}: pip install 'vlmteacher[quantized]'")


def _outside(transformer: nn.Module) -> list[str]:
    """The parts of a transformer beside its lists of blocks, which stay as they are: a per cent of the weights.

    Without those of a name that a layer in the blocks has too, such as proj_out: diffusers would skip both.
    """
    lists = {name for name, child in transformer.named_children() if isinstance(child, nn.ModuleList)}
    names = [name.split(".") for name, _ in transformer.named_modules()]
    inner = {part for parts in names if parts[0] in lists for part in parts[1:]}
    return [name for name, _ in transformer.named_children() if name not in lists | inner]


def _inside(transformer: nn.Module) -> list[nn.Linear]:
    outside = _outside(transformer)
    modules = transformer.named_modules()
    return [layer for name, layer in modules if is_plain(layer) and name.split(".")[0] not in outside]


def _our_config(choice: str, transformer: Any) -> Any:
    """diffusers' quantization_config for a choice of `QUANTIZATIONS` but "keep"."""
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    skip = _outside(transformer)
    if choice == "4bit":
        return BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=transformer.dtype, llm_int8_skip_modules=skip)
    if choice == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    kind = Int8WeightOnlyConfig if choice == "int8" else Float8WeightOnlyConfig
    return TorchAoConfig(kind(), modules_to_not_convert=skip)


def _config_for(name: str, given: Any) -> Any:
    """What a dictionary, a PipelineQuantizationConfig or a config of diffusers says of the part `name`, or None.

    Raises InputError for other parts than `EXPERTS` and methods that are not known; MissingExtra.
    """
    from diffusers import PipelineQuantizationConfig

    if isinstance(given, PipelineQuantizationConfig):
        named = given.quant_mapping or given.components_to_quantize or ()
        config = given._resolve_quant_config(is_diffusers=True, module_name=name)
    elif isinstance(given, Mapping):
        named, config = given, given.get(name)
    else:
        named, config = (), given
    if other := [part for part in named if part not in EXPERTS]:
        raise InputError(
            f"quantization_config names {other[0]}: only {' and '.join(EXPERTS)} can be quantised here; offload keeps"
            " what is idle off the GPU"
        )
    if config is None:
        return None
    method = getattr(config, "quant_method", None)
    method = getattr(method, "value", method)
    if method == "gguf":
        raise InputError(
            'quantization_config: GGUF weights are made by other tools: give the file as transformer and "keep" here'
        )
    if method not in METHODS:
        raise InputError(
            f"quantization_config {show(config)}: give diffusers' BitsAndBytesConfig or TorchAoConfig, a dictionary of"
            f" them by {' and '.join(EXPERTS)}, a PipelineQuantizationConfig, or one of {', '.join(QUANTIZATIONS)}"
        )
    _check_package(method, method)
    return config


def _quantize(network: Any, name: str, config: Any, device: torch.device) -> None:
    try:
        fill(network, dict(network.state_dict()), config, device)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a library's own, for shapes and types that it does not take
        raise InputError(
            f"{name} cannot be quantised by {_describe(config)} ({first_line(error)[:200]}): take another"
            " quantization_config"
        ) from error
    if not is_reduced(network):
        raise InputError(f"quantization_config for {name} leaves all of its layers out: name fewer modules to skip")


def _describe(config: Any) -> str:
    if hasattr(config, "quant_type"):
        return f"torchao {type(config.quant_type).__name__}"
    return f"bitsandbytes {config.quantization_method()}"
