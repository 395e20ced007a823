"""`vlmteacher bench`: run a method, or all methods of a table, on the instances of a benchmark."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmteacher import settings
from vlmteacher.arguments import LARGEST
from vlmteacher.cli.console import add_tracker, tracked
from vlmteacher.cli.flags import (
    Commands,
    add_command,
    add_families,
    add_lora_partial,
    add_reasoner,
    add_teacher,
    families,
)
from vlmteacher.errors import InputError

if TYPE_CHECKING:
    from vlmteacher.evaluation.benchmark import Benchmark

OWN = (
    *("data", "evalkit", "evalkit_python", "pro", "path_tracker", "path_tolerance", "family"),
    *("judge", "judge_url", "judge_cache", "judge_timeout", "judge_requests"),
)
"""Flags of some benchmarks alone."""


def add(commands: Commands) -> None:
    sub = add_command(commands, "bench", run, "run a method on the instances of a benchmark")
    sub.add_argument("benchmark", choices=("microworld", "vbvr", "ruler", "vr-bench"))
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--method", metavar="NAME", help="base, teacher, pass@N, ...; an unknown one lists all")
    what.add_argument(
        "--table",
        metavar="NAME",
        help="all methods of the paper's tables I to IV, of paper (I and III in one), rewards, warm or remedies",
    )
    sub.add_argument("--limit", type=int, metavar="N", help="scenes of each split (default: 100, or all of the data)")
    sub.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="noises for each scene, in a table for its main methods (default: 1; tables paper and remedies: 3)",
    )
    sub.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the split (default: 1, the frozen one)")
    sub.add_argument("--split", metavar="NAME", help="split of a method (default: id, or all of the data's)")
    sub.add_argument("--trace", action="store_true", help="also score the few-step video at every step")
    sub.add_argument(
        "--many-step", metavar="ID", help="Reasoner before its few-step distillation, for the method many-step"
    )
    sub.add_argument("--pair", metavar="DIR", help="folder with a pair.json (default: the packaged pair)")
    add_families(sub)
    _add_kits(sub)
    sub.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes (default: 1; 0 and 1: this process itself), or actors of --ray (default: one per GPU,"
        " or per processor without GPUs)",
    )
    sub.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="run on Ray: on the cluster at ADDRESS or RAY_ADDRESS, otherwise on this machine",
    )
    sub.add_argument("--keep-videos", action="store_true", help="keep the videos, where the scorer needs no files")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder for results.json")
    sub.add_argument("--resume", action="store_true", help="keep the instances that --out already has")
    sub.add_argument("--rescore", action="store_true", help="judge the videos of --out anew, and generate none")
    _add_vlms(sub)
    titles = ("Models instead of the pair's", "Sampling and size", "Devices and memory")
    models, sampling, place = (sub.add_argument_group(title) for title in titles)
    add_teacher(models)
    add_reasoner(models, sampling, place)
    for name, method in (("lora", "base"), ("post-lora", "post"), ("grpo-lora", "flow-grpo")):
        models.add_argument(f"--{name}", metavar="FILE", help=f"LoRA that the method {method} runs with")
    add_lora_partial(models)
    for kind in ("teacher", "reasoner"):
        models.add_argument(
            f"--other-{kind}", nargs="+", default=[], metavar="ID", help=f"of table IV: further {kind}s, each by itself"
        )
    settings.add_flags(sub)
    add_tracker(sub)


def _add_kits(sub: argparse.ArgumentParser) -> None:
    """The flags of benchmarks whose data and evaluation kit the user brings."""
    group = sub.add_argument_group("Data and kits of public benchmarks")
    group.add_argument("--data", metavar="DIR", help="folder of the benchmark's data, which the user has downloaded")
    group.add_argument("--evalkit", metavar="DIR", help="folder of its evaluation kit, which the user has cloned")
    group.add_argument("--evalkit-python", metavar="FILE", help="Python that runs the kit (default: this one)")
    group.add_argument("--pro", action="store_true", help="vbvr: data and kit are VBVR-Pro-Bench's")
    group.add_argument(
        "--path-tracker", choices=("ncc", "csrt", "optical_flow"), help="vr-bench: of the kit (default: ncc)"
    )
    group.add_argument(
        "--path-tolerance",
        type=float,
        metavar="X",
        help="vr-bench: distance from the path that still is on it, as a share of the diagonal (default: 0.01)",
    )


def _add_vlms(sub: argparse.ArgumentParser) -> None:
    """The flags of VLMs beside the Teacher."""
    group = sub.add_argument_group("VLMs beside the Teacher")
    what = "a model behind its URL, or local:DIR"
    group.add_argument("--judge", metavar="MODEL", help=f"ruler: VLM that rates the videos, {what}")
    group.add_argument("--judge-url", metavar="URL", help="its OpenAI-compatible endpoint; key: VLMTEACHER_JUDGE_KEY")
    group.add_argument("--judge-cache", metavar="DIR", help="its replies (default: ~/.cache/vlmteacher/judge)")
    group.add_argument("--judge-timeout", type=float, metavar="S", help="seconds of an attempt (default: 180)")
    group.add_argument("--judge-requests", type=int, metavar="N", help="requests at a time (default: 8)")
    group.add_argument("--vlm", metavar="MODEL", help=f"VLM that rewrites prompts for pe and videotpo, {what}")
    group.add_argument("--vlm-url", metavar="URL", help="its OpenAI-compatible endpoint; key: VLMTEACHER_VLM_KEY")


def run(arguments: argparse.Namespace) -> None:
    for name, least in (("limit", 1), ("workers", 0), ("seed", 0), ("seeds", 1)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise InputError(f"--{name} must be at least {least}, not {value}")
        if value is not None and value > LARGEST:
            raise InputError(f"--{name} must be below 2**63, not {value}")
    from vlmteacher.quiet import quiet

    quiet(notices=not arguments.quiet)
    if (arguments.other_teacher or arguments.other_reasoner) and arguments.table != "IV":
        raise InputError("--other-teacher and --other-reasoner go with --table IV, which compares models")
    if arguments.deterministic:  # cuBLAS reads it when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with tracked(arguments, Path(arguments.out)):
        (_run_method if arguments.table is None else _run_table)(arguments)


def _run_method(arguments: argparse.Namespace) -> None:
    from vlmteacher.evaluation.sweep import run_method

    benchmark, console = _benchmark(arguments), arguments.console
    results = run_method(
        arguments.method,
        benchmark,
        [arguments.split] if arguments.split else benchmark.default_splits or benchmark.splits,
        arguments.limit or benchmark.default_limit,
        arguments.seeds or 1,
        Path(arguments.out),
        arguments.workers,
        arguments.resume,
        arguments.rescore,
        arguments.keep_videos,
        arguments.ray,
    )
    print(f"{results['benchmark']}, method {results['method']}")
    print("\n".join(benchmark.lines(results)))
    print(f"{results['updates_mean']:.1f} updates and {results['seconds_mean']:.1f} s per instance")
    file = Path(arguments.out) / "results.json"
    console.last(f"Results: {file}")
    console.result("bench", results=str(file), **{name: v for name, v in results.items() if name != "instances"})


def _run_table(arguments: argparse.Namespace) -> None:
    from vlmteacher.evaluation.formats import format_table
    from vlmteacher.evaluation.tables import find_table, run_table

    table = find_table(arguments.table)
    for name in ("split", "lora", "lora_blocks", "rescore"):
        if getattr(arguments, name) not in (None, False):
            raise InputError(f"--{name.replace('_', '-')} goes with --method: a table has its own splits and methods")
    benchmark, out = _benchmark(arguments), Path(arguments.out)
    content = run_table(
        table,
        benchmark,
        arguments.limit or benchmark.default_limit,
        arguments.seeds or table.noises,
        out,
        arguments.workers,
        arguments.resume,
        arguments.other_teacher,
        arguments.other_reasoner,
        arguments.ray,
        arguments.keep_videos,
    )
    print(format_table(content))
    arguments.console.last(f"Results: {out / 'table.json'}, .md, .csv and .tex, and a folder for each method")
    arguments.console.result("bench", results=str(out / "table.json"), **content)


def _benchmark(arguments: argparse.Namespace) -> Benchmark:
    """Return the `Bench` of the benchmark's module; its fields are set by the flags of their names."""
    from vlmteacher.evaluation.models import Models

    bench: type[Benchmark] = import_module(f"vlmteacher.evaluation.{_module(arguments)}").Bench
    names = {field.name for field in fields(bench)}
    for name in OWN:
        if getattr(arguments, name) and name not in names | ({"family"} if "families" in names else set()):
            raise InputError(f"--{name.replace('_', '-')} is not for the benchmark {arguments.benchmark}")
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    if "families" in names:
        given["families"] = tuple(families(arguments))
    chosen: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name in (field.name for field in fields(Models) if field.name != "settings")
        if (value := getattr(arguments, name)) is not None
    }
    return bench(**given, models=Models(**chosen, settings=tuple(settings.given(arguments).items())))


def _module(arguments: argparse.Namespace) -> str:
    name: str = arguments.benchmark
    return name.replace("-", "_")
