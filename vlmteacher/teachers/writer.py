"""A LoRA for writing queries, beside the frozen weights that judge: what helps the one would spoil the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmteacher.errors import InputError


@dataclass(frozen=True)
class Writer:
    """config: peft's of the LoRA. weights: as peft keeps them in ``adapter_model.safetensors``."""

    config: Any
    weights: dict[str, Tensor]

    @classmethod
    def load(cls, model: Any, path_or_id: str, subfolder: str, local_files_only: bool = False) -> Writer:
        """Read the adapter of `model` in its checkpoint's `subfolder`. Raises InputError when it is no LoRA for it."""
        from peft import LoraConfig
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers.utils import cached_file

        def find(name: str) -> str:
            return cached_file(path_or_id, name, subfolder=subfolder, local_files_only=local_files_only)

        try:
            config = LoraConfig(**LoraConfig.from_json_file(find("adapter_config.json")))
            config.inference_mode = True
            writer = cls(config, load_file(find("adapter_model.safetensors")))
            with writer.on(model):
                return writer
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"teacher {path_or_id!r}: its writer {subfolder!r} cannot be used: {reason}") from error

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Inside, the layers of `model` are peft's with the LoRA; afterwards they are the very ones of before."""
        from peft import PeftModel, set_peft_model_state_dict

        with torch.random.fork_rng(devices=[]):  # peft draws first weights, which are overwritten
            adapted = PeftModel(model, self.config)
        try:
            loaded = set_peft_model_state_dict(adapted, self.weights)
            if wrong := loaded.unexpected_keys or [key for key in loaded.missing_keys if "lora_" in key]:
                raise ValueError(f"its weights and its config do not agree on {wrong[0]}")
            yield
        finally:
            adapted.unload()
