"""A LoRA that is applied while a Teacher writes queries; its frozen weights judge, which such training would harm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmteacher.checkpoints.hub import find_file
from vlmteacher.checkpoints.pretrained import read_config
from vlmteacher.errors import InputError

# The supported entries of an adapter_config.json; others make layers of other kinds, or import code.
ENTRIES = {"r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora"}
ENTRIES |= {"lora_dropout", "bias", "layers_to_transform", "layers_pattern", "fan_in_fan_out"}
NOTES = {"auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type", "inference_mode"}


@dataclass(frozen=True)
class Writer:
    """A LoRA of peft. config: its `LoraConfig`. weights: as in ``adapter_model.safetensors``."""

    config: Any
    weights: dict[str, Tensor]

    @classmethod
    def load(cls, model: Any, path_or_id: str, subfolder: str, local_files_only: bool = False) -> Writer:
        """Read the LoRA of `model` from its checkpoint's `subfolder`. Raises InputError when it does not fit."""
        from peft import LoraConfig
        from safetensors.torch import load_file

        try:
            _, values = read_config(path_or_id, subfolder, "adapter_config.json", local_files_only)
            defaults = LoraConfig()
            for name, value in values.items():
                if name not in ENTRIES | NOTES and value not in (None, False, getattr(defaults, name, None)):
                    raise ValueError(f"its adapter_config.json sets {name}, which is not supported: remove it")
            config = LoraConfig(**{name: values[name] for name in ENTRIES & set(values)}, inference_mode=True)
            file = find_file(path_or_id, f"{subfolder}/adapter_model.safetensors", local_files_only)
            if file is None:
                raise ValueError("it has no adapter_model.safetensors")
            writer = cls(config, load_file(file))
            with writer.on(model):
                return writer
        except Exception as error:  # a damaged file raises anything
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"teacher {path_or_id!r}: its writer {subfolder!r} cannot be used: {reason}") from error

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Apply the LoRA to `model` inside the context; afterwards its layers are the same objects as before."""
        from peft import PeftModel, set_peft_model_state_dict

        with torch.random.fork_rng(devices=[]):  # peft draws initial weights, which are overwritten
            adapted = PeftModel(model, self.config)
        try:
            loaded = set_peft_model_state_dict(adapted, self.weights)
            if wrong := loaded.unexpected_keys or [key for key in loaded.missing_keys if "lora_" in key]:
                raise ValueError(f"its weights and its config do not agree on {wrong[0]}")
            yield
        finally:
            adapted.unload()
