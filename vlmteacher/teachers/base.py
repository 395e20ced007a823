"""The contract of a Teacher, and how a checkpoint finds its family."""

from __future__ import annotations

import importlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmteacher.checkpoints.hub import find_file, only_local, pinned
from vlmteacher.checkpoints.pretrained import json_object
from vlmteacher.errors import InputError, NonFiniteFrames
from vlmteacher.ops.patchify import PatchLayout, PatchRows
from vlmteacher.queries import QuerySet, QueryStyle
from vlmteacher.teachers.quantization import Quantize, check_quantize
from vlmteacher.torch_modes import plain_torch

if TYPE_CHECKING:
    from vlmteacher.media import ImageInput

# transformers' model_type -> the module of the family and its class
FAMILIES = {
    "qwen3_vl": ("qwen_vl", "QwenVLTeacher"),
    "qwen2_5_vl": ("qwen25_vl", "Qwen25VLTeacher"),
    "internvl": ("internvl", "InternVLTeacher"),
}

RANGE_SLACK = 1e-3  # frames may leave [0, 1] by so much: rounding of a decoder in half precision


def check_frames(frames: Tensor | PatchRows, frame_indices: Sequence[int], fps: float) -> None:
    """Raises InputError when `Teacher.losses` cannot take these, whatever their values are."""
    if len(frames.shape) != 4 or frames.shape[1] != 3 or len(frames) == 0:
        raise InputError(f"frames must be (K, 3, H, W) with K >= 1, not {tuple(frames.shape)}")
    if len(frame_indices) != len(frames):
        raise InputError(f"{len(frame_indices)} frame indices for {len(frames)} frames")
    if not (fps > 0 and math.isfinite(fps)):
        raise InputError(f"fps must be positive, not {fps}")


def check_range(low: float, high: float) -> None:
    """Raises InputError, and NonFiniteFrames, when frames with these extremes are no pictures."""
    if not math.isfinite(low + high):
        raise NonFiniteFrames("the frames hold NaN or infinite values: try a lower learning rate or another dtype")
    if low < -RANGE_SLACK or high > 1 + RANGE_SLACK:
        raise InputError(f"frames must be RGB in [0, 1], these span [{low:.4g}, {high:.4g}]: clamp or rescale them")


class Teacher(ABC):
    """A frozen vision-language model. P(Yes) of a question is `exp(-loss)`.

    quantized: its weights are in 4 or 8 bits, and stay on the device that they were loaded to.
    activation_bytes: what the language model may keep for the backward; None: half of the GPU's free memory.
    chunk_patches: patches that the visual encoder works on at a time; None: by device.
    attention_backend: what computes attention, see `ops.attention`; None: our own on the CPU, else torch's.
    offload: keep what is saved for the backward in pinned host memory (GPUs only). style: how it is asked for queries.
    """

    quantized: bool = False
    activation_bytes: int | None = None
    chunk_patches: int | None = None
    attention_backend: str | None = None
    offload: bool = False
    style: QueryStyle = QueryStyle()

    @abstractmethod
    def write_queries(self, prompt: str, image: ImageInput | None = None) -> QuerySet:
        """Write the goal and process questions for a task, from its text and its first frame if there is one.

        Raises InputError when the model's answer is not a valid set of queries, also at the second try.
        """

    def patch_layout(self, num_frames: int, height: int, width: int) -> PatchLayout | None:
        """How `losses` takes frames of this size as patch rows; None: it takes the frames alone, to resize them."""
        return None

    @abstractmethod
    def losses(
        self,
        frames: Tensor | PatchRows,
        frame_indices: Sequence[int],
        fps: float,
        queries: QuerySet,
        check: bool = True,
    ) -> Tensor:
        """-log P("Yes" | frames, question), natural logarithm, for every question in the order of `queries.questions`.

        frames: (K, 3, H, W), RGB in [0, 1], or the same video in `patch_layout`; frame_indices: their K places in the
        video, which runs at `fps` frames a second (they become the timestamps in the prompt). Returns (1+M,) float32,
        differentiable to the frames. check: look at the frames' values, which waits for the device. Raises InputError
        on frames of another shape or layout, an index count other than K, or fps <= 0, and where it checks, on values
        outside [0, 1] (NonFiniteFrames: NaN).
        """

    @abstractmethod
    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Teacher:
        """Move the model; returns self. Raises InputError where a quantised one would have to move or change."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...


@plain_torch()
def load_teacher(
    path_or_id: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    local_files_only: bool | None = None,
    *,
    quantize: Quantize | None = None,
    device: torch.device | None = None,
) -> Teacher:
    """Load a Teacher from a local directory or a hub id, in evaluation mode and frozen.

    local_files_only: never ask the network; by default it is asked when it is needed and can be reached.
    quantize: keep the language model's weights in "8bit" or "4bit", on `device` (see `quantization.py`).
    Raises InputError when there is no such checkpoint (or no network to fetch it), when its `model_type` is of no known
    family, or when a part (weights, tokenizer, chat template) is missing.
    """
    check_quantize(quantize)
    name = os.fspath(path_or_id)
    if local_files_only is None:
        local_files_only = only_local(name)
    try:
        file = find_file(name, "config.json", local_files_only)
    except InputError:  # it says that of a pipeline
        file = None
    if file is None:
        where = "has no usable config.json" if os.path.isdir(name) else "is no local directory and cannot be fetched"
        raise InputError(f"teacher {name!r} {where}: give the path of a directory that holds the checkpoint")
    family = find_family(json_object(file).get("model_type"), f"teacher {name!r}")
    path = pinned(name, file.parent, local_files_only)
    return family.from_pretrained(path, dtype, local_files_only, quantize, device)


def find_family(model_type: Any, label: str) -> Any:
    """The subclass of `VLMTeacher` for a `model_type` of transformers.

    label: of the checkpoint. Raises InputError, which lists `FAMILIES`, for another type.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(f"{label} is of the model type {model_type!r}; known types: {', '.join(FAMILIES)}")
    module, name = FAMILIES[model_type]
    return getattr(importlib.import_module(f"vlmteacher.teachers.{module}"), name)


def read_style(path_or_id: str, local_files_only: bool = False) -> QueryStyle:
    """How a checkpoint wants to be asked for queries: its `teacher.json`, or the way for any VLM where it has none."""
    file = find_file(path_or_id, "teacher.json", local_files_only)
    return QueryStyle.load(file) if file else QueryStyle()
