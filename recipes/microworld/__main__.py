"""The command line of the recipe: `python -m recipes.microworld {list,stage,replay}`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlmteacher.cli import Parser
from vlmteacher.cli import run as run_command
from vlmteacher.cli.flags import add_command

OUT = "folder of all runs; each reads earlier ones from it"
MANIFEST = "both (default), the packaged pair's, from the pair in --init; or single, that of the pair before"
INIT = "a pair whose weights the stages start from that can (default: from scratch)"
DEVICE = "of the stage teacher-point: cpu (default), cuda, ..."


def parser() -> argparse.ArgumentParser:
    """The parser of the recipe's commands."""
    top: argparse.ArgumentParser = Parser(
        prog="python -m recipes.microworld", description="How the packaged microworld models were trained."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    listed = add_command(commands, "list", list_runs, "the runs that made the packaged models")
    stage = add_command(commands, "stage", run_stage, "train one stage with its packaged settings")
    stage.add_argument("stage", metavar="NAME", help="vae, vae-decoder, ...; another name lists them")
    replay = add_command(commands, "replay", replay_runs, "repeat the runs that made the packaged models")
    replay.add_argument("--from", dest="first", metavar="RUN", help="the first run (default: the first of the list)")
    replay.add_argument("--to", dest="last", metavar="RUN", help="the last run (default: the last of the list)")
    kept = add_command(commands, "keep", keep_runs, "keep what a replay needs to go on elsewhere, in few megabytes")
    kept.add_argument("--out", required=True, metavar="DIR", help="--out of the replay")
    kept.add_argument("--to", required=True, metavar="DIR", help="folder to write; a copy of it is another --out")
    for command in (listed, replay, kept):
        command.add_argument("--manifest", default="both", metavar="NAME", help=MANIFEST)
    replay.add_argument(
        "--shorten", type=int, default=1, metavar="N", help="divide steps and numbers of videos by N, to try it out"
    )
    for command in (stage, replay):
        command.add_argument("--out", required=True, metavar="DIR", help=OUT)
        command.add_argument("--init", metavar="PAIR", help=INIT)
        command.add_argument("--device", default="cpu", metavar="D", help=DEVICE)
        command.set_defaults(resumes=True)
    return top


def list_runs(arguments: argparse.Namespace) -> None:
    """Print the manifest."""
    from recipes.microworld.replay import find_manifest, listing

    print(listing(find_manifest(arguments.manifest)))


def run_stage(arguments: argparse.Namespace) -> None:
    """Train one stage."""
    from recipes.microworld.stages import run
    from vlmteacher.quiet import quiet

    quiet()
    run(arguments.stage, Path(arguments.out), _pair(arguments), arguments.device)


def replay_runs(arguments: argparse.Namespace) -> None:
    """Replay a part of the manifest."""
    from recipes.microworld.replay import find_manifest, replay
    from vlmteacher.quiet import quiet

    quiet()
    manifest, out, init = find_manifest(arguments.manifest), Path(arguments.out), _pair(arguments)
    replay(out, arguments.first, arguments.last, arguments.shorten, init, arguments.device, manifest)


def keep_runs(arguments: argparse.Namespace) -> None:
    """Keep what the unfinished runs of a manifest need."""
    from recipes.microworld.keep import keep
    from recipes.microworld.replay import find_manifest

    keep(Path(arguments.out), Path(arguments.to), find_manifest(arguments.manifest))


def _pair(arguments: argparse.Namespace) -> Path | None:
    return Path(arguments.init) if arguments.init else None


if __name__ == "__main__":
    sys.exit(run_command(parser))
