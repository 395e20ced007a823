"""The adapter that test-time optimisation trains: a PEFT LoRA on the transformer's linear layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vlmteacher.errors import InputError
from vlmteacher.lora.formats import LoRA, diffusers_bytes
from vlmteacher.lora.formats import merge_lora as merge_lora  # it can be imported from here too
from vlmteacher.reasoners.checkpointing import block_list
from vlmteacher.reasoners.registry import family_of
from vlmteacher.settings import parse_blocks
from vlmteacher.state import check_like

ADAPTER = "default"


def target_modules(transformer: nn.Module) -> list[str] | str:
    """`LoraConfig.target_modules` for a transformer of diffusers. Raises InputError for a class of no known family."""
    return family_of(transformer).lora_targets


def add_lora(
    transformer: Any,
    rank: int = 16,
    alpha: float | None = None,
    seed: int | None = None,
    start: LoRA | None = None,
    fused: bool = True,
    blocks: str | None = None,
) -> None:
    """Put a LoRA, y = W x + (alpha / rank) B A x, on `transformer`; a previous one is removed.

    A fresh one has B = 0 and is on the `target_modules`.

    Args:
        transformer: a diffusers model (`PeftAdapterMixin`).
        rank: at least 1.
        alpha: `rank` by default, so that the scale is 1.
        seed: fixes the draw of A whatever was drawn before; None uses torch's global generator.
        start: a LoRA to go on from: its layers, ranks and alphas take the place of all of these, and of `blocks`.
        fused: compute the layers by our operator (`LoRALinear`) instead of PEFT's expression, and what stands between
            them by ours too where the transformer is known (`fuse_blocks`).
        blocks: "last:n": only in the last n blocks.

    The weights are float32 whatever the transformer's dtype: updates of 3e-5 are lost in bfloat16.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    if rank < 1:
        raise InputError(f"the LoRA rank must be at least 1, not {rank}")
    first = frozen_blocks(transformer, blocks)
    remove_lora(transformer)
    if start:
        start = start.fitted(transformer, trainable=True)
        config = start.config()
    else:
        alpha = rank if alpha is None else alpha  # a fraction is fine too
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=target_modules(transformer))
        if first:
            names = [name for name, _ in transformer.named_modules() if check_target_module_exists(config, name)]
            config.target_modules = {name for name in names if int(name.split(".")[1]) >= first}  # "blocks.5.attn1..."
    transformer.add_adapter(config, adapter_name=ADAPTER)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            if "lora_A" in name and generator is not None:
                draw = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=math.sqrt(5), generator=generator)
                parameter.data.copy_(draw)
    if start:
        # A file may hold any floating dtype; training is in float32.
        load_lora_state(transformer, {name: value.float() for name, value in start.state_dict().items()})
    if fused:
        from vlmteacher.lora.fused_layer import fuse_lora

        fuse_lora(transformer)
        if fuse_blocks := family_of(transformer).fuse_blocks:
            fuse_blocks(transformer)


def lora_size(transformer: nn.Module, rank: int, blocks: str | None = None) -> int:
    """How many numbers a fresh LoRA of this rank has. Raises InputError for a transformer not known here."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(target_modules=target_modules(transformer))
    first = frozen_blocks(transformer, blocks)
    return rank * sum(
        layer.in_features + layer.out_features
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear)
        and check_target_module_exists(config, name)
        and not (first and int(name.split(".")[1]) < first)
    )


def frozen_blocks(transformer: Any, blocks: str | None) -> int:
    """How many blocks stand before the first that `blocks` ("last:n"; None: all) gives a LoRA. Raises InputError."""
    if blocks is None:
        return 0
    total = len(block_list(transformer))
    if (count := parse_blocks(blocks)) > total:
        raise InputError(f"lora_blocks {blocks}: the transformer has {total} blocks")
    return total - count


def remove_lora(transformer: Any) -> None:
    """Take the LoRA off again, leaving the transformer as it was before `add_lora`."""
    if unfuse_blocks := family_of(transformer).unfuse_blocks:
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
    """Put `lora_state_dict` values back into an adapter of the same rank and layers, in place. Raises InputError."""
    own = dict(transformer.named_parameters())
    ours = {name.replace(f".{ADAPTER}.", "."): parameter for name, parameter in own.items() if ".lora_" in name}
    if ours.keys() != state.keys():
        raise InputError(f"the LoRA has {len(state)} tensors of other layers than this transformer's {len(ours)}")
    for name, parameter in ours.items():
        check_like(state[name], parameter, name)
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(state[name])


def export_lora(transformer: Any) -> bytes:
    """The adapter as a file for ``load_lora_weights``: ``transformer.`` keys, rank and alpha in the metadata.

    Equal adapters give equal bytes, so that a resumed run can be compared with an uninterrupted one.
    """
    return diffusers_bytes(lora_state_dict(transformer), transformer.peft_config[ADAPTER].to_dict())
