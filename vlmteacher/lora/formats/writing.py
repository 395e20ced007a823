"""Write safetensors files with reproducible bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration


def diffusers_bytes(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bytes:
    """A file for ``load_lora_weights``: PEFT's tensors and configuration, all under ``transformer.``."""
    # PEFT keeps the layer names in a set, whose order differs between runs.
    prefixed = {
        f"transformer.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()
    }
    metadata = {METADATA_KEY: json.dumps(prefixed, indent=2, sort_keys=True)}
    return safetensors_bytes({f"transformer.{key}": value for key, value in tensors.items()}, metadata)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file with a sorted header, because the library's order of the metadata differs between calls."""
    from safetensors.torch import save

    data = save({key: value.contiguous() for key, value in tensors.items()}, {"format": "pt", **(metadata or {})})
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
