"""`vlmteacher plan`: FLOPs and peak memory of one optimisation step, ours and stock, at any size."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vlmteacher.cli.flags import Commands, add_command
from vlmteacher.errors import InputError
from vlmteacher.placement import QUANTIZATIONS


def add(commands: Commands) -> None:
    text = "FLOPs and peak memory of one optimisation step, ours and stock, at any size; needs no GPU"
    sub = add_command(commands, "plan", run, text)
    sub.add_argument("--reasoner", metavar="ID", help="known video model, packaged, or local directory")
    sub.add_argument("--teacher", metavar="ID", help="known VLM, packaged, or local directory")
    sub.add_argument(
        "--verify",
        action="store_true",
        help="instead of a plan, run one whole step of every known video model (or of --reasoner) without data",
    )
    sub.add_argument("--decoder", metavar="ID", help="taew2_1, taew2_2 or a checkpoint file (default: the Reasoner's)")
    sub.add_argument("--num-frames", type=int, metavar="F", help="frames of the video (default: the Reasoner's)")
    sub.add_argument("--height", type=int, metavar="H", help="pixels")
    sub.add_argument("--width", type=int, metavar="W", help="pixels")
    sub.add_argument("--questions", type=int, default=4, metavar="N", help="goal and process questions (default: 4)")
    sub.add_argument("--teacher-frames", type=int, metavar="K", help="frames that the Teacher sees (default: 24)")
    sub.add_argument(
        "--windows", type=int, default=1, metavar="W", help="parts of K frames that the Teacher judges one by one"
    )
    sub.add_argument("--goal-image", action="store_true", help="the Teacher sees a picture of the goal too")
    sub.add_argument("--rank", type=int, default=16, metavar="R", help="rank of the LoRA (default: 16)")
    sub.add_argument(
        "--memory", type=float, default=48, metavar="GB", help="memory of the device, 10^9 bytes (default: 48)"
    )
    sub.add_argument(
        "--text-encoder",
        choices=("device", "cpu"),
        default="device",
        help="place of text encoder, image encoder and low-noise expert during the steps (default: device)",
    )
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    sub.add_argument(
        "--quantize-reasoner",
        choices=[choice for choice in QUANTIZATIONS if choice != "keep"],
        help="the Reasoner's weights in fewer bits, as `vlmteacher solve` keeps them",
    )
    sub.add_argument("--json", action="store_true", help="machine-readable")
    sub.add_argument(
        "-o", "--output", metavar="FILE.json", help="file to write the settings to, for `vlmteacher solve --plan FILE`"
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.output and not Path(arguments.output).absolute().parent.is_dir():
        raise InputError(f"plan {arguments.output}: the directory {Path(arguments.output).parent} does not exist")
    if not arguments.memory > 0:
        raise InputError(f"--memory must be a number of GB above 0, not {arguments.memory:g}")
    if not arguments.verify and not (arguments.reasoner and arguments.teacher):
        raise InputError("--reasoner and --teacher are needed to plan a step; --verify runs all known video models")
    from vlmteacher.quiet import quiet

    quiet()
    import torch

    from vlmteacher.planning import format_plan, make_plan

    if arguments.verify:
        from vlmteacher.planning.verify import HEADER, format_verified, verify

        if not arguments.json:
            print(HEADER)
        for row in verify(arguments.reasoner, arguments.teacher):
            print(json.dumps(row) if arguments.json else format_verified(row), flush=True)
        return

    result = make_plan(
        arguments.reasoner,
        arguments.teacher,
        arguments.num_frames,
        arguments.height,
        arguments.width,
        decoder=arguments.decoder,
        questions=arguments.questions,
        teacher_frames=arguments.teacher_frames,
        goal_image=arguments.goal_image,
        windows=arguments.windows,
        rank=arguments.rank,
        memory=arguments.memory,
        text_encoder=arguments.text_encoder,
        dtype=getattr(torch, arguments.dtype),
        quantize_reasoner=arguments.quantize_reasoner,
    )
    print(json.dumps(result) if arguments.json else format_plan(result))
    if arguments.output:
        from vlmteacher.files import write_json
        from vlmteacher.planning.cards import solve_flags
        from vlmteacher.planning.plan import gigabytes_up

        if not result["fits"]:
            least = gigabytes_up(result["floor_bytes"])
            raise InputError(
                f"{arguments.output} is not written: --memory {arguments.memory:g} is below the floor, {least} GB"
            )
        write_json(Path(arguments.output), {"solve": solve_flags(result, arguments.dtype), "plan": result})
        if not arguments.json:
            print(f"Settings for `vlmteacher solve --plan {arguments.output} ...`: {arguments.output}")
