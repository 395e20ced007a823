"""`vlmteacher distill`: make a few-step Reasoner from a many-step one, or a surrogate decoder from a VAE."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from vlmteacher.cli.console import add_tracker, tracked
from vlmteacher.cli.flags import TRAINING, Commands, add_command, add_training, given

MODULES = {"reasoner": "distill", "decoder": "decoder"}


def add(commands: Commands) -> None:
    text = "make a few-step Reasoner from a many-step one, or a surrogate decoder from a VAE"
    sub = add_command(commands, "distill", run, text)
    sub.add_argument("what", choices=tuple(MODULES))
    sub.add_argument("--method", metavar="NAME", help="method for a reasoner: dmd2, consistency or few-timesteps")
    sub.add_argument("--vae", metavar="ID", help="VAE for a decoder: hub id or directory of it or of its pipeline")
    add_training(sub, "the many-step video model: hub id or directory")
    add_tracker(sub)


def run(arguments: argparse.Namespace) -> None:
    from vlmteacher.quiet import quiet

    quiet(notices=not arguments.quiet)
    overrides = given(arguments, (*TRAINING, "method", "vae"))
    module = import_module(f"vlmteacher.distillation.{MODULES[arguments.what]}")
    settings = module.load_settings(Path(arguments.config), overrides)
    arguments.out = settings.out  # the config may name it; `main` says whether an interrupted run can be resumed
    with tracked(arguments, Path(settings.out)):
        path = module.run(settings, arguments.resume)
    result = "Surrogate decoder" if arguments.what == "decoder" else f"Reasoner of {len(settings.timesteps)} steps"
    arguments.console.last(f"{result}: {path}")
    arguments.console.result("distill", what=arguments.what, out=settings.out, path=str(path))
