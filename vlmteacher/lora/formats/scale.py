"""The scale alpha / rank of LoRA files, from their metadata or PEFT's configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmteacher.errors import InputError
from vlmteacher.files import parse_json, read_json
from vlmteacher.lora.formats.writing import METADATA_KEY

CONFIG_FILE = "adapter_config.json"  # PEFT's, beside the factors
TENSORS = "alpha tensors"
ASSUMED = "assumed: alpha = rank"
MULTIPLIED = "multiplied in by musubi-tuner's convert_lora"
ALPHAS = ("lora_alpha", "network_alpha", "alpha")
RANKS = ("r", "lora_rank", "network_dim", "rank")
# Entries of PEFT's configuration with which the update is not scale B A, or the base weights change.
REFUSED = ("use_dora", "use_qalora", "fan_in_fan_out", "layer_replication", "alora_invocation_tokens")
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Scales:
    """The alphas and ranks that a file gives apart from ``.alpha`` tensors.

    Attributes:
        config: under PEFT's names.
        source: of `config`, for messages.
        kohya: whether `config` is the metadata of kohya's scripts and musubi-tuner, whose converter to other names
            multiplies alpha into the factors without changing the metadata.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    source: str = ASSUMED
    kohya: bool = False

    def alpha(self, path: str, rank: int, down_up: bool, name: str) -> tuple[float, str]:
        """The alpha of the layer that the file names `path`, and its source. Raises InputError.

        down_up: whether the factors have kohya's names.
        """
        if self.kohya and not down_up:
            return float(rank), MULTIPLIED
        wanted = self._value("rank", "r", path, name)
        if wanted not in (None, rank):
            raise InputError(
                f"{name}: {self.source} gives rank {wanted:g} for {path}, whose factors are of rank {rank}: is it of"
                " another file?"
            )
        alpha = self._value("alpha", "lora_alpha", path, name)
        if alpha is None:
            return float(rank), ASSUMED
        return alpha * (math.sqrt(rank) if self.config.get("use_rslora") else 1.0), self.source

    def _value(self, what: str, entry: str, path: str, name: str) -> float | None:
        """The entry for `path` by PEFT's rule (`get_pattern_key`): the first pattern that matches name or end."""
        value, patterns = self.config.get(entry), self.config.get(f"{what}_pattern")
        for pattern, special in patterns.items() if isinstance(patterns, dict) else ():
            try:
                if _costly(pattern):
                    raise InputError(f"{name}: {what}_pattern {pattern!r:.60} could take forever: name the layers")
                if re.match(rf"(.*\.)?({pattern})$", path):
                    value = special
                    break
            except (re.error, OverflowError, RecursionError) as error:
                raise InputError(
                    f"{name}: {what}_pattern {pattern!r:.60} is no regular expression ({error})"
                ) from error
        try:
            number = None if value is None else float(value)
        except (ValueError, TypeError):
            number = math.nan
        if isinstance(value, bool) or (number is not None and not math.isfinite(number)):
            raise InputError(f"{name}: {self.source} gives {what} as {value!r:.60}: a number is needed")
        return number


def find_scales(metadata: Mapping[str, str], folder: Path | None, name: str, expert: str = "transformer") -> Scales:
    """The scales of a file, by its own metadata or else by PEFT's configuration in `folder`.

    expert: the transformer whose entries are read from diffusers' metadata. Raises InputError for metadata that cannot
    be read, or that is not of a plain LoRA.
    """
    for key, source in ((METADATA_KEY, f"metadata {METADATA_KEY}"), ("lora_config", "metadata lora_config")):
        if key in metadata:
            config = _json(metadata[key], f"{name}: its metadata {key}")
            own = {key.removeprefix(f"{expert}."): config[key] for key in config if key.startswith(f"{expert}.")}
            own = own or {key.removeprefix("transformer."): value for key, value in config.items()}
            return Scales(_peft(own, name, source), source)
    if folder:
        config = read_json(folder / CONFIG_FILE, "file")
        if not isinstance(config, dict):
            raise InputError(f"file {folder / CONFIG_FILE} is no JSON object")
        return Scales(_peft(config, name, CONFIG_FILE), CONFIG_FILE)
    if "ss_network_alpha" in metadata:
        config = {"lora_alpha": metadata["ss_network_alpha"], "r": metadata.get("ss_network_dim")}
        return Scales(config, "metadata ss_network_alpha", kohya=True)
    if alpha := next((entry for entry in ALPHAS if entry in metadata), None):
        rank = next((metadata[entry] for entry in RANKS if entry in metadata), None)
        return Scales({"lora_alpha": metadata[alpha], "r": rank}, f"metadata {alpha}")
    return Scales()


def _peft(config: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    """The configuration under PEFT's names. Raises InputError unless it is of a plain LoRA."""
    for switch in REFUSED:
        if config.get(switch):
            raise InputError(f"{name} was trained with {switch} ({source}): only plain LoRA can be used")
    if str(config.get("peft_type") or "LORA").upper().rpartition(".")[2] != "LORA":
        raise InputError(f"{name} is a {config['peft_type']!r:.40} ({source}): only plain LoRA can be used")
    if (start := config.get("init_lora_weights")) not in PLAIN_STARTS:
        raise InputError(
            f"{name} was trained with init_lora_weights {start!r:.40} ({source}), which changes the base weights too:"
            " have PEFT convert it to a plain LoRA (path_initial_model_for_weight_conversion)"
        )
    aliases = {"lora_alpha": ALPHAS, "r": RANKS}
    first = {key: next((config[each] for each in names if each in config), None) for key, names in aliases.items()}
    return {**config, **first}


def _costly(pattern: str) -> bool:
    """Whether matching an expression may take exponential time: it repeats groups, or has many repetitions."""
    return len(pattern) > 1000 or bool(re.search(r"\)[*+?{]", pattern)) or len(re.findall(r"[*+{]", pattern)) > 4


def _json(text: str, name: str) -> dict[str, Any]:
    value = parse_json(text, name)
    if not isinstance(value, dict):
        raise InputError(f"{name} is no JSON object")
    return value
