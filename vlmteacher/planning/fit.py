"""The settings of a step that fit the memory of its device, for models that are loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmteacher.decoders.taehv import SurrogateDecoder
from vlmteacher.errors import InputError
from vlmteacher.placement import allocator
from vlmteacher.planning.costs import META
from vlmteacher.planning.plan import (
    GB,
    Choice,
    Instance,
    add_lora_and_weigh,
    fewest_flops,
    gigabytes_up,
    nbytes,
    our_steps,
)
from vlmteacher.planning.teacher import Video
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.checkpointing import Keep, format_levels, keep_activations, kept_levels
from vlmteacher.reasoners.quantization import is_reduced
from vlmteacher.settings import Settings, parse_memory
from vlmteacher.teachers.base import Teacher
from vlmteacher.teachers.vlm import VLMTeacher

ROOM = 0.95  # of a device's memory for "auto": workspaces and what fragments take the rest


@dataclass(frozen=True)
class Fit:
    """Settings of a step within a memory.

    levels: what each block of the Reasoner keeps. activation_bytes, chunk_patches: of the Teacher. peak_bytes: the most
    that the step takes, weights included.
    """

    levels: list[Keep]
    activation_bytes: int
    chunk_patches: int
    peak_bytes: int

    @contextmanager
    def on(self, reasoner: Reasoner, teacher: Teacher) -> Iterator[None]:
        """Apply the settings to these models inside the context."""
        before = kept_levels(reasoner.transformer), teacher.activation_bytes, teacher.chunk_patches
        keep_activations(reasoner.transformer, self.levels)
        teacher.activation_bytes, teacher.chunk_patches = self.activation_bytes, self.chunk_patches
        try:
            yield
        finally:
            keep_activations(reasoner.transformer, before[0])
            teacher.activation_bytes, teacher.chunk_patches = before[1:]

    def __str__(self) -> str:
        teacher = f"{self.activation_bytes / GB:.3g} GB of the Teacher's activations, {self.chunk_patches} patches"
        return f"activations {format_levels(self.levels)}, {teacher} at a time, {self.peak_bytes / GB:.3g} GB in all"


def fit_memory(
    reasoner: Reasoner,
    decoder: SurrogateDecoder,
    teacher: Teacher,
    shape: tuple[int, int, int],
    indices: Sequence[int],
    questions: int,
    settings: Settings,
    offload: bool = False,
) -> Fit:
    """The settings of the fewest FLOPs with which a step of these models fits `settings.memory`.

    shape: (frames, height, width). indices: the frames that the Teacher sees. questions: 1 + M. offload: whether the
    networks that no step needs are elsewhere. No weight is copied; takes some seconds for a large model. Raises
    InputError where nothing fits, with the least memory, and for models that are not planned.
    """
    assert settings.memory is not None
    _check(reasoner, teacher, settings)
    assert isinstance(teacher, VLMTeacher)
    video = Video(tuple(indices), reasoner.fps, *shape[1:])
    models = Instance(
        without_data(reasoner), without_data(decoder), without_data(teacher), shape, video, "", settings.windows
    )
    weights = add_lora_and_weigh(models, settings.rank, "cpu" if offload else "device", settings.fused_lora)
    choices = our_steps(models, weights, questions, teacher.device)
    if settings.engine == "compile":  # such blocks keep all, or their input
        choices = [choice for choice in choices if {*choice.levels} <= {Keep.ALL, Keep.INPUT}]
    budget = _budget(settings.memory, reasoner, decoder, teacher)
    fitting = [choice for choice in choices if choice.step.peak_bytes <= budget]
    if not fitting:
        _refuse(settings.memory, budget, min(choice.step.peak_bytes for choice in choices), offload)
    return _fit(fewest_flops(fitting), models, questions)


def _fit(choice: Choice, models: Instance, questions: int) -> Fit:
    settings = choice.settings(models, questions)
    kept, patches = settings["teacher_activation_bytes"], settings["teacher_chunk_patches"]
    return Fit(choice.levels, kept, patches, choice.step.peak_bytes)


def _check(reasoner: Reasoner, teacher: Teacher, settings: Settings) -> None:
    """Raise InputError for what a plan does not count."""
    if not isinstance(teacher, VLMTeacher) or teacher.quantized:
        kind = "a quantised Teacher" if teacher.quantized else type(teacher).__name__
        raise InputError(f"memory cannot be planned for {kind}: leave it out, and set --activations")
    if is_reduced(reasoner.transformer):
        raise InputError("memory cannot be planned for a quantised Reasoner: leave it out, and set --activations")
    if reasoner.device != teacher.device:
        raise InputError(
            f"memory plans one device, Reasoner and Teacher are on {reasoner.device} and {teacher.device}: leave it out"
        )
    if settings.target == "full":
        raise InputError('memory cannot be planned for target "full": leave it out, or take "first_step"')


def _budget(memory: str, *parts: Any) -> int:
    """The bytes of `settings.memory`: for "auto", what the models take and what their device has beside them."""
    if (given := parse_memory(memory)) is not None:
        return int(given * GB)
    device = parts[0].device
    if room := allocator(device):
        free = room.available()
    else:
        import psutil

        free = int(psutil.virtual_memory().available)
    here = [module for part in parts for module in _networks(part) if next(module.parameters()).device == device]
    return int(ROOM * free) + nbytes(*here)


def _refuse(memory: str, budget: int, floor: int, offload: bool) -> None:
    what = f"memory {memory} ({budget / GB:.3g} GB here)" if memory == "auto" else f"memory {memory}"
    more = "" if offload else ", offload (the networks that no step needs)"
    raise InputError(
        f"{what} is below the floor of this step, {gigabytes_up(floor)} GB: give that{more}, or a smaller video"
    )


def _networks(part: Any) -> list[nn.Module]:
    """The networks of a Reasoner, a Teacher or a surrogate decoder."""
    if isinstance(part, nn.Module):
        return [part]
    return list(part.networks.values()) if isinstance(part, Reasoner) else [part.model]


def without_data(part: Any) -> Any:
    """A copy of a Reasoner, a Teacher or a surrogate decoder on the meta device; no weight is copied."""
    memo: dict[int, Any] = {id(shared): shared for shared in (getattr(part, "tokenizer", None),) if shared is not None}
    for network in _networks(part):
        for tensor in (*network.parameters(), *network.buffers()):
            empty = torch.empty_like(tensor, device=META)
            memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    made = copy.deepcopy(part, memo)
    for network in _networks(made):
        for module in network.modules():
            if "rope_type" in vars(module):  # a dynamic one reads positions; the cost is the same
                module.rope_type = "default"
    return made.to(META)
