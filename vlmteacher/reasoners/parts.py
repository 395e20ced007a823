"""Parts of a pipeline that come from somewhere else: another transformer, a LoRA that is merged into it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vlmteacher import lora
from vlmteacher.errors import InputError
from vlmteacher.hub import find_file, unknown_model
from vlmteacher.lora_files import read_lora


def load_transformers(
    kind: Any,
    pipeline: str,
    names: Sequence[str],
    dtype: torch.dtype,
    local_files_only: bool,
    *,
    transformer: Sequence[str] = (),
    few_step_lora: Sequence[str] = (),
    loader: Any = None,
) -> dict[str, Any]:
    """The transformers `names` of a diffusers pipeline, by name, all of class `kind`.

    transformer: what comes in the place of its own ones, in this order (see `load_transformer`).
    few_step_lora: files that are merged into them, in the same order, read by the `loader` (see `merge_lora`), or where
        diffusers has none by `vlmteacher.lora_files`.
    """
    for option, files in (("transformer", transformer), ("few_step_lora", few_step_lora)):
        if len(files) > len(names):
            raise InputError(f"{option}: {pipeline} has {len(names)} transformer(s), {len(files)} were given")
    networks = {}
    for number, name in enumerate(names):
        given = transformer[number] if number < len(transformer) else None
        networks[name] = load_transformer(kind, pipeline, name, given, dtype, local_files_only)
        if number < len(few_step_lora):
            file = few_step_lora[number]
            if loader is None:
                check_safetensors(Path(file), "few_step_lora")
                lora.merge_lora(networks[name], read_lora(file, f"few_step_lora {file}"))
            else:
                merge_lora(networks[name], file, loader)
    return networks


def load_transformer(
    kind: Any, pipeline: str, subfolder: str, given: str | None, dtype: torch.dtype, local_files_only: bool
) -> Any:
    """A transformer of the diffusers class `kind`: the pipeline's own, in `subfolder`, or what is `given` for it.

    given: a directory or hub id, of a transformer or of a pipeline with such a subfolder, or a ``.safetensors`` file of
    all the weights; the file has the config of the pipeline's own transformer.

    Raises InputError: it is not there, of another kind, or lacks weights.
    """
    if given is None:
        return load_part(kind, pipeline, subfolder, dtype, local_files_only)
    path = Path(given)
    if path.is_file() or path.suffix == ".safetensors":
        return _from_file(kind, path, pipeline, subfolder, dtype, local_files_only)
    for folder in (subfolder, ""):
        if find_file(given, os.path.join(folder, "config.json"), local_files_only):
            return load_part(kind, given, folder, dtype, local_files_only)
    if not path.is_dir() and local_files_only:
        raise unknown_model(given)
    raise InputError(f"transformer {given} has no config.json, neither in {subfolder}/ nor at its top")


def load_part(kind: Any, path_or_id: str, subfolder: str, dtype: torch.dtype, local_files_only: bool) -> Any:
    """A network of the diffusers class `kind`, whole. Raises InputError when its files lack weights."""
    network, info = kind.from_pretrained(
        path_or_id,
        subfolder=subfolder or None,
        torch_dtype=dtype,
        local_files_only=local_files_only,
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{path_or_id} ({subfolder or kind.__name__}) lacks {len(missing)} weights ({missing[0]}, ...):"
            " is the copy complete?"
        )
    return network


def _from_file(kind: Any, path: Path, pipeline: str, subfolder: str, dtype: torch.dtype, local: bool) -> Any:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    check_safetensors(path, "transformer")
    if kind.__name__ not in SINGLE_FILE_LOADABLE_CLASSES:
        raise InputError(f"transformer {path}: diffusers reads no single file of a {kind.__name__}: give a directory")
    with safe_open(path, "pt") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (a file, no dict)
    if quantised := sorted(dtypes - {"F32", "F16", "BF16"}):
        raise InputError(f"transformer {path} holds {quantised[0]} values: give weights that are not quantised")
    try:
        network = kind.from_single_file(
            str(path), config=pipeline, subfolder=subfolder, torch_dtype=dtype, local_files_only=local
        )
    except NotImplementedError as error:  # what torch says of a weight that nobody brought
        raise InputError(f"transformer {path} lacks weights of the {kind.__name__} in {pipeline}") from error
    keep = network._keep_in_fp32_modules or ()
    for name, parameter in network.named_parameters():
        if any(part in keep for part in name.split(".")):
            parameter.data = parameter.data.float()  # as from_pretrained has it
    return network


def check_safetensors(path: Path, option: str) -> None:
    if not path.is_file():
        raise InputError(f"{option} {path} is no file")
    if path.suffix != ".safetensors":
        raise InputError(f"{option} {path} is no .safetensors file: other formats can run code, convert it first")


def merge_lora(transformer: Any, file: str, pipeline: Any) -> None:
    """Add a LoRA to the weights of `transformer`: W + scale B A in float32, rounded once to the dtype of W.

    file: ``.safetensors`` in any key style that `pipeline`, a diffusers class with a LoRA loader, reads.
    Raises InputError, without changing a weight, for a LoRA of another model.
    """
    path = Path(file)
    check_safetensors(path, "few_step_lora")
    wrong = f"few_step_lora {path} is no LoRA for this {type(transformer).__name__}"
    try:
        state, metadata = pipeline.lora_state_dict(str(path), return_lora_metadata=True)
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(f"{wrong} ({' '.join(str(error).split())[:200]})") from error
    layers = dict(transformer.named_modules())
    for key, value in state.items():
        name, _, kind = key.removeprefix("transformer.").partition(".lora_")
        weight = getattr(layers.get(name), "weight", None)
        sides = {"A.weight": (-1, 1), "B.weight": (0, 0), "B.bias": (0, 0)}.get(kind)
        if weight is None or sides is None:
            raise InputError(f"{wrong}: it has {key}")
        if not value.isfinite().all():
            raise InputError(f"{wrong}: {key} holds values that are not finite")
        if value.shape[sides[0]] != weight.shape[sides[1]]:
            raise InputError(f"{wrong}: {key} is {tuple(value.shape)}, the layer {tuple(weight.shape)}")
    transformer.load_lora_adapter(state, adapter_name="few_step", metadata=metadata)
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:  # which was rounded to the dtype of W
            key = f"transformer.{name.replace('.few_step.', '.')}"
            parameter.data = state.get(key, torch.zeros(parameter.shape)).float()  # some layers may have no bias
    transformer.fuse_lora()
    transformer.unload_lora()
