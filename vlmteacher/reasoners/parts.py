"""The transformers of a pipeline: its own, or others that replace them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlmteacher.checkpoints.hub import find_file, find_weights, unknown_model
from vlmteacher.checkpoints.pretrained import load_network, load_single_file
from vlmteacher.errors import InputError

HUB_FILE = re.compile(r"\w[\w.-]*/[\w.-]+/[\w./-]+\.(safetensors|gguf)(@[\w./-]+)?")  # OWNER/REPO/FILE[@REVISION]


def load_transformers(
    kind: Any,
    pipeline: str,
    names: Sequence[str],
    dtype: torch.dtype,
    local_files_only: bool,
    *,
    transformer: Sequence[str] = (),
    keep_quantized: Sequence[str] = (),
) -> dict[str, Any]:
    """Load the transformers `names` of a diffusers pipeline, all of class `kind`; returns them by name.

    transformer: replacements of the pipeline's own, in the order of `names` (see `load_transformer`). keep_quantized:
    methods by which a transformer that is quantised in its files stays so.
    """
    networks = {}
    for number, name in enumerate(names):
        given = transformer[number] if number < len(transformer) else None
        networks[name] = load_transformer(kind, pipeline, name, given, dtype, local_files_only, keep_quantized)
    return networks


def load_transformer(
    kind: Any,
    pipeline: str,
    subfolder: str,
    given: str | None,
    dtype: torch.dtype,
    local_files_only: bool,
    keep_quantized: Sequence[str] = (),
) -> Any:
    """Load a transformer of the diffusers class `kind`: the pipeline's own, in `subfolder`, or its replacement.

    given: the replacement: a directory or hub id, of a transformer or of a pipeline with such a subfolder, or a
    ``.safetensors`` or ``.gguf`` file of all weights, local or on the hub, which gets the config of the pipeline's own
    transformer.

    Raises InputError: it does not exist, is of another class, or lacks weights.
    """
    how = {"dtype": dtype, "local_files_only": local_files_only, "keep_quantized": keep_quantized}
    if given is None:
        return load_network(kind, pipeline, subfolder, **how)
    path = Path(given)
    if HUB_FILE.fullmatch(given) and not path.exists():
        path = find_weights(given, "transformer")
    if path.is_file() or path.suffix in (".safetensors", ".gguf"):
        return load_single_file(kind, path, pipeline, subfolder, **how)
    for folder in (subfolder, ""):
        if find_file(given, os.path.join(folder, "config.json"), local_files_only):
            return load_network(kind, given, folder, **how)
    if not path.is_dir() and local_files_only:
        raise unknown_model(given)
    raise InputError(f"transformer {given} has no config.json, neither in {subfolder}/ nor at its top")


def check_safetensors(path: Path, option: str) -> None:
    """Raise InputError unless `path` is an existing ``.safetensors`` file; `option` names it in the message."""
    if not path.is_file():
        raise InputError(f"{option} {path} is no file")
    if path.suffix != ".safetensors":
        raise InputError(f"{option} {path} is no .safetensors file: other formats can run code, convert it first")
