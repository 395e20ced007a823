"""The adapter that test-time optimisation trains: a PEFT LoRA on the transformer's linear layers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmteacher.errors import InputError

ADAPTER = "default"
# Every linear layer of a Wan block: self- and cross-attention, and the feed-forward pair.
TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


def add_lora(
    transformer: Any,
    rank: int = 16,
    alpha: float | None = None,
    seed: int | None = None,
    target_modules: Sequence[str] | None = None,
    fused: bool = True,
) -> None:
    """Put a fresh LoRA, y = W x + (alpha / rank) B A x with B = 0, on `transformer`; a previous one is removed.

    Args:
        transformer: a diffusers model (`PeftAdapterMixin`).
        rank: at least 1.
        alpha: `rank` by default, so that the scale is 1.
        seed: fixes the draw of A whatever was drawn before; None uses torch's global generator.
        target_modules: ends of the names of the layers to adapt, by default those of Wan.
        fused: compute the layers by our operator (`LoRALinear`) instead of PEFT's expression, and what stands between
            them by ours too where the transformer is known (`fuse_blocks`).

    The weights are float32 whatever the transformer's dtype: updates of 3e-5 are lost in bfloat16.
    """
    from peft import LoraConfig

    if rank < 1:
        raise InputError(f"the LoRA rank must be at least 1, not {rank}")
    remove_lora(transformer)
    transformer.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,  # a fraction is fine too
            lora_dropout=0.0,
            target_modules=list(target_modules or TARGET_MODULES),
        ),
        adapter_name=ADAPTER,
    )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            if "lora_A" in name and generator is not None:
                draw = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=math.sqrt(5), generator=generator)
                parameter.data.copy_(draw)
    if fused:
        from vlmteacher.lora_linear import fuse_lora
        from vlmteacher.reasoners.wan_blocks import fuse_blocks

        fuse_lora(transformer)
        fuse_blocks(transformer)


def remove_lora(transformer: Any) -> None:
    """Take the LoRA off again, leaving the transformer as it was before `add_lora`."""
    from vlmteacher.reasoners.wan_blocks import unfuse_blocks

    unfuse_blocks(transformer)
    if getattr(transformer, "peft_config", None):
        transformer.unload_lora()


def lora_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """The trainable tensors (A and B of each layer), in the order of the modules."""
    return [parameter for name, parameter in transformer.named_parameters() if ".lora_" in name]


def lora_state_dict(transformer: Any) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names (``blocks.0.attn1.to_q.lora_A.weight``); copies, on the CPU."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def load_lora_state(transformer: Any, state: dict[str, Tensor]) -> None:
    """Put `lora_state_dict` values back into an adapter of the same rank and layers, in place."""
    own = dict(transformer.named_parameters())
    ours = {name.replace(f".{ADAPTER}.", "."): parameter for name, parameter in own.items() if ".lora_" in name}
    if ours.keys() != state.keys():
        raise InputError(f"the LoRA has {len(state)} tensors of other layers than this transformer's {len(ours)}")
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(state[name])


def export_lora(transformer: Any, path: str | os.PathLike[str]) -> None:
    """Write the adapter for ``WanPipeline.load_lora_weights``: ``transformer.`` keys, rank and alpha in the metadata.

    Equal adapters give equal bytes, so that a resumed run can be compared with an uninterrupted one.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from safetensors.torch import save

    path = Path(path)
    config = transformer.peft_config[ADAPTER].to_dict()
    # PEFT keeps the layer names in a set, whose order changes from run to run.
    metadata = {
        f"transformer.{name}": sorted(value) if isinstance(value, set) else value for name, value in config.items()
    }
    state = {f"transformer.{name}": value.contiguous() for name, value in lora_state_dict(transformer).items()}
    written = json.dumps(metadata, indent=2, sort_keys=True)
    data = _ordered(save(state, metadata={"format": "pt", LORA_ADAPTER_METADATA_KEY: written}))
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def _ordered(data: bytes) -> bytes:
    """The same safetensors file with its header sorted: the library orders metadata differently by call."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
