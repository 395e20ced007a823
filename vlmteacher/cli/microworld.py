"""`vlmteacher microworld`: export instances of the built-in world; measure how good a Reasoner's few steps are."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmteacher.cli.console import add_output
from vlmteacher.cli.flags import Commands, add_command, add_families, families, seed
from vlmteacher.errors import InputError
from vlmteacher.settings import Renamed


def add(commands: Commands) -> None:
    text = "instances of the built-in world as files; how good a Reasoner's few steps are"
    kinds = add_command(commands, "microworld", export, text).add_subparsers(required=True, metavar="WHAT")
    sub = kinds.add_parser("export", help="write instances in VBVR's layout")
    sub.add_argument(
        "--layout",
        choices=("train", "bench"),
        default="train",
        help="of VBVR's training data (default), or of VBVR-Bench's: both test splits, for `bench vbvr`",
    )
    sub.set_defaults(command=sub)
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    sub.add_argument("--limit", type=int, default=100, metavar="N", help="instances (default: 100)")
    sub.add_argument("--count", dest="limit", type=int, action=Renamed, new="--limit")
    sub.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of the instances (default: 0)")
    sub.add_argument("--split", metavar="NAME", help="train (default), id, ood or validation")
    add_families(sub)
    sub.add_argument(
        "--flawed",
        nargs="?",
        const="both",
        metavar="SCHEME",
        help="videos with documented flaws: both (default), as the packaged Reasoner was trained on, or single",
    )
    add_output(sub)

    sub = kinds.add_parser("measure", help="rule score, distance and one-step agreement on held-out instances")
    sub.set_defaults(run=measure, command=sub)
    sub.add_argument("--reasoner", metavar="ID", help="hub id or directory (default: the packaged one)")
    sub.add_argument("--teacher", metavar="ID", help="judge of both videos (default: the packaged one)")
    sub.add_argument("--limit", type=int, default=100, metavar="N", help="instances (default: 100)")
    sub.add_argument("--seed", type=seed, default=1, metavar="N", help="seed of the held-out split (default: 1)")
    sub.add_argument("--many-steps", type=int, default=0, metavar="N", help="sample by N Euler steps, not by few steps")
    sub.add_argument(
        "--guidance-scale", type=float, default=1.0, metavar="X", help="guidance of these steps (default: 1, none)"
    )
    sub.add_argument("--guidance", dest="guidance_scale", type=float, action=Renamed, new="--guidance-scale")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder for results.json and frames.png")
    add_output(sub)


def export(arguments: argparse.Namespace) -> None:
    from vlmteacher.quiet import quiet

    quiet(notices=not arguments.quiet)
    from vlmteacher.microworld.export import export, export_bench

    out, chosen = Path(arguments.out), families(arguments)
    if arguments.layout == "bench":
        if arguments.split is not None or arguments.flawed is not None:
            raise InputError("--layout bench has both test splits and right videos: it goes without --split, --flawed")
        export_bench(out, arguments.limit, arguments.seed, chosen)
        text = f"{arguments.limit} instances of each test split in VBVR-Bench's layout: {out}"
    else:
        export(out, arguments.limit, arguments.seed, arguments.split or "train", arguments.flawed, chosen=chosen)
        text = f"{arguments.limit} instances in VBVR's layout: {out}"
    arguments.console.last(text)
    arguments.console.result("export", out=str(out), layout=arguments.layout, limit=arguments.limit)


def measure(arguments: argparse.Namespace) -> None:
    from vlmteacher.quiet import quiet

    quiet(notices=not arguments.quiet)
    from vlmteacher.evaluation.few_step import report
    from vlmteacher.pipeline import PACKAGED_PAIR

    out = Path(arguments.out)
    metrics = report(
        arguments.reasoner or str(PACKAGED_PAIR / "reasoner"),
        arguments.teacher or str(PACKAGED_PAIR / "teacher"),
        arguments.limit,
        arguments.seed,
        out,
        arguments.many_steps,
        arguments.guidance_scale,
    )
    for name, value in metrics.items():
        if isinstance(value, float):
            print(f"{name:16} {value:.3f}")
    arguments.console.last(f"Results: {out / 'results.json'}, {out / 'frames.png'}")
    means = {name: value for name, value in metrics.items() if isinstance(value, float)}
    arguments.console.result("measure", results=str(out / "results.json"), **means)
