"""Read LoRA files: every tensor is used, or the file is refused with the name of that tensor."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.lora.formats.keys import TEXT_ENCODERS, Expert, Key, parse_key
from vlmteacher.lora.formats.lora import HOW_TO_GO_ON, Factors, LoRA, split_fused
from vlmteacher.lora.formats.names import BLOCK, FUSED, split_rows
from vlmteacher.lora.formats.scale import CONFIG_FILE, TENSORS, Scales, find_scales

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # bfloat16 has all of their values
LARGEST = 1e15  # sums of squares of such values are finite in float32; those of trained LoRAs are about 1
FACTORS_FILE = "adapter_model.safetensors"  # PEFT's; its configuration does not hold for other files in the folder


def read_lora(source: str | os.PathLike[str] | bytes, name: str | None = None, partial: bool = False) -> LoRA:
    """Read the LoRA of one transformer from a safetensors file, its bytes, or PEFT's folder; nothing is executed.

    name: the LoRA's name in messages, by default the path. partial: leave out tensors of other networks: of a text
    encoder, of layers that no known family has, of the low-noise expert in a file of both.

    Raises InputError: a file that cannot be read, a tensor that cannot be used, an incomplete pair of factors, values
    that are not finite.
    """
    experts = read_experts(source, name, partial)
    lora = experts.get("transformer") or experts.get(None)
    if lora is None:
        raise InputError(f"{experts['transformer_2'].source} is for the low-noise expert: give one for high noise")
    if others := experts.get("transformer_2"):
        if not partial:
            raise InputError(
                f"{lora.source} has LoRAs of two experts ({others.tensors()[0]}), and one can be used here, that of the"
                f" high noise: {HOW_TO_GO_ON}"
            )
        return lora.without(others.tensors())
    return lora


def read_experts(
    source: str | os.PathLike[str] | bytes, name: str | None = None, partial: bool = False
) -> dict[Expert | None, LoRA]:
    """Read the LoRAs in a file (see `read_lora`), by the expert that the keys name, or None."""
    label = name or ("the LoRA" if isinstance(source, bytes) else f"LoRA {os.fspath(source)}")
    tensors, metadata, folder = _open(source, label)
    keys: dict[str, Key] = {}
    unused: list[str] = []
    for key, value in tensors.items():
        parsed = parse_key(key)
        if TEXT_ENCODERS.match(key) or (parsed and parsed.unknown):
            unused.append(key)
        elif parsed is None or not _shaped(parsed, value):
            raise InputError(
                f"{label} holds {key} {tuple(value.shape)}: only plain LoRA factors and weight differences can be used,"
                " no DoRA and no other decompositions"
            )
        else:
            keys[key] = parsed
    if unused and not partial:
        what = (
            "is of a text encoder" if TEXT_ENCODERS.match(unused[0]) else "is of a layer that no model known here has"
        )
        raise InputError(f"{label} holds {unused[0]}, which {what} ({len(unused)} such tensors): {HOW_TO_GO_ON}")
    if not keys:
        raise InputError(f"{label} holds nothing for a video model that is known here")
    experts = {key.expert for key in keys.values()}
    if None in experts and len(experts) > 1:  # "transformer." beside "transformer_2."
        if "transformer" in experts:
            odd = next(key for key, parsed in keys.items() if parsed.expert is None)
            raise InputError(f"{label} has LoRAs of two experts, and {odd}, which names neither")
        keys = {k: Key(**{**vars(parsed), "expert": parsed.expert or "transformer"}) for k, parsed in keys.items()}
        experts = {"transformer", "transformer_2"}
    return {
        expert: _build(
            {key: (parsed, tensors[key]) for key, parsed in keys.items() if parsed.expert == expert},
            find_scales(metadata, folder, label, expert or "transformer"),
            label,
            tuple(unused),
        )
        for expert in sorted(experts, key=str)
    }


def _open(
    source: str | os.PathLike[str] | bytes, name: str
) -> tuple[dict[str, Tensor], Mapping[str, str], Path | None]:
    """The tensors, the metadata, and the folder if it holds PEFT's configuration of this file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    folder = None
    try:
        if isinstance(source, bytes):
            data = source
        else:
            path = Path(os.path.expanduser(source))
            if path.is_dir():
                path = _file_in(path, name)
            if path.exists() and not path.is_file():  # a device has no end
                raise InputError(f"{name} is no file: give a .safetensors file or a PEFT folder")
            data = path.read_bytes()
            if (path.parent / CONFIG_FILE).is_file() and (
                path.name == FACTORS_FILE or not (path.parent / FACTORS_FILE).exists()
            ):
                folder = path.parent
        tensors = dict(sorted(load(data).items()))  # the order that the library returns differs between calls
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["?"])[0][:120]
        raise InputError(f"{name} cannot be read ({reason}): give a complete .safetensors file") from error
    if not tensors:
        raise InputError(f"{name} holds no tensors")
    return tensors, metadata, folder


def _file_in(folder: Path, name: str) -> Path:
    """The file of factors in PEFT's folder, or the only safetensors file."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        if file.name == FACTORS_FILE or len(files) == 1:
            return file
    raise InputError(f"{name} is a directory with {len(files)} .safetensors files: name one, or give a PEFT folder")


def _shaped(key: Key, value: Tensor) -> bool:
    """Whether a tensor has a number of axes that its key allows: factors of convolutions have more than two."""
    if key.part == "alpha":
        return value.numel() == 1
    return value.ndim in {"A": (2, 4, 5), "B": (2, 4, 5), "bias": (1,), "diff_b": (1,)}.get(key.part, range(1, 6))


def _build(tensors: Mapping[str, tuple[Key, Tensor]], scales: Scales, name: str, unused: tuple[str, ...]) -> LoRA:
    """Make the LoRA of one expert from its parsed tensors. Raises InputError."""
    parts: dict[str, dict[str, Tensor]] = {}
    paths: dict[str, Key] = {}
    diffs: dict[str, Tensor] = {}
    keys: dict[str, tuple[str, ...]] = {}
    for key, (parsed, value) in tensors.items():
        value = _checked(key, value, name)
        target: dict[str, Tensor]
        if parsed.part.startswith("diff"):
            target, entry, layer = diffs, parsed.parameter, parsed.parameter
        else:
            target, entry, layer = parts.setdefault(parsed.name, {}), parsed.part, parsed.name
            paths[parsed.name] = parsed
        if entry in target:
            raise InputError(f"{name} holds {key} twice, under two names: {keys[layer][0]} is the other")
        target[entry] = value
        keys[layer] = (*keys.get(layer, ()), key)
    layers: dict[str, Factors] = {}
    sources: Counter[str] = Counter()
    for layer, part in parts.items():
        if not {"A", "B"} <= part.keys():
            raise InputError(f"{name} holds only {' and '.join(keys[layer])} of {layer}: the file is not complete")
        a, b = part["A"], part["B"]
        if a.shape[0] != b.flatten(1).shape[1] or not a.shape[0]:
            raise InputError(f"{name}: the factors of {layer} are of rank {a.shape[0]} and {b.flatten(1).shape[1]}")
        if BLOCK.match(layer) and not a.ndim == b.ndim == 2:
            raise InputError(f"{name} holds factors of a convolution ({keys[layer][0]}), where the models have none")
        if "alpha" in part:
            alpha, source = float(part["alpha"]), TENSORS
        else:
            alpha, source = scales.alpha(paths[layer].path, a.shape[0], paths[layer].kohya, name)
        if alpha == 0:
            raise InputError(f"{name}: alpha of {layer} is 0 ({source}), so it would change nothing")
        sources[source] += 1
        if "bias" in part:  # PEFT's lora_bias: the bias of B, scaled like it
            if (bias := f"{layer}.bias") in diffs:
                raise InputError(f"{name} holds a bias of {layer} twice: {', '.join((*keys[layer], *keys[bias]))}")
            diffs[bias] = part["bias"].float() * (alpha / a.shape[0])
            keys[bias] = tuple(key for key in keys[layer] if key.endswith("bias"))
            keys[layer] = tuple(key for key in keys[layer] if not key.endswith("bias"))
        factors = Factors(a, b, alpha)
        if not factors.norm() <= LARGEST:
            raise InputError(
                f"{name}: the update of {layer} ({', '.join(keys[layer])}) is of norm {factors.norm():.1g}, with which"
                " products are not finite: its training broke down"
            )
        whole = split_fused(layer, factors)
        layers |= whole
        keys |= dict.fromkeys(whole, keys[layer])
    for parameter in list(diffs):
        parted = _split_diff(parameter, diffs.pop(parameter))
        diffs |= parted
        keys |= dict.fromkeys(parted, keys[parameter])
    listed = "; ".join(f"{source} ({count} of {len(parts)} layers)" for source, count in sources.most_common())
    scale_source = next(iter(sources)) if len(sources) == 1 else listed
    return LoRA(layers, name, diffs, scale_source or "no factors", keys, unused)


def _split_diff(parameter: str, value: Tensor) -> dict[str, Tensor]:
    """Split a difference of a layer of `FUSED` into those of its layers."""
    layer, _, kind = parameter.rpartition(".")
    for fused, held in FUSED.items():
        if layer.endswith(f".{fused}"):
            block = layer.removesuffix(fused)
            parts = split_rows(value, held)
            return {f"{block}{each}.{kind}": part.clone() for each, part in zip(held, parts, strict=True)}
    return {parameter: value}


def _checked(key: str, value: Tensor, name: str) -> Tensor:
    """Check dtype and values of a tensor, and turn float8 into bfloat16, exactly. Raises InputError."""
    if value.dtype in FLOAT8:
        value = value.to(torch.bfloat16)
    elif value.dtype not in DTYPES and not (key.endswith(".alpha") and value.dtype in (torch.int64, torch.int32)):
        raise InputError(
            f"{name} holds {key} in {value.dtype}: only {', '.join(map(str, DTYPES))} and float8 can be used"
        )
    if not value.isfinite().all():
        raise InputError(f"{name} holds {key} with values that are no finite numbers: its training broke down")
    if value.numel() and (size := float(value.abs().max())) > LARGEST:
        raise InputError(
            f"{name} holds {key} with values up to {size:.1g}, whose products are not finite: its training broke down"
        )
    return value
