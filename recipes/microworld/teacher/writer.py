"""Stage ``writer``: a LoRA with which the trained Teacher writes queries, also for scenes out of domain.

Judging and writing compete for the weights of so small a model: a Teacher that was trained further to write judged
worse, and one whose judging was kept learnt too little. The weights that judge therefore stay, and writing has a LoRA.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from recipes.microworld.teacher.data import scenes_to_write
from recipes.microworld.teacher.lesson import Lesson
from recipes.microworld.teacher.model import build
from recipes.microworld.training import Run, adopt, in_bfloat16, train
from vlmteacher.checkpoints.pretrained import load_network
from vlmteacher.distillation.trainer import STATE
from vlmteacher.microworld.questions import STYLE

SUBFOLDER = "writer"


def train_writer(run: Run) -> None:
    """Stage ``writer``: a LoRA on the Teacher in the directory ``run.start``; write ``writer/`` in PEFT's format."""
    config = run.config
    assert run.start
    torch.manual_seed(config["seed"])
    lessons = Lesson(build(config, run.path("teacher/tokenizer")), config)
    known = load_network(Qwen3VLForConditionalGeneration, run.start, dtype=torch.float32)
    adopt(lessons.teacher.model, known)
    lora = LoraConfig(r=config["rank"], lora_alpha=config["rank"], target_modules="all-linear")
    adapted = get_peft_model(lessons.teacher.model, lora)
    if earlier := config.get("adapter"):  # the run or the pair's folder whose LoRA is trained further
        if (state := run.path(earlier) / STATE).exists():
            weights = torch.load(state, weights_only=True)["modules"]["writer"]
            adapted.load_state_dict({name: x for name, x in weights.items() if "lora_" in name}, strict=False)
        else:
            weights = load_file(run.path(earlier) / "adapter_model.safetensors")
            set_peft_model_state_dict(adapted, {name: x.float() for name, x in weights.items()})

    def step(index: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        scenes = scenes_to_write(rng, config["batch"], config["outside"])
        with in_bfloat16(config["bf16"]):
            return lessons.write(scenes, rng), {}

    train({"writer": adapted}, step, run, log_every=50)
    save(adapted, run.out / SUBFOLDER)


def save(adapted: PeftModel, path: Path) -> None:
    """Write the LoRA in PEFT's format, in half precision, without the model card that PEFT adds."""
    adapted.half().save_pretrained(path)
    (path / "README.md").unlink()


def attach(writer: Path, teacher: Path) -> None:
    """Copy the LoRA into a Teacher's directory and name it in ``teacher.json``."""
    shutil.copytree(writer, teacher / SUBFOLDER, dirs_exist_ok=True)
    style = replace(STYLE, writer=SUBFOLDER)
    (teacher / "teacher.json").write_text(json.dumps(asdict(style), indent=2) + "\n")
