"""The names of a model's layers in diffusers and outside of it, for every known family."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.reasoners.family import LayerNames
from vlmteacher.reasoners.registry import FAMILIES

NAMES = [pair for family in FAMILIES for pair in family.all_names]  # (diffusers' list of blocks, names)
OWN_BLOCKS = "|".join(sorted({blocks for blocks, _ in NAMES}))
ALL_BLOCKS = "|".join(sorted({OWN_BLOCKS, *(names.blocks for _, names in NAMES)}))
BLOCK = re.compile(rf"(?:{OWN_BLOCKS})\.(\d+)\.(.+)")  # a name in a block of diffusers' transformers
# layer of another tool that holds several of diffusers' -> these, in the order of their rows
FUSED = {layer: parts for _, names in NAMES for layer, parts in names.fused.items()}
SHARES = {layer: share for _, names in NAMES for layer, share in names.shares.items()}


def theirs(name: str, names: LayerNames, source: str) -> str:
    """The name outside diffusers of a layer of diffusers. Raises InputError where there is none."""
    match = BLOCK.fullmatch(name)
    other = names.all_inner.get(match[2]) if match else names.all_outer.get(name)
    if other is None:
        raise InputError(f"{source}: the layer {name} has no name outside diffusers")
    return f"{names.blocks}.{match[1]}.{other}" if match else other


def ours(path: str, dot: str = ".") -> str | None:
    """The name in diffusers of a layer that a file names `path`; None for a layer of no known family.

    dot: the separator in `path`, "_" in musubi-tuner's files. `path` may be diffusers' name already.
    """
    match = re.fullmatch(rf"({ALL_BLOCKS})[{dot}](\d+)[{dot}](.+)", path)
    for blocks, names in NAMES:
        for own, other in (names.all_inner if match else names.all_outer).items():
            if not match:
                if path in (other.replace(".", dot), own.replace(".", dot)):
                    return own
            elif (match[1], match[3]) in (
                (names.blocks, other.replace(".", dot)),
                (blocks, own.replace(".", dot)),
            ):
                return f"{blocks}.{match[2]}.{own}"
        if match and match[1] == blocks:  # a part of a layer that is fused outside diffusers
            for own in names.own_inner:
                if match[3] == own.replace(".", dot):
                    return f"{blocks}.{match[2]}.{own}"
    return None


def split_rows(rows: Tensor, parts: Sequence[str]) -> list[Tensor]:
    """Split a tensor of a fused layer (rows, ...) into those of its `parts`, a value of `FUSED`."""
    ends = [*accumulate(SHARES.get(part, 1) for part in parts)]
    return list(rows.tensor_split([len(rows) * end // ends[-1] for end in ends[:-1]]))
