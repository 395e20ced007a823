"""Flags that several commands share, and how their values are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from vlmteacher.arguments import is_blank
from vlmteacher.errors import InputError
from vlmteacher.placement import EXAMPLE

if TYPE_CHECKING:
    from PIL import Image

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Flags: TypeAlias = "argparse._ActionsContainer"  # a parser, or a group of its flags
Run: TypeAlias = Callable[[argparse.Namespace], None]

TRAINING = ("reasoner", "data", "out", "steps", "batch_size", "learning_rate", "seed")
"""The flags of `add_training`, which override the entries of the same names in --config."""


def add_command(commands: Commands, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """A command whose parsed arguments go to `run`; returns its parser, for its flags."""
    sub = commands.add_parser(name, help=text, description=text)
    sub.set_defaults(run=run, command=sub)
    return sub


def add_instance(sub: Flags, models: Flags) -> None:
    """The flags of one task, and those of its Teacher in the group `models`."""
    sub.add_argument("--prompt", required=True, metavar="TEXT", help="the task")
    sub.add_argument("--image", metavar="FILE", help="the first frame")
    sub.add_argument(
        "--goal-image",
        metavar="FILE",
        help="a picture of the goal, for the Teacher alone (default: the last frame, where one is given)",
    )
    add_teacher(models)


def add_teacher(models: Flags) -> None:
    """The flags of the Teacher, and of device and dtype."""
    models.add_argument("--teacher", metavar="ID", help="VLM: hub id or directory (default: the packaged one)")
    models.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: the GPU, if there is one)")
    models.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    models.add_argument(
        "--quantize", choices=("8bit", "4bit"), help="quantise the Teacher's weights (extra: quantized)"
    )


def add_reasoner(models: Flags, sampling: Flags, place: Flags) -> None:
    """The flags of the Reasoner and the surrogate decoder, of sampling and size, and of devices and memory."""
    models.add_argument("--reasoner", metavar="ID", help="video model: hub id or directory (default: the packaged one)")
    models.add_argument(
        "--decoder",
        metavar="FILE",
        help="surrogate decoder: file, or OWNER/REPO/FILE on the hub (default: that of the Reasoner's family)",
    )
    both = "; two for the experts of Wan 2.2 A14B, high noise first"
    models.add_argument(
        "--transformer", nargs="+", metavar="ID", help=f"instead of the Reasoner's: directory, hub id or file{both}"
    )
    models.add_argument("--few-step-lora", nargs="+", metavar="FILE", help=f"merged into the Reasoner{both}")
    sampling.add_argument(
        "--preset", metavar="NAME", help="sampling of the Reasoner (default: reasoner.json, or by hub id)"
    )
    sampling.add_argument("--num-inference-steps", type=int, metavar="N", help="evenly spaced, instead of the preset's")
    sampling.add_argument("--guidance-scale", type=float, metavar="X", help="1: no guidance (default: the preset's)")
    sampling.add_argument(
        "--negative-prompt", metavar="TEXT", help="text that guidance steers away from (default: the preset's)"
    )
    sampling.add_argument("--num-frames", type=int, metavar="F", help="frames of the video")
    sampling.add_argument("--height", type=int, metavar="H", help="pixels")
    sampling.add_argument("--width", type=int, metavar="W", help="pixels")
    place.add_argument("--device-map", metavar="MAP", help=f"devices of both models, {EXAMPLE}, instead of --device")
    place.add_argument("--offload", action="store_true", help="keep idle networks in main memory")
    place.add_argument(
        "--activations",
        metavar="LEVELS",
        help="activations that the blocks keep for the backward, in the words of `vlmteacher plan` (default: all)",
    )


def read_instance(arguments: argparse.Namespace) -> Image.Image | None:
    """The first frame, if there is one. Raises InputError for an image that cannot be read and an empty prompt."""
    image = read_image_flag(arguments, "image")
    if is_blank(arguments.prompt):
        raise InputError("--prompt is empty: say what the video must show")
    return image


def read_image_flag(arguments: argparse.Namespace, name: str) -> Image.Image | None:
    """The image of a flag, if it was given. Raises InputError for one that cannot be read."""
    path = getattr(arguments, name)
    if path is None:
        return None
    from vlmteacher.media import read_image

    return read_image(path, name)


def add_lora_partial(sub: Flags) -> None:
    sub.add_argument(
        "--lora-partial",
        action="store_true",
        help="skip tensors of other networks in a LoRA file, instead of refusing the file",
    )


def add_families(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--family",
        action="append",
        metavar="NAME",
        help="family of tasks, may be repeated; all is the default",
    )


def families(arguments: argparse.Namespace) -> Sequence[str]:
    """The families of --family, in the world's order whatever the order of the flags. Raises InputError."""
    from vlmteacher.microworld import world

    if not arguments.family:
        return world.FAMILIES
    world.check("id", [name for name in arguments.family if name != "all"])
    return [name for name in world.FAMILIES if {name, "all"} & {*arguments.family}]


def add_training(sub: argparse.ArgumentParser, reasoner: str) -> None:
    """The flags of a training; `reasoner` is the help of --reasoner."""
    sub.add_argument(
        "--config",
        required=True,
        metavar="FILE.yaml",
        help="settings, or a sample of the package: sft, post, grpo, dmd2, decoder; the flags below override them",
    )
    sub.add_argument("--reasoner", metavar="ID", help=reasoner)
    sub.add_argument("--data", metavar="DIR", help="instances in VBVR's layout (post, grpo: or microworld)")
    sub.add_argument(
        "--out", metavar="DIR", help="folder to write; the result is its folder `pipeline`, or its lora.safetensors"
    )
    sub.add_argument("--steps", type=int, metavar="N", help="updates of the result")
    sub.add_argument("--batch-size", type=int, metavar="N", help="videos per update")
    sub.add_argument("--lr", type=float, metavar="X", dest="learning_rate", help="learning rate of the result")
    sub.add_argument("--seed", type=seed, metavar="N", help="seed of all random draws")
    sub.add_argument("--resume", action="store_true", help="continue the interrupted run in --out")


def given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The values of those flags of `names` that were given."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def seed(text: str) -> int:
    """The type of --seed: a whole number that a generator takes."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**63 - 1, not {text}")
    return int(text)
