"""`vlmteacher train-microworld`: the old name of `python -m recipes.microworld`, for one release."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from vlmteacher.cli.flags import Commands, add_command
from vlmteacher.errors import InputError

CHECKOUT = Path(__file__).parents[2]


def add(commands: Commands) -> None:
    text = "deprecated: `python -m recipes.microworld` in a checkout"
    sub = add_command(commands, "train-microworld", run, text)
    sub.add_argument("--stage", required=True, metavar="NAME", help="what to train")
    sub.add_argument("--out", required=True, metavar="DIR", help="for the weights; earlier stages are read from it")
    sub.add_argument("--init", metavar="DIR", help="a pair whose weights the stage starts from (default: from scratch)")
    sub.add_argument(
        "--device", default="cpu", metavar="D", help="of the stage teacher-point: cpu (default), cuda, ..."
    )
    sub.set_defaults(resumes=True)


def run(arguments: argparse.Namespace) -> None:
    """Run a stage of the recipe, which is no part of the installed package. Raises InputError outside a checkout."""
    from vlmteacher.quiet import quiet

    quiet()
    if not (CHECKOUT / "recipes/microworld").is_dir():
        raise InputError(
            "the training of the packaged models is no part of the installed package: clone the repository and run"
            " `python -m recipes.microworld` there"
        )
    warning = "warning: `vlmteacher train-microworld` goes with the next release: run `python -m recipes.microworld`"
    print(warning, file=sys.stderr)
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    stages = import_module("recipes.microworld.stages")
    stages.run(arguments.stage, Path(arguments.out), Path(arguments.init) if arguments.init else None, arguments.device)
