"""`vlmteacher distill`: make a few-step Reasoner from a many-step one, or a surrogate decoder from a VAE."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmteacher.cli.flags import TRAINING, Commands, add_command, add_training, given


def add(commands: Commands) -> None:
    text = "make a few-step Reasoner from a many-step one, or a surrogate decoder from a VAE"
    sub = add_command(commands, "distill", run, text)
    sub.add_argument("what", choices=("reasoner", "decoder"))
    sub.add_argument("--method", metavar="NAME", help="method for a reasoner: dmd2, consistency or few-timesteps")
    sub.add_argument("--vae", metavar="ID", help="VAE for a decoder: hub id or directory of it or of its pipeline")
    add_training(sub, "the many-step video model: hub id or directory")


def run(arguments: argparse.Namespace) -> None:
    from vlmteacher.quiet import quiet

    quiet()
    overrides = given(arguments, (*TRAINING, "method", "vae"))
    if arguments.what == "decoder":
        from vlmteacher.distillation import decoder

        wanted = decoder.load_settings(Path(arguments.config), overrides)
        arguments.out = wanted.out  # the config may name it; `main` says whether an interrupted run can be resumed
        print(f"Surrogate decoder: {decoder.run(wanted, arguments.resume)}")
        return
    from vlmteacher.distillation import distill

    settings = distill.load_settings(Path(arguments.config), overrides)
    arguments.out = settings.out
    print(f"Reasoner of {len(settings.timesteps)} steps: {distill.run(settings, arguments.resume)}")
