"""Frozen Teachers in 4 or 8 bits: bitsandbytes keeps the weights, the product is ours (`checkpoints/quantized.py`)."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from torch import nn

from vlmteacher.checkpoints.pretrained import entries, load_network, quantization, read_config
from vlmteacher.checkpoints.quantized import NF4
from vlmteacher.errors import InputError, MissingExtra

Quantize = Literal["8bit", "4bit"]
CHOICES = ("8bit", "4bit")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # entries of a config: a number of experts
# The vision tower stays as it is: a tenth of the weights, and every gradient to the pixels goes through it last.
UNTOUCHED = [".*visual", ".*vision_(tower|model)", ".*multi_modal_projector", ".*connector", "lm_head"]


def load_model(
    model_class: Any,
    path_or_id: str,
    dtype: torch.dtype,
    quantize: Quantize | None = None,
    device: torch.device | None = None,
    **hub: Any,
) -> Any:
    """Load a network of `model_class`; with `quantize` its language model's linear layers are in 8 or 4 bits (NF4).

    device: of a quantised model, which stays on it. Checkpoints quantised by bitsandbytes load without `quantize`.
    Raises InputError for another value of `quantize`, and for any on a checkpoint that is quantised already;
    MissingExtra without bitsandbytes.
    """
    options = {}
    if quantize is not None:
        check_quantize(quantize)
        _, stored = read_config(path_or_id, "", "config.json", hub.get("local_files_only", True))
        if method := quantization(stored, path_or_id):
            raise InputError(f"teacher {path_or_id} is quantised by {method} already: leave quantize ({quantize}) out")
        if any(value for key, value in entries(stored) if key in EXPERTS):
            raise InputError(
                f"teacher {path_or_id} has experts, most of its weights, which bitsandbytes leaves as they are: leave"
                f" quantize ({quantize}) out, or give a Teacher without experts"
            )
        from transformers import BitsAndBytesConfig

        bits = {**NF4, "bnb_4bit_compute_dtype": dtype} if quantize == "4bit" else {"load_in_8bit": True}
        config = BitsAndBytesConfig(**bits, llm_int8_skip_modules=UNTOUCHED)
        options = {"quantization_config": config, "device_map": {"": device or torch.device("cpu")}}
    model = load_network(model_class, path_or_id, dtype=dtype, keep_quantized=("bitsandbytes",), **hub, **options)
    if is_quantized(model):
        for parameter in model.parameters():  # what was saved in another dtype beside the quantised weights
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return model


def check_quantize(quantize: str | None) -> None:
    """Raise InputError for an unknown value, MissingExtra for a known one without bitsandbytes."""
    if quantize is None:
        return
    if quantize not in CHOICES:
        raise InputError(f"unknown quantize {quantize!r}: choose {' or '.join(map(repr, CHOICES))}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra(f"a Teacher in {quantize} needs bitsandbytes: pip install 'vlmteacher[quantized]'")


def is_quantized(model: nn.Module) -> bool:
    return getattr(model, "quantization_method", None) == "bitsandbytes"


def check_stays(model: Any, device: str | torch.device | None, dtype: torch.dtype | None) -> None:
    """Raise InputError when a quantised model would have to move or to change its dtype."""
    to = model.device if device is None else torch.empty(0, device=device).device
    if to != model.device or dtype not in (None, model.dtype):
        target = to if to != model.device else str(dtype).removeprefix("torch.")
        raise InputError(
            f"a loaded quantised Teacher cannot be sent to {target}: choose device (device_map) and dtype when loading"
        )
