"""The contract of a Teacher, and the loading of a checkpoint by its family."""

from __future__ import annotations

import importlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from vlmteacher import arguments
from vlmteacher.checkpoints.hub import find_file, only_local, pinned
from vlmteacher.checkpoints.pretrained import json_object
from vlmteacher.errors import InputError, NonFiniteFrames
from vlmteacher.ops.patchify import PatchLayout, PatchRows
from vlmteacher.placement import Allocator
from vlmteacher.queries import QuerySet, QueryStyle
from vlmteacher.ranks import ALONE, Ranks
from vlmteacher.teachers.quantization import Quantize, check_quantize
from vlmteacher.torch_modes import plain_torch

if TYPE_CHECKING:
    from vlmteacher.media import ImageInput

# transformers' model_type -> the module of the family and its class
FAMILIES = {
    "qwen3_vl": ("qwen_vl", "QwenVLTeacher"),
    "qwen3_vl_moe": ("qwen_vl_moe", "QwenVLMoeTeacher"),
    "qwen3_5": ("qwen35", "Qwen35Teacher"),
    "qwen3_5_moe": ("qwen35", "Qwen35MoeTeacher"),
    "qwen2_5_vl": ("qwen25_vl", "Qwen25VLTeacher"),
    "internvl": ("internvl", "InternVLTeacher"),
    "glm4v": ("glm4v", "GlmTeacher"),
    "glm4v_moe": ("glm4v", "GlmMoeTeacher"),
    "smolvlm": ("smolvlm", "SmolVLMTeacher"),
}

ANSWER_TOKENS = 512  # the default limit of an answer in free text
RANGE_SLACK = 1e-3  # how far frames may leave [0, 1]: the rounding of a decoder in half precision


def check_frames(frames: Tensor | PatchRows, frame_indices: Sequence[int], fps: float) -> None:
    """Raise InputError for frames of a shape, indices or an fps that `Teacher.losses` does not take."""
    if len(frames.shape) != 4 or frames.shape[1] != 3 or len(frames) == 0:
        raise InputError(f"frames must be (K, 3, H, W) with K >= 1, not {tuple(frames.shape)}")
    if len(frame_indices) != len(frames):
        raise InputError(f"{len(frame_indices)} frame indices for {len(frames)} frames")
    if not (fps > 0 and math.isfinite(fps)):
        raise InputError(f"fps must be positive, not {fps}")


def check_range(low: float, high: float) -> None:
    """Raise InputError when frames with these extremes are not in [0, 1]; NonFiniteFrames when they are not finite."""
    if not math.isfinite(low + high):
        raise NonFiniteFrames("the frames hold NaN or infinite values: try a lower learning rate or another dtype")
    if low < -RANGE_SLACK or high > 1 + RANGE_SLACK:
        raise InputError(f"frames must be RGB in [0, 1], these span [{low:.4g}, {high:.4g}]: clamp or rescale them")


def check_free_text(
    style: QueryStyle, label: str, remedy: str = "take an instruction-tuned VLM as the Teacher"
) -> None:
    """Raise InputError for a Teacher that was trained to write queries in its own wording, and nothing else."""
    if style.own_wording:
        raise InputError(f"{label} writes queries and no other text: {remedy}")


class Teacher(ABC):
    """A frozen vision-language model. P(Yes) of a question is `exp(-loss)`.

    quantized: whether the weights are in 4 or 8 bits; such a Teacher stays on the device that it was loaded to.
    activation_bytes: the limit of what the language model keeps for the backward; None: half of what the GPU's
        allocator can give at that moment, 4 GiB on the CPU.
    kept_bytes: what it kept at the last evaluation.
    room: the allocator that is asked; None: that of the GPU, where there is one.
    chunk_patches: the number of patches that the visual encoder works on at a time; None: chosen by device.
    attention_backend: of `ops.attention`; None: our own on the CPU, torch's elsewhere.
    offload: whether tensors saved for the backward wait in pinned host memory (GPUs only).
    style: the instructions for writing queries.
    takes_goal_image: whether a picture of the goal can be shown to it (`with_goal`).
    ranks: processes that share the visual encoder's work; each has the whole video.
    """

    quantized: bool = False
    activation_bytes: int | None = None
    kept_bytes: int = 0
    room: Allocator | None = None
    chunk_patches: int | None = None
    attention_backend: str | None = None
    offload: bool = False
    style: QueryStyle = QueryStyle()
    takes_goal_image: bool = False
    ranks: Ranks = ALONE

    def with_goal(self, image: ImageInput | None) -> Self:
        """Return a Teacher that shares the networks and sees a picture of the goal, how the video should end.

        It sees the picture beside the first frame when it writes queries, and before the video in every question.
        None: no picture. Raises InputError where the Teacher takes none, and for an image that cannot be read.
        """
        if image is None:
            return self
        raise InputError(f"{type(self).__name__} takes no picture of the goal: leave out goal_image")

    @abstractmethod
    def write_queries(self, prompt: str, image: ImageInput | None = None) -> QuerySet:
        """Write the goal and process questions for a task, from its prompt and, if given, its first frame.

        Raises InputError when neither of two answers of the model is a valid set of queries.
        """

    def answer(self, text: str, images: Sequence[ImageInput] = (), max_tokens: int = ANSWER_TOKENS) -> str:
        """Answer a request in free text, greedily, with at most `max_tokens` tokens.

        images: they come before the text, in their order. Control tokens in `text` are read as text. An answer that
        reaches the limit ends with its last whole sentence, if it has one; an answer may be empty.
        Raises InputError for a Teacher that writes no free text, a request that is empty or does not fit into the
        context, and an image that cannot be read.
        """
        raise InputError(f"{type(self).__name__} writes no free text: take an instruction-tuned VLM as the Teacher")

    def patch_layout(self, num_frames: int, height: int, width: int) -> PatchLayout | None:
        """The layout in which `losses` takes frames of this size as patch rows; None where it has to resize them."""
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
        differentiable to the frames. check: whether to check the frames' values, which synchronises with the device.
        Raises InputError for frames of another shape or layout, a number of indices other than K, or fps <= 0; with
        `check` also for values outside [0, 1] (NonFiniteFrames: NaN or infinite).
        """

    @abstractmethod
    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Teacher:
        """Move the model; returns self. Raises InputError where a quantised one would have to move or change dtype."""

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

    local_files_only: never use the network; None: use it where a file is not cached and the hub can be reached.
    quantize: keep the language model's weights in "8bit" or "4bit", on `device` (see `quantization.py`).
    Raises InputError when the checkpoint does not exist (or cannot be fetched), when its `model_type` belongs to no
    family, or when a part (weights, tokenizer, chat template) is missing.
    """
    check_quantize(quantize)
    name = os.fspath(path_or_id)
    if local_files_only is None:
        local_files_only = only_local(name)
    try:
        file = find_file(name, "config.json", local_files_only)
    except InputError:  # its text speaks of a pipeline
        file = None
    if file is None:
        where = "has no usable config.json" if os.path.isdir(name) else "is no local directory and cannot be fetched"
        raise InputError(f"teacher {name!r} {where}: give the path of a directory that holds the checkpoint")
    family = find_family(json_object(file).get("model_type"), f"teacher {name!r}")
    path = pinned(name, file.parent, local_files_only)
    return family.from_pretrained(path, dtype, local_files_only, quantize, device)


@plain_torch()
def adopt_teacher(model: Any, processor: Any) -> Teacher:
    """The Teacher of a loaded VLM of transformers and its processor. Raises InputError."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "parameters"):
        raise InputError(f"vlm must be a loaded model of transformers, not {arguments.show(model)}")
    name = str(getattr(config, "_name_or_path", "") or type(model).__name__)
    return find_family(config.model_type, f"vlm {name!r}").adopt(model, processor, name)


def find_family(model_type: Any, label: str) -> Any:
    """The subclass of `VLMTeacher` for a `model_type` of transformers.

    label: of the checkpoint. Raises InputError, which lists `FAMILIES`, for another type.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(
            f"{label} {_blindness(model_type)}is of the model type {model_type!r}; known types: {known}: "
            "take a VLM that sees videos"
        )
    module, name = FAMILIES[model_type]
    return getattr(importlib.import_module(f"vlmteacher.teachers.{module}"), name)


def _blindness(model_type: Any) -> str:
    """What a model of a type that transformers knows cannot see: a clause, or nothing."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

    if not isinstance(model_type, str) or model_type in VIDEO_PROCESSOR_MAPPING_NAMES:
        return ""
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return "sees pictures but no videos: it "
    return "sees no pictures: it " if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else ""


def read_style(path_or_id: str, local_files_only: bool = False) -> QueryStyle:
    """The query style in a checkpoint's `teacher.json`; without that file the one for any VLM."""
    file = find_file(path_or_id, "teacher.json", local_files_only)
    return QueryStyle.load(file) if file else QueryStyle()
