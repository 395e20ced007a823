"""`vlmteacher env`: devices, compiled backends and versions; why a backend is missing."""

from __future__ import annotations

import argparse
import json

from vlmteacher.cli.flags import Commands, add_command


def add(commands: Commands) -> None:
    sub = add_command(commands, "env", run, "devices, compiled backends and versions; why a backend is missing")
    sub.add_argument("--json", action="store_true", help="machine-readable")


def run(arguments: argparse.Namespace) -> None:
    from vlmteacher.environment import format_report, report

    environment = report()
    print(json.dumps(environment, indent=2) if arguments.json else format_report(environment))
