"""`vlmteacher queries`: write the Teacher's queries, to read and edit them."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from vlmteacher.cli.flags import Commands, add_command, add_instance, read_image_flag, read_instance
from vlmteacher.errors import InputError, Notice


def add(commands: Commands) -> None:
    sub = add_command(commands, "queries", run, "write the Teacher's queries alone, to read and edit them")
    add_instance(sub, sub)
    sub.add_argument("-o", "--output", metavar="FILE.json", help="file to write (default: standard output)")


def run(arguments: argparse.Namespace) -> None:
    image, goal = read_instance(arguments), read_image_flag(arguments, "goal_image")
    if arguments.output and not (parent := Path(arguments.output).absolute().parent).is_dir():
        raise InputError(f"queries file {arguments.output}: the directory {parent} does not exist")
    if arguments.output and Path(arguments.output).is_dir():
        raise InputError(f"queries file {arguments.output} is a directory: give the name of a file in it")
    from vlmteacher.quiet import quiet

    quiet()
    import torch

    from vlmteacher.media import fit_image
    from vlmteacher.microworld.known_tasks import unknown_task
    from vlmteacher.pipeline import read_pair
    from vlmteacher.placement import find_devices, find_dtype
    from vlmteacher.reasoners.sampling import SamplerSettings
    from vlmteacher.teachers import load_teacher

    if arguments.teacher is None:
        if note := unknown_task(arguments.prompt):
            warnings.warn(note, Notice, stacklevel=1)
        directory, pair = read_pair()
        arguments.teacher = str(directory / pair["teacher"])
        frame = SamplerSettings.load(directory / pair["reasoner"] / "reasoner.json")
        image, goal = (  # as the packaged Reasoner gets them
            None if given is None else fit_image(given, frame.height, frame.width, name)
            for name, given in (("image", image), ("goal_image", goal))
        )
    devices = find_devices(arguments.device, "--device")
    device, dtype = devices["teacher"], getattr(torch, arguments.dtype) if arguments.dtype else find_dtype(devices)
    teacher = load_teacher(arguments.teacher, dtype=dtype, quantize=arguments.quantize, device=device).to(device)
    written = teacher.with_goal(goal).write_queries(arguments.prompt, image)
    if arguments.output:
        written.save(arguments.output)
        for kind, question in zip(("goal", *["process"] * len(written.process)), written.questions, strict=True):
            print(f"{kind:8} {question}")
        print(f"Edit {arguments.output} if you like, then: vlmteacher solve --queries {arguments.output} ...")
    else:
        print(written.to_json())
