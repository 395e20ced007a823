"""`vlmteacher train`: fine-tune a Reasoner on the videos of a domain, or train one LoRA for all its prompts."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from vlmteacher.cli.console import add_tracker, tracked
from vlmteacher.cli.flags import TRAINING, Commands, add_command, add_training, given

KINDS = {
    "sft": ("distillation.sft", "Fine-tuned Reasoner"),
    "post": ("baselines.post_training", "LoRA"),
    "grpo": ("baselines.flow_grpo", "LoRA"),
}


def add(commands: Commands) -> None:
    text = "fine-tune a Reasoner on the videos of a domain, or train one LoRA on its prompts by a Teacher"
    sub = add_command(commands, "train", run, text)
    help = (
        "sft: on videos; post, grpo: on prompts, by the Teacher's likelihood (post-training) or as a reward (Flow-GRPO)"
    )
    sub.add_argument("what", choices=tuple(KINDS), help=help)
    add_training(sub, "video model to start from: hub id or directory")
    add_tracker(sub)


def run(arguments: argparse.Namespace) -> None:
    from vlmteacher.quiet import quiet

    quiet(notices=not arguments.quiet)
    module, result = KINDS[arguments.what]
    training = import_module(f"vlmteacher.{module}")
    settings = training.load_settings(Path(arguments.config), given(arguments, TRAINING))
    arguments.out = settings.out  # the config may name it; `main` says whether an interrupted run can be resumed
    with tracked(arguments, Path(settings.out)):
        path = training.run(settings, arguments.resume)
    arguments.console.last(f"{result}: {path}")
    arguments.console.result("train", what=arguments.what, out=settings.out, path=str(path))
