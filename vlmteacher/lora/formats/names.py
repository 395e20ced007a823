"""The names of a model's layers in diffusers and outside of it, for every known family."""

from __future__ import annotations

import re

from vlmteacher.errors import InputError
from vlmteacher.reasoners.family import LayerNames
from vlmteacher.reasoners.registry import FAMILIES

OWN_BLOCKS = "|".join(sorted({family.blocks for family in FAMILIES}))
ALL_BLOCKS = "|".join(sorted({OWN_BLOCKS, *(names.blocks for family in FAMILIES for names in family.all_layers)}))
BLOCK = re.compile(rf"(?:{OWN_BLOCKS})\.(\d+)\.(.+)")  # a name in a block of diffusers' transformers
# layer of another tool that holds several of diffusers' -> these, in the order of their rows
FUSED = {layer: parts for family in FAMILIES for names in family.all_layers for layer, parts in names.fused.items()}


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
    for blocks, names in ((family.blocks, names) for family in FAMILIES for names in family.all_layers):
        for own, other in (names.all_inner if match else names.all_outer).items():
            if not match:
                if path in (other.replace(".", dot), own.replace(".", dot)):
                    return own
            elif (match[1], match[3]) in (
                (names.blocks, other.replace(".", dot)),
                (blocks, own.replace(".", dot)),
            ):
                return f"{blocks}.{match[2]}.{own}"
    return None
