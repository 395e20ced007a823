"""What a command says: its lines, JSON lines or nothing but the result, its progress, and the trackers it feeds."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from vlmteacher.progress import JsonLines


def add_output(sub: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The flags of a command with long work; returns their group."""
    group = sub.add_argument_group("Output")
    group.add_argument("--quiet", action="store_true", help="print errors and the last lines only: result and paths")
    group.add_argument(
        "--json", action="store_true", help="print events as lines of JSON, the result last; all else goes to stderr"
    )
    sub.set_defaults(console=None)
    return group


def add_tracker(sub: argparse.ArgumentParser) -> None:
    """The flags of `add_output`, and those of trackers."""
    group = add_output(sub)
    group.add_argument(
        "--tracker",
        action="append",
        metavar="NAME",
        help="log settings and steps there too: tensorboard, wandb or trackio (extra: trackers); may be repeated",
    )
    group.add_argument("--tracker-dir", metavar="DIR", help="folder of the trackers' files (default: logs in --out)")


class Console:
    """Prints what a command has to say, by its flags.

    quiet: nothing but `last`. lines: takes events and the result, for programs.
    """

    def __init__(self, quiet: bool = False, lines: JsonLines | None = None, out: TextIO | None = None) -> None:
        self.quiet, self.lines, self._out = quiet, lines, out

    def last(self, text: str) -> None:
        """Print lines that remain with --quiet; the JSON result has them too."""
        if not (self.quiet and self.lines):
            print(text, file=self._out, flush=True)

    def result(self, command: str, **entries: Any) -> None:
        """Write the last line of JSON."""
        if self.lines is not None:
            self.lines.write({"event": "result", "command": command, **entries})

    def error(self, text: str, status: int) -> int:
        """Print an error to stderr, and as the last line of JSON; returns the exit status."""
        print(text, file=sys.stderr)
        if self.lines is not None:
            self.lines.write({"event": "error", "error": text.removeprefix("error: "), "status": status})
        return status


@contextmanager
def console(arguments: argparse.Namespace) -> Iterator[Console]:
    """The `Console` of a command, which is also `arguments.console`; the work inside reports to it."""
    if "console" not in arguments:  # a command of a moment
        yield Console()
        return
    from vlmteacher.progress import Display, JsonLines, Listener, is_terminal, listening

    if not is_first():
        arguments.console = Console(quiet=True, out=StringIO())
        with listening():
            yield arguments.console
        return
    with ExitStack() as ending:
        takers: list[Listener] = []
        if not arguments.quiet:
            both = arguments.json and is_terminal(sys.stdout)  # lines in the middle of a drawing
            takers.append(ending.enter_context(Display(loads=True, drawn=not both)))
        else:
            ending.enter_context(_errors_only())
        lines = JsonLines(ending.enter_context(_own_stdout())) if arguments.json else None
        if lines is not None:
            takers.append(lines)
        made = Console(arguments.quiet, lines, sys.stdout)
        if arguments.quiet:
            ending.enter_context(redirect_stdout(ending.enter_context(open(os.devnull, "w"))))
        ending.enter_context(listening(*takers))
        arguments.console = made
        yield made


def is_first() -> bool:
    """Whether this process is alone, or the first of those that torchrun or accelerate has started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _errors_only() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _own_stdout() -> Iterator[TextIO]:
    """Standard output for this alone: what anything else prints there, in C++ too, goes to standard error."""
    plain, own = sys.stdout is sys.__stdout__, sys.stdout
    if plain:
        own = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield own
    finally:
        if plain:
            os.dup2(own.fileno(), 1)
            own.close()


def check_trackers(arguments: argparse.Namespace) -> None:
    """Raise InputError or MissingExtra for a tracker that cannot be used."""
    if arguments.tracker:
        from vlmteacher.trackers import check_names

        check_names(arguments.tracker)


def tracked(arguments: argparse.Namespace, out: Path) -> AbstractContextManager[None]:
    """The trackers of the flags, with their files in `out`. Raises InputError, MissingExtra."""
    from vlmteacher.trackers import LOGS, tracking

    return tracking(arguments.tracker, arguments.tracker_dir or out / LOGS) if arguments.tracker else nullcontext()
