"""`vlmteacher train`: fine-tune a Reasoner on the videos of a domain."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmteacher.cli.flags import TRAINING, Commands, add_command, add_training, given


def add(commands: Commands) -> None:
    sub = add_command(commands, "train", run, "fine-tune a Reasoner on the videos of a domain")
    sub.add_argument("what", choices=("sft",))
    add_training(sub, "video model to start from: hub id or directory")


def run(arguments: argparse.Namespace) -> None:
    from vlmteacher.quiet import quiet

    quiet()
    from vlmteacher.distillation import sft

    settings = sft.load_settings(Path(arguments.config), given(arguments, TRAINING))
    arguments.out = settings.out  # the config may name it; `main` says whether an interrupted run can be resumed
    print(f"Fine-tuned Reasoner: {sft.run(settings, arguments.resume)}")
