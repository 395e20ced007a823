"""An instance at the paper's scale whose weights are random and made on the device, and the same for a smoke test."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.presets import NEVER, Instance
from vlmteacher.optimization.frames import teacher_frame_indices
from vlmteacher.planning.models import build_decoder, build_reasoner, build_teacher
from vlmteacher.planning.teacher import query_set
from vlmteacher.settings import Settings

QUESTIONS = 4


@dataclass(frozen=True)
class Scale:
    """Names of known models, the video's frames, height and width, and how much the small measurements take.

    copied: bytes of a copy. product: the side of square matrices. shrink: divides the tokens of attention.
    """

    reasoner: str
    teacher: str
    decoder: str
    size: tuple[int, int, int]
    teacher_frames: int
    dtype: torch.dtype
    copied: int
    product: int
    shrink: int


SCALES = {
    "paper": Scale(
        "quanhaol/Wan2.2-TI2V-5B-Turbo", "qwen3-vl-4b", "taew2_2", (89, 704, 1280), 24, torch.bfloat16, 2**32, 8192, 1
    ),
    "smoke": Scale("packaged", "packaged", "packaged", (5, 32, 32), 4, torch.float32, 2**20, 64, 512),
}


def fill(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight from a normal distribution of deviation fan_in^-.5; norms are 1 and biases 0."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            fan_in = math.prod(weight.shape[1:])
            if weight.dim() > 1 and fan_in > 1:
                weight.normal_(std=fan_in**-0.5, generator=generator)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)


def build(scale: Scale, device: torch.device) -> Instance:
    """Build the models on the device, those too that only take memory during a step: text encoder and VAE."""
    generator = torch.Generator(device).manual_seed(0)
    reasoner, _ = build_reasoner(scale.reasoner, scale.dtype, device)
    decoder = build_decoder(scale.decoder, scale.dtype, device)
    teacher: Any = build_teacher(scale.teacher, scale.dtype, device)
    for network in (*reasoner.networks.values(), decoder, teacher.model):
        fill(network, generator)
    last = [layer for layer in decoder.modules() if isinstance(layer, nn.Conv2d)][-1]
    if last.bias is not None:
        last.bias.data.fill_(0.5)  # mid grey: away from the clamp, where gradients are lost
    reasoner.to(device), teacher.to(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the float32 weights from before the cast

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=device).to(like.dtype)

    frames, height, width = scale.size
    with device:
        condition = reasoner.blank_condition(frames, height, width)
    first = None if condition.first_frame is None else draw(condition.first_frame)
    inputs = {name: draw(value) for name, value in condition.inputs.items()}
    condition = replace(
        condition, prompt_embeds=draw(condition.prompt_embeds), first_frame=first, inputs=inputs, negative=None
    )
    noise = reasoner.noise(condition, torch.Generator().manual_seed(0))
    settings = Settings(threshold=NEVER, max_steps=10**6, teacher_frames=scale.teacher_frames)
    return Instance(reasoner, decoder, teacher, condition, noise, query_set(QUESTIONS), settings)


def frame_indices(instance: Instance) -> list[int]:
    """The frames that the Teacher sees."""
    return teacher_frame_indices(instance.condition.num_frames, instance.settings.teacher_frames)
