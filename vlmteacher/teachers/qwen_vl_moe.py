"""Qwen3-VL with experts as the Teacher, on transformers' own `Qwen3VLMoeForConditionalGeneration`."""

from __future__ import annotations

from vlmteacher.teachers.experts import SparseDecoder
from vlmteacher.teachers.qwen_vl import QwenVLTeacher


class QwenVLMoeTeacher(QwenVLTeacher):
    """A frozen Qwen3-VL with experts. Its vision tower and prompts are those of the dense one."""

    architecture = "Qwen3VLMoeForConditionalGeneration"
    decoder = SparseDecoder()
