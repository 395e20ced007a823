"""Stage ``writer``: a LoRA with which the trained Teacher writes queries, also for scenes out of domain.

Judging and writing take this small model's weights from one another: a Teacher that went on to learn what to ask judged
worse, and one held to its judging learnt too little. So the weights that judge stay, and writing has a LoRA of its own.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from recipes.microworld.teacher.lesson import Lesson, build, scenes_to_write
from recipes.microworld.training import adopt, load_config, train
from vlmteacher.checkpoints.pretrained import load_network
from vlmteacher.microworld.questions import STYLE

SUBFOLDER = "writer"


def main(trained: Path, out: Path) -> None:
    """Train on right queries, starting from the Teacher ``trained/teacher``; write ``out/writer``, in peft's format."""
    config = load_config("teacher") | load_config("writer")
    torch.manual_seed(config["seed"])
    lessons = Lesson(build(config, trained.parent / "teacher/tokenizer"), config)
    known = load_network(Qwen3VLForConditionalGeneration, trained / "teacher", dtype=torch.float32)
    adopt(lessons.teacher.model, known)
    lora = LoraConfig(r=config["rank"], lora_alpha=config["rank"], target_modules="all-linear")
    adapted = get_peft_model(lessons.teacher.model, lora)

    def step(index: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        scenes = scenes_to_write(rng, config["batch"], config["outside"])
        with torch.autocast("cpu", torch.bfloat16, enabled=config["bf16"]):
            return lessons.write(scenes, rng), {}

    train(
        {"writer": adapted},
        step,
        out,
        steps=config["steps"],
        learning_rate=config["learning_rate"],
        seed=config["seed"],
        log_every=50,
    )
    save(adapted, out / SUBFOLDER)


def save(adapted: PeftModel, path: Path) -> None:
    """Write the LoRA in peft's format, in half precision, without the model card that peft adds."""
    adapted.half().save_pretrained(path)
    (path / "README.md").unlink()


def attach(writer: Path, teacher: Path) -> None:
    """Put the LoRA into a Teacher's directory, whose ``teacher.json`` then names it."""
    shutil.copytree(writer, teacher / SUBFOLDER, dirs_exist_ok=True)
    style = replace(STYLE, writer=SUBFOLDER)
    (teacher / "teacher.json").write_text(json.dumps(asdict(style), indent=2) + "\n")
