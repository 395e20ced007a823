"""`vlmteacher lora`: LoRA files in the names that other tools use, and on the hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmteacher.cli.flags import Commands, add_command, add_lora_partial
from vlmteacher.errors import InputError


def add(commands: Commands) -> None:
    sub = add_command(commands, "lora", run, "LoRA files in the names that other tools use, and on the hub")
    kinds = sub.add_subparsers(required=True, metavar="WHAT")
    kind = kinds.add_parser("convert", help="write a LoRA of any known tool in the names of another tool")
    kind.set_defaults(command=kind)
    kind.add_argument("file", metavar="FILE", help="a .safetensors file, or PEFT's folder")
    kind.add_argument(
        "--to", required=True, choices=("diffusers", "comfyui", "musubi"), help="tool whose names the new file has"
    )
    kind.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="file to write; two files for a LoRA of two experts"
    )
    add_lora_partial(kind)

    kind = kinds.add_parser("push", help="upload the LoRA of a run folder to the hub, with its model card and videos")
    kind.set_defaults(run=push, command=kind)
    kind.add_argument("folder", metavar="DIR", help="run folder")
    kind.add_argument("repo", metavar="OWNER/NAME", help="model repository; made where it is not there yet")
    kind.add_argument("--private", action="store_true", help="make a private repository")
    kind.add_argument("--revision", metavar="BRANCH", help="branch to upload to (default: main)")


def push(arguments: argparse.Namespace) -> None:
    from vlmteacher.runs.hub import push_to_hub

    address = push_to_hub(arguments.folder, arguments.repo, private=arguments.private, revision=arguments.revision)
    print(f"LoRA, model card, queries and videos: {address}")


def run(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise InputError(f"-o {output}: give the name of a file in a directory that exists")
    from vlmteacher.files import write_bytes
    from vlmteacher.lora.formats import read_experts

    experts = {
        expert: each.factors_only() if arguments.lora_partial and arguments.to != "comfyui" else each
        for expert, each in read_experts(arguments.file, partial=arguments.lora_partial).items()
    }
    names = {"transformer": "_high_noise", "transformer_2": "_low_noise"} if len(experts) > 1 else {}
    outputs = {
        output.with_name(f"{output.stem}{names.get(str(expert), '')}{output.suffix}"): (
            each,
            each.to_bytes(arguments.to),
        )
        for expert, each in experts.items()
    }
    for path, (read, data) in outputs.items():
        read.tell()
        write_bytes(path, data)
        print(
            f"{len(read.layers)} layers, rank {read.rank}, alpha {read.alpha:g}, as {arguments.to} names them: {path}"
        )
