"""The LoRA that is optimised at test time: PEFT's, on the linear layers of a diffusers transformer."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from vlmteacher.errors import InputError
from vlmteacher.lora.formats import LoRA, diffusers_bytes
from vlmteacher.reasoners.checkpointing import block_names
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
    """Add a LoRA, y = W x + (alpha / rank) B A x, to the `target_modules` of `transformer`, in place of any other.

    B starts at 0, so the model is unchanged at first. A and B are float32 whatever the transformer's dtype, because
    updates of 3e-5 are lost in bfloat16.

    Args:
        transformer: a diffusers model (`PeftAdapterMixin`).
        rank: of A and B, at least 1.
        alpha: None is `rank`, a scale of 1.
        seed: of the draw of A; None draws from torch's global generator.
        start: a trained LoRA to continue; its layers, ranks and alphas replace all other arguments but `fused`.
        fused: compute the layers by our operator (`LoRALinear`) instead of PEFT's expression, and the operations
            between them by our operators where the family has such blocks (`Family.fuse_blocks`).
        blocks: "last:n" adapts the last n blocks only.

    Raises InputError: a transformer of no known family, an invalid `rank` or `blocks`, a `start` that does not fit.
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
        alpha = rank if alpha is None else alpha  # PEFT accepts fractions
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=target_modules(transformer))
        if first:
            names = [name for name, _ in transformer.named_modules() if check_target_module_exists(config, name)]
            config.target_modules = {name for name in names if not name.startswith(_first_blocks(transformer, first))}
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
    """The number of parameters of a LoRA of this rank. Raises InputError for a transformer of no known family."""
    return rank * sum(layer.in_features + layer.out_features for layer in target_layers(transformer, blocks).values())


def check_rank(transformer: nn.Module, rank: int, blocks: str | None = None) -> None:
    """Raise InputError for a rank above the full rank of every layer that gets a LoRA."""
    most = max(min(layer.in_features, layer.out_features) for layer in target_layers(transformer, blocks).values())
    if rank > most:
        raise InputError(f"rank {rank} is above {most}, the full rank of the largest layer: give at most {most}")


def target_layers(transformer: nn.Module, blocks: str | None = None) -> dict[str, nn.Linear]:
    """The layers that get a LoRA, by name (see `add_lora`). Raises InputError."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(target_modules=target_modules(transformer))
    first = frozen_blocks(transformer, blocks)
    return {
        name: layer
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear)
        and check_target_module_exists(config, name)
        and not name.startswith(_first_blocks(transformer, first))
    }


def frozen_blocks(transformer: Any, blocks: str | None) -> int:
    """The number of blocks without a LoRA, for `blocks` of "last:n" or None (0). Raises InputError."""
    if blocks is None:
        return 0
    total = len(block_names(transformer))
    if (count := parse_blocks(blocks)) > total:
        raise InputError(f"lora_blocks {blocks}: the transformer has {total} blocks")
    return total - count


def _first_blocks(transformer: Any, count: int) -> tuple[str, ...]:
    """What the names of all layers in the first `count` blocks begin with."""
    return tuple(f"{name}." for name in block_names(transformer)[:count])


def remove_lora(transformer: Any) -> None:
    """Remove the LoRA: the transformer is as before `add_lora`."""
    if unfuse_blocks := family_of(transformer).unfuse_blocks:
        unfuse_blocks(transformer)
    if getattr(transformer, "peft_config", None):
        transformer.unload_lora()


def lora_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """The parameters A and B of each layer, in the order of the modules."""
    return [parameter for name, parameter in transformer.named_parameters() if ".lora_" in name]


def check_gradients(transformer: Any) -> None:
    """Raise InputError where a parameter of the LoRA has no gradient after a backward, but for `Family.unread` ones.

    An attention backend without a backward passes the residual's gradient on, so that no loss and no norm shows it.
    """
    parameters = [(name, value) for name, value in transformer.named_parameters() if ".lora_" in name]
    lost = [name for name, value in parameters if value.grad is None]
    if lost and (unread := family_of(transformer).unread):
        last = f"{block_names(transformer)[-1]}."
        lost = [name for name in lost if not (name.startswith(last) and re.match(unread, name.removeprefix(last)))]
    if lost:
        raise InputError(
            f"{len(lost)} of the LoRA's {len(parameters)} tensors, {lost[0]} first, have no gradient: an operation of"
            " the transformer has no backward; choose another attention backend (transformer.set_attention_backend)"
        )


def lora_state_dict(transformer: Any) -> dict[str, Tensor]:
    """Copies of the LoRA's tensors on the CPU, under PEFT's names (``blocks.0.attn1.to_q.lora_A.weight``)."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def load_lora_state(transformer: Any, state: dict[str, Tensor]) -> None:
    """Copy the values of a `lora_state_dict` into a LoRA of the same rank and layers, in place. Raises InputError."""
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
    """The LoRA as a file for ``load_lora_weights``: keys with ``transformer.``, rank and alpha in the metadata.

    Equal LoRAs give equal bytes, so a resumed run can be compared with an uninterrupted one.
    """
    return diffusers_bytes(lora_state_dict(transformer), transformer.peft_config[ADAPTER].to_dict())
