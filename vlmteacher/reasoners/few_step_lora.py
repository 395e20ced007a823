"""Few-step LoRAs: assigning them to the experts of a model, and merging them into the weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from vlmteacher.errors import InputError, Notice
from vlmteacher.lora.formats import LoRA, merge_lora, read_experts
from vlmteacher.reasoners.parts import check_safetensors

EXPERTS = {"transformer": "high", "transformer_2": "low"}  # diffusers' name -> the expert's noise levels
MUCH = 0.5  # share of an update that rounding may lose without a Notice


def check_experts(option: str, given: Sequence[str], experts: Sequence[str], pipeline: str) -> None:
    """Raise InputError for more files than `experts`, or for a file that is for another expert by its name.

    A Notice says what is assumed of files whose names do not tell the expert.
    """
    if len(given) > len(experts):
        raise InputError(f"{option}: {pipeline} has {len(experts)} transformer(s), {len(given)} were given")
    if len(experts) == 1:
        return
    order = [EXPERTS[expert] for expert in experts]
    for file, wanted in zip(given, order, strict=False):
        if (said := noise_in_name(file)) not in (None, wanted):
            raise InputError(
                f"{option} {file} is for the {said}-noise expert by its name, and stands where the {wanted}-noise one"
                " is expected: give two, high noise first"
            )
    unsaid = [
        f"{file} for {wanted} noise" for file, wanted in zip(given, order, strict=False) if not noise_in_name(file)
    ]
    if 0 < len(given) < len(order):
        unsaid.append(f"{pipeline}'s own for {order[-1]} noise")
    if unsaid and len(set(given)) == len(given):
        warnings.warn(f"{option}: assumed is {', '.join(unsaid)}", Notice, stacklevel=4)


def noise_in_name(path: str) -> Literal["high", "low"] | None:
    """The noise levels of the expert that a file is for, by its name or its directory's; None where neither tells."""
    file = Path(path)
    for name, pattern in (
        (file.name, r"(high|low)[ _.-]?noise"),
        (file.name, r"(?<![a-z])(high|low)(?![a-z])"),
        (file.absolute().parent.name, r"(high|low)[ _.-]?noise"),
    ):
        said = set(re.findall(pattern, name.lower()))
        if len(said) == 1:
            return said.pop()
    return None


def read_few_step_loras(
    files: Sequence[str], experts: Sequence[str], pipeline: str, partial: bool, replaced: int
) -> dict[str, LoRA]:
    """Read the LoRA of each of the `experts` (names of transformers): two files, high noise first, or one with both.

    replaced: the number of transformers that are not the pipeline's own. Raises InputError for a file that
    `read_experts` refuses, and for an expert of the pipeline that would be sampled in few steps without a LoRA.
    """
    loras: dict[str, LoRA] = {}
    for number, file in enumerate(files):
        if not Path(file).is_dir():
            check_safetensors(Path(file), "few_step_lora")
        held = read_experts(file, f"few_step_lora {file}", partial)
        if len(experts) == 1:
            lora = held.get("transformer") or held.get(None)
            other = held.get("transformer_2")
            if lora is None or (other and not partial):
                raise InputError(
                    f"few_step_lora {file} has a LoRA of a low-noise expert ({(other or lora).tensors()[0]}), which"  # type: ignore[union-attr]
                    f" {pipeline} does not have: --lora-partial (partial=True) leaves it out"
                )
            held = {"transformer": lora.without(other.tensors()) if other else lora}
        for expert, lora in held.items():
            name = expert or experts[min(number, len(experts) - 1)]
            if name in loras or (len(files) > 1 and name != experts[number]):
                raise InputError(
                    f"few_step_lora {file} holds a LoRA of the {EXPERTS[name]}-noise expert ({lora.tensors()[0]}),"
                    " which the other file is for: give high noise first, or one file of both"
                )
            loras[name] = lora
    if 0 < len(loras) < len(experts) and replaced < len(experts):
        missing = next(each for each in experts if each not in loras)
        raise InputError(
            f"few_step_lora {', '.join(files)}: {pipeline} has two experts, and the {EXPERTS[missing]}-noise one would"
            " be sampled in few steps as it is: give two files, high noise first (the same twice where it is for both)"
        )
    if not (len(files) == 1 and len(loras) == 2):  # whose tensors name their experts
        check_experts("few_step_lora", files, experts, pipeline)
    return loras


def merge_few_step_loras(reasoner: Any, loras: Mapping[str, LoRA], partial: bool) -> dict[str, str]:
    """Merge each LoRA into its transformer. Returns the notes on them for run.json. Raises InputError."""
    notes: dict[str, str] = {}
    fitted = {name: lora.fitted(getattr(reasoner, name), partial) for name, lora in loras.items()}
    for name, lora in fitted.items():
        if not any(layer.norm() for layer in lora.layers.values()) and not any(
            bool(value.any()) for value in lora.differences.values()
        ):
            raise InputError(f"{lora.source} changes nothing: all of its updates are 0")
        lora.tell()
        lost = merge_lora(getattr(reasoner, name), lora)
        if lost > MUCH:
            warnings.warn(f"rounding to {reasoner.dtype} lost {lost:.0%} of {lora.source}", Notice, stacklevel=3)
        of = "" if len(fitted) == 1 else f"{name}: "
        for entry, text in (("scale", lora.scale_source), ("unused", ", ".join(lora.unused))):
            if text:
                key = f"few_step_lora_{entry}"
                notes[key] = "; ".join([*([notes[key]] if key in notes else []), of + text])
    return notes
