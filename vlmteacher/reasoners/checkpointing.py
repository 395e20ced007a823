"""Selective activation checkpointing: memory against recomputation, per block of a Reasoner's transformer.

A kept byte saves different amounts of work. One byte of bfloat16 saves K FLOPs of a product with an inner dimension K,
and 2 N FLOPs of self-attention over N tokens. A level is a threshold on that number, so the levels are nested.
"""

from __future__ import annotations

import enum
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vlmteacher.errors import InputError
from vlmteacher.reasoners.registry import FAMILIES


class Keep(enum.IntEnum):
    """What a block keeps for its backward, from everything to its input alone."""

    ALL = 0  # plain autograd: no checkpoint
    PRODUCTS = 1  # every attention and matrix product: only element-wise work is recomputed
    LONG = 2  # self-attention and the products with more inner than output columns (the second of the MLP)
    ATTENTION = 3  # self-attention
    INPUT = 4  # full recomputation


_ATTENTION = {  # operator -> the axis of the tokens in q and k
    "aten::_scaled_dot_product_flash_attention": -2,
    "aten::_scaled_dot_product_efficient_attention": -2,
    "aten::_scaled_dot_product_cudnn_attention": -2,
    "aten::_scaled_dot_product_flash_attention_for_cpu": -2,
    "aten::_scaled_dot_product_fused_attention_overrideable": -2,
    "flash_attn_3::fwd": 1,
    "_diffusers_flash_attn_3::_flash_attn_forward": 1,
    "vlmteacher::attention": 1,
}
_PRODUCTS = {
    "aten::mm": 0,
    "aten::addmm": 1,
    "aten::_scaled_mm": 0,
    "vlmteacher::lora_linear": 0,
}  # operator -> which argument is the left factor
MIN_INNER = 128  # a product with fewer terms (a LoRA's second) costs no more than reading its result


def block_lists(transformer: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of a diffusers transformer's blocks, by name, in the order in which they run."""
    known = (family.block_lists for family in FAMILIES)
    names = max((each for each in known if all(hasattr(transformer, name) for name in each)), key=len)
    return {name: getattr(transformer, name) for name in names}


def set_blocks(transformer: nn.Module, lists: Mapping[str, nn.ModuleList]) -> None:
    """Let a transformer run the blocks of `lists` in place of its own; lists that are left out are emptied."""
    for name in block_lists(transformer):
        setattr(transformer, name, lists.get(name, nn.ModuleList()))


def block_names(transformer: nn.Module) -> list[str]:
    """The names of a diffusers transformer's blocks, in the order in which they run."""
    return [f"{name}.{k}" for name, blocks in block_lists(transformer).items() for k in range(len(blocks))]


def block_list(transformer: nn.Module) -> nn.ModuleList:
    """The blocks of a diffusers transformer, in the order in which they run."""
    return nn.ModuleList(block for blocks in block_lists(transformer).values() for block in blocks)


def _policy(level: Keep, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().split(".")[0]
    keep = False
    if name in _ATTENTION:  # cross-attention, to the few tokens of a prompt, is cheap
        tokens = _ATTENTION[name]
        keep = level == Keep.PRODUCTS or args[1].shape[tokens] >= args[0].shape[tokens]
    elif level <= Keep.LONG and name in _PRODUCTS:
        inner = args[_PRODUCTS[name]].shape[-1]
        outer = args[1][0].shape[0] if name == "vlmteacher::lora_linear" else context.op_output.shape[-1]
        keep = inner >= MIN_INNER and (level == Keep.PRODUCTS or inner > outer >= MIN_INNER)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(level: Keep, block: Callable[..., Any], *args: Any) -> Any:
    """Run `block(*args)` under a checkpoint of `level`; results and gradients have the same bits at every level."""
    if level == Keep.ALL:
        return block(*args)
    if level == Keep.INPUT:
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, level))
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def keep_activations(transformer: Any, levels: Keep | Sequence[Keep]) -> None:
    """Set the level of every block of a diffusers transformer; a single level is for all blocks.

    Uses diffusers' own `enable_gradient_checkpointing`, which `Keep.ALL` turns off again. Raises InputError unless
    there are as many levels as blocks.
    """
    blocks = block_list(transformer)
    by_number = [levels] * len(blocks) if isinstance(levels, Keep) else list(levels)
    if len(by_number) != len(blocks):
        raise InputError(
            f"{len(by_number)} activation levels for {len(blocks)} blocks: give one for each, or a single one"
        )
    transformer.kept_levels = by_number
    if all(level == Keep.ALL for level in by_number):
        transformer.disable_gradient_checkpointing()
        return
    by_block = dict(zip(blocks, by_number, strict=True))

    def run(block: nn.Module, *args: Any) -> Any:
        return run_block(by_block.get(block, Keep.ALL), block, *args)

    transformer.enable_gradient_checkpointing(run)


def kept_levels(transformer: Any) -> list[Keep]:
    """The level of each block, as `keep_activations` set it."""
    return getattr(transformer, "kept_levels", [Keep.ALL] * len(block_list(transformer)))


def parse_levels(text: str, blocks: int) -> list[Keep]:
    """Parse ``"attention:20,long:10"`` into the levels of `blocks` blocks, in their order. Raises InputError."""
    try:
        parts = [part.partition(":") for part in text.split(",")]
        counts = [(Keep[name.strip().upper()], int(count) if count else blocks) for name, _, count in parts]
    except (KeyError, ValueError) as error:
        known = ", ".join(level.name.lower() for level in Keep)
        raise InputError(f"activation levels {text!r} are not LEVEL[:BLOCKS],...: the levels are {known}") from error
    levels = [level for level, count in counts for _ in range(count)]
    if len(levels) != blocks:
        raise InputError(f"activation levels {text!r} are for {len(levels)} blocks, the transformer has {blocks}")
    return levels


def format_levels(levels: Sequence[Keep]) -> str:
    """Format levels as `parse_levels` reads them."""
    return ",".join(f"{level.name.lower()}:{len(list(run))}" for level, run in itertools.groupby(levels))
