"""`vlmteacher bench`: run a method, or all methods of a table, on the instances of a benchmark."""

from __future__ import annotations

import argparse
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vlmteacher import settings
from vlmteacher.cli.flags import Commands, add_command, add_families, families
from vlmteacher.errors import InputError

if TYPE_CHECKING:
    from vlmteacher.evaluation.benchmark import Benchmark


def add(commands: Commands) -> None:
    sub = add_command(commands, "bench", run, "run a method on the instances of a benchmark")
    sub.add_argument("benchmark", choices=("microworld", "vbvr", "ruler"))
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--method", metavar="NAME", help="base, teacher, pass@N, ...; an unknown one lists all")
    what.add_argument("--table", metavar="NAME", help="all methods of a table: paper, or remedies (on validation)")
    sub.add_argument("--limit", type=int, default=100, metavar="N", help="scenes of each split (default: 100)")
    sub.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="noises for each scene, in a table for its main methods (default: 1; table: 3)",
    )
    sub.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the split (default: 1, the frozen one)")
    sub.add_argument("--split", metavar="NAME", help="split of a method: id (default), ood or validation")
    sub.add_argument("--trace", action="store_true", help="also score the few-step video at every step")
    sub.add_argument(
        "--many-step", metavar="ID", help="Reasoner before its few-step distillation, for the method many-step"
    )
    sub.add_argument("--pair", metavar="DIR", help="folder with a pair.json (default: the packaged pair)")
    add_families(sub)
    sub.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    settings.add_flags(sub, "lora_blocks")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder for results.json")
    sub.add_argument("--resume", action="store_true", help="keep the instances that --out already has")


def run(arguments: argparse.Namespace) -> None:
    if find_spec(f"vlmteacher.evaluation.{arguments.benchmark}") is None:
        raise InputError(f"the benchmark {arguments.benchmark} does not exist yet: choose microworld")
    for name, least in (("limit", 1), ("workers", 1), ("seed", 0), ("seeds", 1)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise InputError(f"--{name} must be at least {least}, not {value}")
    from vlmteacher.quiet import quiet

    quiet()
    if arguments.table is not None:
        return _run_table(arguments)
    from vlmteacher.evaluation.sweep import run_method

    benchmark = _benchmark(arguments)
    results = run_method(
        arguments.method,
        benchmark,
        [arguments.split or benchmark.splits[0]],
        arguments.limit,
        arguments.seeds or 1,
        Path(arguments.out),
        arguments.workers,
        arguments.resume,
    )
    print(f"{results['benchmark']}, method {results['method']}")
    print(f"{'split':10} {'n':>5} {'success':>8} {'score':>6}")
    for name, row in {**results.get("splits", {}), "all": results}.items():
        if row["n"]:
            success = "-" if row["success_rate"] is None else f"{row['success_rate']:.2f}"
            print(f"{name:10} {row['n']:5} {success:>8} {row['score']:6.3f}")
    print(f"{results['updates_mean']:.1f} updates and {results['seconds_mean']:.1f} s per instance")
    print(f"Results: {Path(arguments.out) / 'results.json'}")


def _run_table(arguments: argparse.Namespace) -> None:
    from vlmteacher.evaluation.tables import TABLES, format_table, run_table

    if arguments.table not in TABLES:
        raise InputError(f"unknown --table {arguments.table}: choose from {', '.join(TABLES)}")
    for name in ("split", "lora_blocks"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} goes with --method: a table has its own splits and methods")
    table, out, noises = TABLES[arguments.table], Path(arguments.out), arguments.seeds or 3
    rows = run_table(table, _benchmark(arguments), arguments.limit, noises, out, arguments.workers, arguments.resume)
    print(format_table(rows, table))
    print(f"Results: {out / 'table.json'}, and a folder for each method")


def _benchmark(arguments: argparse.Namespace) -> Benchmark:
    """Return the `Bench` of the benchmark's module; its fields are set by the flags of their names."""
    bench: type[Benchmark] = import_module(f"vlmteacher.evaluation.{arguments.benchmark}").Bench
    names = {field.name for field in fields(bench)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    if "families" in names:
        given["families"] = tuple(families(arguments))
    return bench(**given)
