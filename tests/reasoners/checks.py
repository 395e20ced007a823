"""Checks that the tests of several Reasoner families share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from tests.tiny_pair import QUERIES
from vlmteacher import QuerySet, TeacherPipeline
from vlmteacher.lora.adapter import add_lora
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.checkpointing import Keep, keep_activations
from vlmteacher.reasoners.condition import Condition, Noise


def check_kept_levels(reasoner: Reasoner, condition: Condition, noise: Noise) -> None:
    """Check that the LoRA's gradient has the same bits at every activation level."""
    add_lora(reasoner.transformer, rank=2, seed=0)
    gradients = []
    for level in Keep:
        keep_activations(reasoner.transformer, level)
        reasoner.predict_clean(condition, noise).square().sum().backward()
        found = [p for n, p in reasoner.transformer.named_parameters() if "lora_B" in n and p.grad is not None]
        gradients.append(torch.cat([p.grad.flatten() for p in found]))
        reasoner.transformer.zero_grad()
    assert gradients[0].abs().max() > 0 and all(torch.equal(g, gradients[0]) for g in gradients[1:])


def one_update(
    pipe: TeacherPipeline, prompt: str, image: Image.Image | None, size: Sequence[int], **keywords: Any
) -> Any:
    """The output of one update of the whole pipeline, for a video of (frames, height, width)."""
    return pipe(
        prompt,
        image,
        **dict(zip(("num_frames", "height", "width"), size, strict=True)),
        generator=torch.Generator().manual_seed(0),
        queries=QuerySet.from_dict(QUERIES),
        max_steps=1,
        rank=2,
        teacher_frames=4,
        learning_rate=0.03,
        progress=False,
        output_type="pt",
        **keywords,
    )
