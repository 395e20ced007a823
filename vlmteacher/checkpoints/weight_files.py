"""Files of weights: a network's files and their headers, and single files in other precisions.

Only safetensors and GGUF files are read: a pickle (.bin, .pt, .ckpt) can run code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmteacher.errors import InputError, MissingExtra
from vlmteacher.files import parse_json, read_json

FLOATS = ("F64", "F32", "F16", "BF16")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
VARIANTS = (None, "fp16", "bf16", "fp32")  # of a network's files, in order of preference
PICKLES: tuple[str, ...] = ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.bin", "model.pt", "model.ckpt")
PICKLES += tuple(f"{name}.index.json" for name in PICKLES[:2])
PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of a transformer in the single files of other tools

# Tensors that ComfyUI and LightX2V write beside a float8 weight: its scale, the scale of its layer's input, which plain
# products do not need, and marks.
SCALES = (".scale_weight", ".weight_scale")
INPUT_SCALES = (".scale_input", ".input_scale")
SCALED_MARK, FORMAT_MARK = "scaled_fp8", ".comfy_quant"


@dataclass(frozen=True)
class Stored:
    """The header of a tensor in a file; dtype: as safetensors names it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """The headers of a network's files. variant: such as "fp16", where the files' names have it."""

    tensors: dict[str, Stored]
    variant: str | None


def network_weights(find: Callable[[str], Path | None], stem: str, label: str, sharded_first: bool) -> Weights:
    """Read the headers of the safetensors files that a library would load: one file, or the shards of an index.

    find: returns the path of a file by its name, or None. stem: "model" or "diffusion_pytorch_model". sharded_first:
    whether the library prefers the index where there is a single file too.

    Raises InputError: no such files, a shard that is missing or outside the directory, a tensor that the index does not
    list, or lists for another shard.
    """
    for variant in VARIANTS:
        dot = f".{variant}" if variant else ""
        names = [f"{stem}{dot}.safetensors", f"{stem}.safetensors.index{dot}.json"]
        for name in names[::-1] if sharded_first else names:
            if file := find(name):
                whole = file.suffix == ".safetensors"
                return Weights(header(file) if whole else _sharded(find, file, label), variant)
    for name in PICKLES:
        if find(name):
            raise InputError(f"{label} has its weights in {name}, which can run code: convert them to safetensors")
    raise InputError(f"{label} cannot be loaded (it has no {stem}.safetensors): is the copy complete?")


def _sharded(find: Callable[[str], Path | None], index: Path, label: str) -> dict[str, Stored]:
    content = read_json(index, "index")
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise InputError(f"{index} has no weight_map of names and files: is the copy complete?")
    if not isinstance(content.get("metadata"), dict):
        raise InputError(f"{index} has no metadata: is the copy complete?")
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(places.values())):
        if os.path.basename(shard) != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index} names {shard!r}: shards are .safetensors files beside the index")
        if (file := find(shard)) is None:
            raise InputError(f"{label} has no {shard}, which {index.name} names: is the copy complete?")
        for name, stored in header(file).items():
            if places.get(name) != shard:
                raise InputError(f"{file} holds {name}, which {index.name} does not place there: is the copy complete?")
            tensors[name] = stored
    if lost := sorted(set(places) - set(tensors)):
        raise InputError(f"{label} lacks {lost[0]}, which {index.name} names: is the copy complete?")
    return tensors


def header(file: Path) -> dict[str, Stored]:
    """Read the headers of the tensors in a safetensors file, by name. Raises InputError for a damaged file."""
    with opened(file) as content:
        slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118 (a file, no dict)
        return {name: Stored(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def opened(file: Path) -> Any:
    """Open a safetensors file by `safe_open`. Raises InputError."""
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be loaded ({error}): is the copy complete?") from error


def check_floats(tensors: Mapping[str, Stored], label: str) -> None:
    """Raise InputError for weights that are not floating-point numbers of at least 16 bits."""
    for name, stored in tensors.items():
        if stored.dtype not in FLOATS and not name.endswith("position_ids"):
            raise InputError(
                f"{label} holds {stored.dtype} values ({name}) without a quantization_config: give weights that are not"
                " quantised"
            )


def read_single_file(path: Path, option: str, dtype: torch.dtype, keep: bool = False) -> dict[str, Tensor]:
    """Read the weights of a transformer from a single file, without the prefix that other tools write.

    Of a file with other networks too, only the weights with the prefix are returned. Float8 weights are multiplied by
    their scales and quantised weights of a GGUF file dequantised, in float32, and returned in `dtype`; others keep
    theirs. keep: leave the quantised weights of a GGUF file as they are, as diffusers' `GGUFParameter`.

    Raises InputError for a file of another format or with values that cannot be read, MissingExtra for a GGUF file
    without the package gguf.
    """
    if not path.is_file():
        raise InputError(f"{option} {path} is no file")
    if path.suffix not in (".safetensors", ".gguf"):
        raise InputError(f"{option} {path} is no .safetensors or .gguf file: other formats can run code, convert it")
    state = dict(_gguf(path, option, dtype, keep) if path.suffix == ".gguf" else _safetensors(path, option, dtype))
    prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in state)), "")
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _safetensors(path: Path, option: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    stored = header(path)
    with opened(path) as file:
        scales = {}  # of each float8 weight
        for name, tensor in stored.items():
            if name.endswith(FORMAT_MARK):
                mark = parse_json(bytes(file.get_tensor(name).tolist()).decode(errors="replace"), f"{path}: {name}")
                kind = mark.get("format") if isinstance(mark, dict) else mark
                if kind not in ("float8_e4m3fn", "float8_e5m2"):
                    raise InputError(f"{option} {path} is quantised as {kind} ({name}): give float8 or plain weights")
            elif tensor.dtype in FLOAT8 and name != SCALED_MARK:
                scales[name] = next((s for end in SCALES if (s := name.removesuffix(".weight") + end) in stored), None)
        for name, tensor in stored.items():
            if name == SCALED_MARK or name.endswith((FORMAT_MARK, *INPUT_SCALES)) or name in scales.values():
                continue
            if name in scales and (scale := scales[name]) is not None:
                weight = scaled(file.get_tensor(name), file.get_tensor(scale), f"{option} {path}: {scale}")
                yield name, weight.to(dtype)
            elif tensor.dtype in FLOATS:
                yield name, file.get_tensor(name)
            else:
                raise InputError(
                    f"{option} {path} holds {tensor.dtype} values without a scale ({name}): give weights that are not"
                    " quantised, or float8 ones with their scales"
                )


def scaled(weight: Tensor, scale: Tensor, name: str) -> Tensor:
    """Multiply a weight by its scale, one number or one per row, in float32. Raises InputError for another shape."""
    if scale.numel() not in (1, len(weight)) or scale.squeeze().dim() > 1 or not scale.is_floating_point():
        raise InputError(
            f"{name} is {tuple(scale.shape)} for a weight {tuple(weight.shape)}: it must be one number, or one per row"
        )
    return weight.float() * scale.float().view(-1, *[1] * (weight.dim() - 1))


def _gguf(path: Path, option: str, dtype: torch.dtype, keep: bool) -> Iterator[tuple[str, Tensor]]:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtra(f"{option} {path} needs the package gguf: pip install 'vlmteacher[gguf]'") from error
    try:
        reader = gguf.GGUFReader(path)
        for stored in reader.tensors:
            if keep and _stays(stored.tensor_type):
                from diffusers.quantizers.gguf.utils import GGUFParameter

                yield stored.name, GGUFParameter(torch.from_numpy(np.array(stored.data)), quant_type=stored.tensor_type)
                continue
            value = torch.from_numpy(np.array(gguf.dequantize(stored.data, stored.tensor_type)))
            if field := reader.get_field(f"comfy.gguf.orig_shape.{stored.name}"):  # of more axes than GGML allows
                value = value.view([int(field.parts[i][0]) for i in field.data])
            plain = stored.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
            yield stored.name, value if plain else value.to(dtype)
    except Exception as error:  # the reader of a damaged file can raise anything
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{option} {path} cannot be loaded ({reason}): is the copy complete?") from error


def _stays(kind: Any) -> bool:
    """Whether diffusers can keep a tensor of this GGML type quantised."""
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, UNQUANTIZED_TYPES

    return kind in SUPPORTED_GGUF_QUANT_TYPES and kind not in UNQUANTIZED_TYPES
