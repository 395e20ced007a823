"""`vlmteacher report`: one page about runs and sweeps."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmteacher.cli.flags import Commands, add_command
from vlmteacher.errors import InputError


def add(commands: Commands) -> None:
    sub = add_command(commands, "report", run, "one HTML page about runs and sweeps, with their videos in step")
    sub.add_argument(
        "folders", nargs="+", metavar="DIR", help="folders of runs (solve --out), sweeps or tables (bench --out)"
    )
    sub.add_argument("-o", "--output", required=True, metavar="FILE.html", help="file to write")


def run(arguments: argparse.Namespace) -> None:
    out = Path(arguments.output)
    if not out.absolute().parent.is_dir():
        raise InputError(f"report {out}: the directory {out.absolute().parent} does not exist")
    if out.is_dir():
        raise InputError(f"report {out} is a directory: give the name of a file in it")
    from vlmteacher.evaluation.gallery import report
    from vlmteacher.files import write_text

    page = report([Path(folder) for folder in arguments.folders])
    write_text(out, page)
    print(f"Report: {out} ({len(page.encode()) / 1e6:.1f} MB)")
