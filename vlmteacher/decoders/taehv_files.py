"""Files of TAEHV-class decoders: their tensors, and the layer table that the shapes of the weights imply."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vlmteacher.errors import InputError, first_line
from vlmteacher.reasoners.registry import decoder_file

FILE_LIMIT = 2**30  # bytes; the largest published decoder has a tenth
FIRST_STAGE_KEEPS_TIME = (16, 32, 48)  # latent channels of the families whose first stage makes one frame of one


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The ``decoder.*`` tensors of a file, and its safetensors metadata.

    Raises InputError: no such file, a file that cannot be read or is too large, values that are no weights.
    """
    if not os.path.isfile(path):
        raise InputError(f"decoder file {path} does not exist: give the path of a .pth or .safetensors checkpoint")
    metadata: dict[str, str] = {}
    try:
        if path.stat().st_size > FILE_LIMIT:
            raise ValueError(f"it is larger than {FILE_LIMIT >> 20} MiB")
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                state = {own: file.get_tensor(name) for name in file.keys() if (own := _own_name(name))}  # noqa: SIM118
                metadata = file.metadata() or {}
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            state = {own: value for name, value in loaded.items() if (own := _own_name(name))}
        for name, value in state.items():
            if not (isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()):
                raise TypeError(f"{name} is no tensor of floating-point numbers")
            if value.numel() * value.element_size() > path.stat().st_size:
                raise ValueError(f"{name} is larger than the file")  # a stride of 0 expands a few bytes to any size
    except Exception as error:  # the reader of a damaged archive can raise anything
        raise InputError(f"cannot read {path} as decoder weights ({first_line(error)[:120]})") from error
    return state, metadata


def _own_name(name: str) -> str | None:
    """The name ``decoder.{i}...`` of a decoder's weight, without the prefix of a wrapper that saved it (LightX2V:
    ``taehv.decoder.{i}...``); None for other weights."""
    match = re.match(r"(?:(?:taehv|model|module)\.)*(decoder\.\d.*)", name)
    return match and match[1]


def is_super(state: dict[str, Tensor]) -> bool:
    """Whether the weights are of a ``_super`` decoder, whose first layer is a convolution."""
    return "decoder.0.weight" in state


def read_layout(state: dict[str, Tensor], metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    """The keywords of the `SurrogateDecoder` with these weights; removes from `state` the weights that it does not use.

    metadata: the layout in the file's metadata, for what the shapes do not show; where that is silent, the family's
    `DecoderFile` of the file's name holds. Raises ValueError, or KeyError and IndexError for weights of another
    network.
    """
    first, last = state["decoder.1.weight"], state["decoder.22.weight"]
    projections = [state[f"decoder.{i}.weight"] for i in (8, 14, 20)]
    if first.shape[1] in FIRST_STAGE_KEEPS_TIME and "time_upscale" not in metadata:
        grow = state["decoder.7.conv.weight"]  # makes two frames, of which upstream keeps the later one
        state["decoder.7.conv.weight"] = grow[-grow.shape[1] :]
    grows = [state[f"decoder.{i}.conv.weight"] for i in (7, 13, 19)]
    kept: dict[str, Any] = {n: metadata[n] for n in ("space_upscale", "slope", "signed") if n in metadata}
    if not _is_flags(kept.get("space_upscale", [True] * 3)) or not isinstance(kept.get("signed", True), bool):
        raise ValueError("space_upscale must be three of true or false, signed one")
    if type(slope := kept.get("slope", 0)) not in (int, float) or not 0 <= slope < 1:
        raise ValueError(f"slope must be from 0 to 1, not {slope}")
    return {
        "latent_channels": first.shape[1],
        "widths": [first.shape[0], *(w.shape[0] for w in projections)],
        "patch": round((last.shape[0] / 3) ** 0.5),
        "time_upscale": [w.shape[0] == 2 * w.shape[1] for w in grows],
        **decoder_file(path.name).options,
        **kept,
    }


def read_super_layout(state: dict[str, Tensor]) -> dict[str, Any]:
    """The keywords of the `SuperVideoDecoder` with these weights. Raises KeyError for weights of another network."""
    grows = [state[f"decoder.{i}.conv.weight"] for i in (7, 14, 21)]
    widths = [w.shape[1] for w in grows]
    first = state["decoder.0.weight"]
    shuffled = [state[f"decoder.{i}.weight"].shape[0] for i in (4, 11, 18)]
    return {
        "latent_channels": first.shape[1],
        "widths": [first.shape[0], *widths],
        "patch": round((state["decoder.22.weight"].shape[0] / 3) ** 0.5),
        "time_upscale": [w.shape[0] == 2 * w.shape[1] for w in grows],
        "space_upscale": [channels == 4 * width for channels, width in zip(shuffled, widths, strict=True)],
    }


def check_shapes(shapes: dict[str, torch.Size], expected: dict[str, torch.Size]) -> None:
    """Raise ValueError that names the first weight whose shape is not as expected."""
    for name in sorted({*expected, *shapes}):
        if name not in expected:
            raise ValueError(f"unexpected {name}")
        if expected[name] != shapes.get(name):
            shape = str(tuple(shapes[name])) if name in shapes else "missing"
            raise ValueError(f"{name} should be {tuple(expected[name])} but {shape}")


def _is_flags(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(each, bool) for each in value)
