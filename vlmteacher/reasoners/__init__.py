"""Reasoners: the video models that are taught."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError

from vlmteacher.errors import InputError
from vlmteacher.hub import only_local
from vlmteacher.reasoners.base import Condition, Noise, Reasoner, Settings
from vlmteacher.reasoners.hunyuan_video15 import load_hunyuan_video15
from vlmteacher.reasoners.ltx import load_ltx
from vlmteacher.reasoners.wan import load_wan

__all__ = ["Condition", "Noise", "Reasoner", "Settings", "load_reasoner"]

# diffusers pipeline class -> loader of its family
FAMILIES = {
    "WanPipeline": load_wan,
    "WanImageToVideoPipeline": load_wan,
    "LTXPipeline": load_ltx,
    "LTXImageToVideoPipeline": load_ltx,
    "LTXConditionPipeline": load_ltx,
    "HunyuanVideo15Pipeline": load_hunyuan_video15,
    "HunyuanVideo15ImageToVideoPipeline": load_hunyuan_video15,
}


def load_reasoner(
    path_or_id: str | os.PathLike[str], dtype: torch.dtype = torch.float32, local_files_only: bool | None = None
) -> Reasoner:
    """Load the Reasoner of a diffusers pipeline: a local directory or a hub id.

    The family follows from the class in ``model_index.json``. A ``reasoner.json`` beside it sets sampler and sizes.
    `local_files_only`: never ask the network; by default it is asked when it is needed and can be reached.

    Raises:
        InputError: it cannot be found or read, or is of no known family.
    """
    name = os.path.expanduser(os.fspath(path_or_id))
    if local_files_only is None:
        local_files_only = only_local(name)
    hub = {"local_files_only": local_files_only}
    index_file = _find(name, "model_index.json", local_files_only)
    if index_file is None:
        raise InputError(f"{name} is no diffusers pipeline: it has no model_index.json")
    try:
        index = json.loads(index_file.read_text())
        family = index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index_file} is no diffusers pipeline index") from error
    if family not in FAMILIES:
        raise InputError(f"{name} is a {family}: the known Reasoners are {', '.join(FAMILIES)}")
    settings_file = _find(name, "reasoner.json", local_files_only)
    settings = Settings.load(settings_file) if settings_file else Settings()
    try:
        return FAMILIES[family](name, index, settings, dtype, **hub)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{name} cannot be loaded ({reason}): is the copy complete?") from error


def _find(name: str, file: str, local_files_only: bool) -> Path | None:
    """`file` of a local pipeline directory or hub repository; None where that has none."""
    directory = Path(name)
    if directory.is_dir():
        return directory / file if (directory / file).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, local_files_only=local_files_only))
    except LocalEntryNotFoundError as error:
        if file != "model_index.json":  # optional, and the pipeline itself was found in the cache
            return None
        raise _unknown(name) from error
    except EntryNotFoundError:
        return None
    except (HFValidationError, OSError) as error:
        raise _unknown(name) from error


def _unknown(name: str) -> InputError:
    return InputError(
        f"{name} is neither a directory nor a model that can be reached on the hub: check the name and the network, or"
        " give a local directory (`hf download OWNER/MODEL --local-dir DIR`)"
    )
