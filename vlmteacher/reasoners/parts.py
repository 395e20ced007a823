"""Parts of a pipeline that come from somewhere else: another transformer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vlmteacher.errors import InputError
from vlmteacher.hub import find_file, unknown_model


def load_transformers(
    kind: Any,
    pipeline: str,
    names: Sequence[str],
    dtype: torch.dtype,
    local_files_only: bool,
    *,
    transformer: Sequence[str] = (),
) -> dict[str, Any]:
    """The transformers `names` of a diffusers pipeline, by name, all of class `kind`.

    transformer: what comes in the place of its own ones, in this order (see `load_transformer`).
    """
    networks = {}
    for number, name in enumerate(names):
        given = transformer[number] if number < len(transformer) else None
        networks[name] = load_transformer(kind, pipeline, name, given, dtype, local_files_only)
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
