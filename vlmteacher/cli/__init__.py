"""The command line: one module per command, with `add` (its flags) and the function that runs it.

Exit status: 0 done; 1 the optimisation broke down, or a result cannot be written; 2 bad input (one line on stderr);
130, 143 and 129 interrupted by SIGINT, SIGTERM and SIGHUP (`--resume` continues).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from vlmteacher import __version__
from vlmteacher.arguments import did_you_mean
from vlmteacher.cli import (
    bench,
    demo,
    distill,
    env,
    lora,
    microworld,
    plan,
    queries,
    report,
    solve,
    train,
    train_microworld,
    ui,
)
from vlmteacher.cli.console import Console, console
from vlmteacher.cli.defaults import DefaultsFile
from vlmteacher.errors import InputError, MissingExtra, OutputError, RankLost, TaskFailed
from vlmteacher.files import check_text
from vlmteacher.interruption import Interrupted, endings_interrupt
from vlmteacher.quiet import quiet_warnings
from vlmteacher.runs.command import command_line

# The commands import what is heavy inside their functions: `vlmteacher --help` must answer at once.
COMMANDS = (demo, solve, ui, report, queries, lora, bench, train_microworld, microworld, train, distill, plan, env)
"""In the order of `--help`."""

RESUMABLE = ("run.json", "settings.json", "base/settings.json", "state/state.pt")
"""Files that mark the folder of a run, a sweep, a table or a training that `--resume` can continue."""


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage that argparse prints before it, and guesses what was meant."""

    def error(self, message: str) -> NoReturn:
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += did_you_mean(choice[1], re.findall(r"[^\s,']+", choice[2]))
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        for action in self._actions:
            if isinstance(action, DefaultsFile):
                action.apply(self, sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = getattr(known, "command", self)  # whose help lists the flags
            flags = list(command._option_string_actions)
            guesses = (did_you_mean(each.partition("=")[0], flags) for each in unknown if each.startswith("-"))
            command.error(f"unrecognized arguments: {' '.join(unknown)}{next(filter(None, guesses), '')}")
        return known


class PrintCompletion(argparse.Action):
    """Prints the completion script of a shell."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: Any, flag: str | None = None) -> NoReturn:
        import shtab

        print(shtab.complete(parser, shell))
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = Parser(prog="vlmteacher", description="A vision-language model teaches a video generator, at test time.")
    top.add_argument("--version", action="version", version=f"vlmteacher {__version__}")
    top.add_argument(
        "--print-completion",
        choices=("bash", "zsh", "tcsh"),
        action=PrintCompletion,
        help="print the script that completes commands and flags in this shell",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run(parser, argv)


def run(parser: Callable[[], argparse.ArgumentParser], argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and call their `run`; an error is one line on stderr. Returns the exit status."""
    quiet_warnings()
    for stream in (sys.stdout, sys.stderr):  # a message must not fail on what a terminal cannot show
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    top = parser()
    try:
        arguments = top.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    except InputError as error:  # of a file with defaults
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    typed = command_line.set(shlex.join([top.prog, *(sys.argv[1:] if argv is None else argv)]))
    try:
        with console(arguments) as out:
            return _status(arguments, out)
    finally:
        command_line.reset(typed)


def _status(arguments: argparse.Namespace, out: Console) -> int:
    """Run the command; returns its exit status, and says an error."""
    try:
        with endings_interrupt():
            _check_texts(arguments)
            arguments.run(arguments)
            sys.stdout.flush()
    except (InputError, MissingExtra) as error:
        return out.error(f"{_error(arguments)}: {' '.join(str(error).split())}", 2)
    except (ArithmeticError, TaskFailed) as error:
        return out.error(f"error: {error}", 1)
    except KeyboardInterrupt as stop:
        status = stop.status if isinstance(stop, Interrupted) else 130
        return (
            out.error(f"interrupted{_how_to_continue(arguments)}", status) if _error(arguments) == "error" else status
        )
    except (OutputError, RankLost) as error:
        return out.error(f"{_error(arguments)}: {' '.join(str(error).split())}{_how_to_continue(arguments)}", 1)
    except OSError as error:  # of standard output, whose reader (`head`, say) may have closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            return out.error(f"error: {error}", 1)
    return 0


def _error(arguments: argparse.Namespace) -> str:
    """The word before an error's message, with the rank of a process that torchrun has started beside the first."""
    rank = os.environ.get("RANK", "0") if getattr(arguments, "context_parallel", None) else "0"
    return "error" if rank == "0" else f"rank {rank}: error"


def _how_to_continue(arguments: argparse.Namespace) -> str:
    if "resumes" in arguments:
        return "; the same command goes on"
    out = arguments.out if "resume" in arguments else None
    can_resume = out is not None and any((Path(out) / name).exists() for name in RESUMABLE)
    return "; the same with --resume goes on" if can_resume else ""


def _check_texts(arguments: argparse.Namespace) -> None:
    """Raise InputError for an argument that is no text: bytes that are not UTF-8, from the shell, or a NUL."""
    for name, value in vars(arguments).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                check_text(text, f"argument {name.replace('_', '-')}")
