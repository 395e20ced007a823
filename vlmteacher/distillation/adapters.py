"""The networks of a distillation: student, fake score and real score, in one set of weights or in three.

Only one network computes at a time. With LoRA all three can therefore share a transformer: the student and the fake
score are adapters of it, the real score is the transformer without an adapter. With full weights each is a network of
its own, and idle ones can be kept in main memory.
"""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmteacher.errors import InputError
from vlmteacher.lora.adapter import check_rank, remove_lora, target_modules

Role = Literal["student", "fake", "real"]


class Networks(ABC):
    """The networks by role; ``with networks.active(role) as network`` makes one ready to compute. Blocks can be nested.

    A forward or backward pass of a network must run inside the network's block, where that is the innermost one.
    """

    def __init__(self, trained: Sequence[Role]) -> None:
        self.trained = tuple(trained)
        self._stack: list[Role] = []

    @contextmanager
    def active(self, role: Role) -> Iterator[nn.Module]:
        """Make the network of `role`, one of `trained` or "real", ready to compute inside the block."""
        if role not in (*self.trained, "real"):
            raise ValueError(f"unknown role {role!r}: choose from {', '.join((*self.trained, 'real'))}")
        self._stack.append(role)
        try:
            self._enter(role)
            yield self._network(role)
        finally:
            self._stack.pop()
            if self._stack:
                self._enter(self._stack[-1])

    @abstractmethod
    def parameters(self, role: Role) -> list[nn.Parameter]:
        """The trainable parameters of a role, always in the same order; "real" has none."""

    @abstractmethod
    def student_weights(self) -> dict[str, Tensor]:
        """The student's state dict for a transformer of the same class, with the adapter merged; on the CPU."""

    @abstractmethod
    def _enter(self, role: Role) -> None: ...

    @abstractmethod
    def _network(self, role: Role) -> nn.Module: ...


class SharedBackbone(Networks):
    """One frozen transformer with a LoRA for each trained role; every role starts as the transformer itself.

    Args:
        transformer: a diffusers model (`PeftAdapterMixin`); the adapters stay on it.
        trained: roles that get an adapter.
        rank: rank of the adapters, at least 1; their scale is 1.
        seed: seed of the random A, the same for every role.
    """

    def __init__(self, transformer: Any, trained: Sequence[Role], rank: int, seed: int) -> None:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer

        super().__init__(trained)
        if rank < 1:
            raise InputError(f"the LoRA rank must be at least 1, not {rank}")
        remove_lora(transformer)
        check_rank(transformer, rank)
        transformer.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are intended
            for role in self.trained:
                targets = target_modules(transformer)
                config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets)
                transformer.add_adapter(config, adapter_name=role)
        self.transformer = transformer
        self.layers = {name: m for name, m in transformer.named_modules() if isinstance(m, BaseTunerLayer)}
        self._parameters: dict[Role, list[nn.Parameter]] = {role: [] for role in self.trained}
        for role in self.trained:
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in transformer.named_parameters():
                if ".lora_" in name and f".{role}." in name:
                    parameter.data = parameter.data.float()  # small updates are lost in bfloat16
                    if "lora_A" in name:
                        start = torch.empty(parameter.shape)
                        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
                        parameter.data.copy_(start)
                    self._parameters[role].append(parameter)
        self._enter("real")

    def parameters(self, role: Role) -> list[nn.Parameter]:
        return self._parameters.get(role, [])

    def _network(self, role: Role) -> nn.Module:
        return self.transformer

    def _enter(self, role: Role) -> None:
        for layer in self.layers.values():
            layer.enable_adapters(role != "real")
            if role != "real":
                layer.set_adapter(role)
        # PEFT freezes the adapters that it switches off; a frozen tensor gets no gradient from an earlier graph.
        for parameters in self._parameters.values():
            for parameter in parameters:
                parameter.requires_grad_(True)

    @torch.no_grad()
    def student_weights(self) -> dict[str, Tensor]:
        weights = {
            name.replace(".base_layer.", "."): value.cpu().clone()
            for name, value in self.transformer.state_dict().items()
            if ".lora_" not in name
        }
        for name, layer in self.layers.items():
            weight = weights[f"{name}.weight"]
            weights[f"{name}.weight"] = (weight.float() + layer.get_delta_weight("student").cpu()).to(weight.dtype)
        return weights


class SeparateNetworks(Networks):
    """A copy of the transformer for each trained role; the transformer itself is the real score.

    Args:
        transformer: the real score; it is frozen.
        trained: roles that get a copy.
        offload: keep idle networks in main memory (optimizer states are not moved).
    """

    def __init__(self, transformer: nn.Module, trained: Sequence[Role], offload: bool) -> None:
        super().__init__(trained)
        transformer.requires_grad_(False)
        self.networks: dict[Role, nn.Module] = {"real": transformer}
        for role in self.trained:
            self.networks[role] = copy.deepcopy(transformer).requires_grad_(True)
        self.offload = offload
        self.home = next(transformer.parameters()).device

    def parameters(self, role: Role) -> list[nn.Parameter]:
        return [p for p in self.networks[role].parameters() if p.requires_grad]

    def _network(self, role: Role) -> nn.Module:
        return self.networks[role]

    def _enter(self, role: Role) -> None:
        if not self.offload:
            return
        for other, network in self.networks.items():  # make room first
            if other not in self._stack:
                network.to("cpu")
        self.networks[role].to(self.home)

    def student_weights(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.networks["student"].state_dict().items()}
