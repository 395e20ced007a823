"""A LoRA in memory, independent of a model and of a file's style."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from vlmteacher.errors import InputError, Notice
from vlmteacher.lora.formats.names import BLOCK, FUSED, split_rows, theirs
from vlmteacher.lora.formats.scale import ASSUMED, MULTIPLIED
from vlmteacher.lora.formats.writing import diffusers_bytes, safetensors_bytes
from vlmteacher.reasoners.family import TABLE, Family, LayerNames
from vlmteacher.reasoners.registry import FAMILIES, family_of

if TYPE_CHECKING:
    from peft import LoraConfig

Style = Literal["diffusers", "comfyui", "musubi"]
HOW_TO_GO_ON = "--lora-partial (partial=True) leaves it out"
STYLES: tuple[Style, ...] = get_args(Style)


@dataclass(frozen=True)
class Factors:
    """The update of one layer, (alpha / rank) B A: a (rank, in), b (out, rank); with further axes for convolutions."""

    a: Tensor
    b: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def linear(self) -> bool:
        return self.a.ndim == self.b.ndim == 2

    def update(self) -> Tensor:
        """The update (out, in) float32, which is added to the weight."""
        return self.scale * (self.b.float().flatten(1) @ self.a.float().flatten(1))

    def norm(self) -> float:
        """The Frobenius norm of `update`, from the factors: |s| sqrt(tr(B'B AA')), in float64."""
        a, b = self.a.double().flatten(1), self.b.double().flatten(1)
        return abs(self.scale) * float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


@dataclass(frozen=True)
class LoRA:
    """A LoRA of one transformer.

    Attributes:
        layers: factors by diffusers' name of the layer.
        source: the name of the LoRA in messages.
        differences: differences of parameters (norms, biases, modulations) by diffusers' name, which can be merged but
            not trained.
        scale_source: where the file says alpha.
        keys: the file's names of the tensors, by layer and difference.
        unused: the file's tensors that are left out.
    """

    layers: Mapping[str, Factors]
    source: str = "the LoRA"
    differences: Mapping[str, Tensor] = field(default_factory=dict)
    scale_source: str = "made here"
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The most frequent rank of the layers; 0 without layers."""
        return Counter([layer.rank for layer in self.layers.values()] or [0]).most_common(1)[0][0]

    @property
    def alpha(self) -> float:
        """The most frequent alpha of the layers; 0 without layers."""
        return Counter([layer.alpha for layer in self.layers.values()] or [0.0]).most_common(1)[0][0]

    @property
    def family(self) -> Family:
        """The family of the LoRA's model, by the names of the layers. Raises InputError for an unknown one."""
        inner = {(name.partition(".")[0], match[2]) for name in self.layers if (match := BLOCK.fullmatch(name))}
        for family in FAMILIES:
            if inner and inner <= {
                (blocks, own) for blocks, names in family.names().items() for own in names.own_inner
            }:
                return family
        known = ", ".join(family.name for family in FAMILIES)
        raise InputError(f"{self.source} is for a model of no known family: the known ones are {known}")

    def tensors(self) -> tuple[str, ...]:
        """The file's names of the tensors in use; diffusers' names without a file."""
        names = (*self.layers, *self.differences)
        return tuple(dict.fromkeys(key for name in names for key in self.keys.get(name, (name,))))

    def factors_only(self) -> LoRA:
        """The LoRA without its weight differences, which move to `unused`."""
        keys = tuple(key for name in self.differences for key in self.keys.get(name, (name,)))
        return replace(self, differences={}, unused=self.unused + keys)

    def without(self, keys: tuple[str, ...]) -> LoRA:
        """The LoRA with further tensors of its file in `unused`."""
        return replace(self, unused=self.unused + keys)

    def config(self) -> LoraConfig:
        """PEFT's configuration; ranks and alphas that differ from `rank` and `alpha` are in its patterns."""
        from peft import LoraConfig

        rank, alpha = self.rank, self.alpha
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,  # PEFT accepts fractions
            lora_dropout=0.0,
            target_modules=sorted(self.layers),
            rank_pattern={name: layer.rank for name, layer in self.layers.items() if layer.rank != rank},
            alpha_pattern={name: layer.alpha for name, layer in self.layers.items() if layer.alpha != alpha},
        )

    def fitted(self, transformer: nn.Module, partial: bool = False, trainable: bool = False) -> LoRA:
        """Check the LoRA against a transformer; returns the LoRA, with `partial` without the parts that do not fit.

        partial: move layers and parameters that `transformer` does not have to `unused`; layers of its blocks of
        another size are refused nevertheless. trainable: for an adapter, which cannot hold `differences`.

        Raises InputError, which names the first part that does not fit.
        """
        kind = type(transformer).__name__
        if trainable:
            self._check_trained(transformer)
        modules, parameters = dict(transformer.named_modules()), dict(transformer.named_parameters())
        unused: list[str] = []
        for name in (*self.layers, *self.differences):
            wanted: tuple[int, ...] | None = None
            if layer := self.layers.get(name):
                module = modules.get(name)
                if isinstance(module, nn.Linear if trainable else nn.Linear | nn.Conv2d | nn.Conv3d):
                    linear = isinstance(module, nn.Linear)  # whose weight may be packed
                    shape = (module.out_features, module.in_features) if linear else tuple(module.weight.shape)
                    wanted = (shape[0], math.prod(shape[1:])) if layer.linear else shape
                given = (layer.b.shape[0], *layer.a.shape[1:])
            else:
                given = tuple(self.differences[name].shape)
                if name in parameters and not trainable:
                    wanted = tuple(parameters[name].shape)
            if trainable and layer and not (layer.a.any() or layer.b.any()):
                raise InputError(
                    f"{self.source} cannot be trained: both factors of {name} are 0"
                    f" ({', '.join(self.keys.get(name, (name,)))}), so that neither gets a gradient"
                )
            if wanted == given:
                continue
            key = f" ({self.keys[name][0]})" if name in self.keys else ""
            if layer is None and trainable:
                reason = f"holds a weight difference of {name}{key}, which can be merged and not trained"
            elif wanted is None:
                what = "linear layer" if layer else "parameter"
                reason = f"is a LoRA for another model: this {kind} has no {what} {name}{key}"
            else:
                sizes = [" -> ".join(map(str, (*size[1:], size[0]))) for size in (given, wanted)]
                reason = f"is a LoRA for another model: its {name}{key} is {sizes[0]}, that of this {kind} {sizes[1]}"
            can_go = wanted is None or not BLOCK.match(name)
            if not (partial and can_go):
                raise InputError(f"{self.source} {reason}{f': {HOW_TO_GO_ON}' if can_go else ''}")
            unused.append(name)
        if not unused:
            return self
        layers, differences = (
            {name: value for name, value in parts.items() if name not in unused}
            for parts in (self.layers, self.differences)
        )
        if not any(map(BLOCK.match, layers)) and (any(map(BLOCK.match, self.layers)) or not differences):
            raise InputError(f"{self.source} is a LoRA for another model: this {kind} has none of its layers")
        keys = tuple(key for name in unused for key in self.keys.get(name, (name,)))
        return replace(self, layers=layers, differences=differences, unused=self.unused + keys)

    def _check_trained(self, transformer: nn.Module) -> None:
        """Raise InputError where no layer of the transformer's blocks is one that the optimisation adapts."""
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        targets = LoraConfig(target_modules=family_of(transformer).lora_targets)
        names = [name for name, _ in transformer.named_modules() if name in self.layers]
        if names and not any(check_target_module_exists(targets, name) for name in names):
            raise InputError(
                f"{self.source} has no layer that is optimised here ({names[0]} is none): it can be merged"
                " (--few-step-lora, pipe.fuse), and not continued"
            )

    def tell(self) -> None:
        """Warn (Notice) of an assumed scale, and of tensors that stay unused."""
        if ASSUMED in self.scale_source:
            warnings.warn(
                f"{self.source}: without an alpha, alpha = rank is assumed, a scale of 1 ({self.scale_source})",
                Notice,
                stacklevel=3,
            )
        if MULTIPLIED in self.scale_source:
            warnings.warn(
                f"{self.source} has alpha in its metadata, but not the names of the tool that writes it: taken as"
                f" {self.scale_source}",
                Notice,
                stacklevel=3,
            )
        if self.unused:
            kinds = Counter(re.sub(r"(blocks[._])\d+", r"\1*", key) for key in self.unused)
            listed = ", ".join([*kinds][:20]) + (", ..." if len(kinds) > 20 else "")
            total = len(self.unused) + len(self.tensors())
            warnings.warn(
                f"{self.source}: {len(self.unused)} of {total} tensors stay unused: {listed}", Notice, stacklevel=3
            )

    def state_dict(self) -> dict[str, Tensor]:
        """The factors under PEFT's names (``blocks.0.attn1.to_q.lora_A.weight``)."""
        return {
            f"{name}.lora_{part}.weight": value
            for name, layer in self.layers.items()
            for part, value in (("A", layer.a), ("B", layer.b))
        }

    def to_bytes(self, style: Style) -> bytes:
        """Write a safetensors file of a style; equal LoRAs give equal bytes.

        Raises InputError for weight differences that the style cannot hold, or a family that the tool does not know.
        """
        if self.differences and style != "comfyui":
            name = next(iter(self.differences))
            raise InputError(
                f"{self.source} holds a weight difference of {name} ({self.keys.get(name, (name,))[0]}), which files of"
                f" {style} have no place for: convert it to comfyui, or leave differences out (--lora-partial)"
            )
        if style == "diffusers":
            return diffusers_bytes(self.state_dict(), self.config().to_dict())
        family = self.family
        lists = family.names(comfyui=style == "comfyui")
        layers = _fuse(self, lists)

        def named(name: str) -> str:
            return theirs(name, _names(name, lists), self.source)

        tensors = {}
        if style == "comfyui":
            for name, layer in layers.items():
                key = f"diffusion_model.{named(name)}"
                tensors[f"{key}.lora_A.weight"] = layer.a
                tensors[f"{key}.lora_B.weight"] = layer.b if layer.scale == 1 else layer.b * layer.scale
            for parameter, value in self.differences.items():
                name, _, kind = parameter.rpartition(".")
                name, end = (parameter, "diff") if kind == TABLE else (name, "diff_b" if kind == "bias" else "diff")
                tensors[f"diffusion_model.{named(name)}.{end}"] = value
            return safetensors_bytes(tensors)
        if family.musubi is None:
            raise InputError(f"{self.source}: musubi-tuner has no {family.name}: convert it to comfyui")
        for name, layer in layers.items():
            key = f"lora_unet_{named(name).replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = layer.a, layer.b
            tensors[f"{key}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
        network = {"module": family.musubi, "dim": str(self.rank), "alpha": str(self.alpha)}
        return safetensors_bytes(tensors, {f"ss_network_{name}": value for name, value in network.items()})


def _names(name: str, lists: Mapping[str, LayerNames]) -> LayerNames:
    """The names for the layer `name` of diffusers, from those of each list of blocks."""
    return lists.get(name.partition(".")[0]) or next(iter(lists.values()))


def _fuse(lora: LoRA, lists: Mapping[str, LayerNames]) -> dict[str, Factors]:
    """The layers with those joined that are one layer by the names in `lists`.

    A is stacked, B a block diagonal matrix, times the scales where they differ.
    """
    layers = dict(lora.layers)
    for name in lora.layers:
        for fused, held in _names(name, lists).fused.items():
            if not name.endswith(f".{held[0]}"):
                continue
            block = name.removesuffix(held[0])
            if missing := [each for each in held if block + each not in layers]:
                raise InputError(f"{lora.source} has {name} but no {block + missing[0]}: there they are one layer")
            parts = [layers.pop(block + each) for each in held]
            scale = parts[0].scale if len({part.scale for part in parts}) == 1 else 1.0
            b = torch.block_diag(*(part.b * (part.scale / scale) for part in parts))
            layers[block + fused] = Factors(torch.cat([part.a for part in parts]), b, scale * b.shape[1])
    return layers


def split_fused(name: str, layer: Factors) -> dict[str, Factors]:
    """Split a layer of `FUSED` into its parts, each with its share of the rank where B is block diagonal (`_fuse`)."""
    for fused, held in FUSED.items():
        if name.endswith(f".{fused}"):
            block, scale = name.removesuffix(fused), layer.scale
            a, b = [layer.a.clone() for _ in held], split_rows(layer.b, held)
            if layer.rank % len(held) == 0:
                own = [rows.tensor_split(len(held), dim=1)[i] for i, rows in enumerate(b)]
                if torch.equal(torch.block_diag(*own), layer.b):
                    a, b = list(layer.a.chunk(len(held))), own
            return {
                block + each: Factors(part_a, part_b, scale * len(part_a))
                for each, part_a, part_b in zip(held, a, b, strict=True)
            }
    return {name: layer}
