"""`vlmteacher solve`: answer one prompt with a video, improved by the Teacher."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmteacher import settings
from vlmteacher.cli.console import add_tracker, check_trackers, tracked
from vlmteacher.cli.defaults import DefaultsFile, read_config, read_plan
from vlmteacher.cli.flags import (
    Commands,
    add_command,
    add_instance,
    add_lora_partial,
    add_reasoner,
    read_image_flag,
    read_instance,
    seed,
)
from vlmteacher.cli.run_folder import check_converged, check_run_folder, print_folder, print_result
from vlmteacher.errors import InputError
from vlmteacher.placement import QUANTIZATIONS, parse_device_map

SIZE = ("num_frames", "height", "width")
IMAGES = ("image", "last_image", "goal_image")

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmteacher.pipeline import TeacherPipeline
    from vlmteacher.ranks import Ranks


def add(commands: Commands) -> None:
    sub = add_command(commands, "solve", run, "answer one prompt with a video, improved by the Teacher")
    sub.usage = "vlmteacher solve --prompt TEXT [--image FILE] --out DIR [OPTION ...]"
    task, models, sampling, lora, place = (
        sub.add_argument_group(title)
        for title in ("The task", "Models", "Sampling and size", "LoRA", "Devices and memory")
    )
    add_instance(task, models)
    task.add_argument("--last-image", metavar="FILE", help="the last frame, for Reasoners that take one")
    task.add_argument(
        "--config",
        metavar="FILE",
        action=DefaultsFile,
        read=read_config,
        help="flags that are not given here: `flag: value` in YAML, or run.json of a run",
    )
    task.add_argument("--queries", metavar="FILE.json", help="the Teacher's queries (default: it writes them)")
    task.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="NAME=WEIGHT",
        help="beside the Teacher: temporal_smoothness, clip_similarity or clip_similarity@MODEL; may be repeated",
    )
    task.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of the noise (default: 0)")
    task.add_argument("--out", required=True, metavar="DIR", help="run folder to write")
    task.add_argument("--resume", action="store_true", help="continue the interrupted run in --out")
    add_reasoner(models, sampling, place)
    place.add_argument(
        "--fp8",
        action="store_true",
        help="the Reasoner's frozen weights in 8-bit floating point: approximate, and only on GPUs that have it",
    )
    place.add_argument(
        "--quantize-reasoner",
        choices=QUANTIZATIONS,
        help="the Reasoner's weights in fewer bits: by bitsandbytes, by torchao, or as its files have them"
        " (extra: quantized)",
    )
    place.add_argument(
        "--context-parallel",
        type=int,
        metavar="N",
        help="share one instance among N GPUs: torchrun --nproc-per-node N -m vlmteacher solve ...",
    )
    place.add_argument(
        "--plan", metavar="FILE", action=DefaultsFile, read=read_plan, help="the flags that `vlmteacher plan -o` wrote"
    )
    place.add_argument(
        "--vae-dtype", choices=("float32", "bfloat16"), help="of the standard VAE (default: the model's, float32)"
    )
    lora.add_argument("--lora", metavar="FILE", help="train this LoRA further (default: a fresh one)")
    add_lora_partial(lora)
    settings.add_flags(sub)
    add_tracker(sub)


def run(arguments: argparse.Namespace) -> None:
    from vlmteacher.ranks import ALONE, join, leave

    ranks = ALONE
    if arguments.context_parallel is not None:
        if arguments.device_map:
            raise InputError("--context-parallel and --device-map exclude each other: each rank has one GPU for all")
        ranks = join(arguments.context_parallel, arguments.device)
    with ranks.watched(), redirect_stdout(StringIO()) if ranks.rank else nullcontext():
        _solve(arguments, ranks)
    leave(ranks)


def _solve(arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Solve the instance as one of `ranks`."""
    import torch

    with ranks.together():
        (image, last_image, goal_image), queries, rewards, pipe = _inputs(arguments, ranks)
    with nullcontext() if ranks.rank else tracked(arguments, Path(arguments.out)):
        output = pipe(
            arguments.prompt,
            image,
            last_image=last_image,
            goal_image=goal_image,
            num_frames=arguments.num_frames,
            height=arguments.height,
            width=arguments.width,
            num_inference_steps=arguments.num_inference_steps,
            guidance_scale=arguments.guidance_scale,
            negative_prompt=arguments.negative_prompt,
            generator=torch.Generator().manual_seed(arguments.seed),
            queries=queries,
            rewards=rewards,
            run_dir=None if ranks.rank else arguments.out,
            resume=arguments.resume,
            **settings.given(arguments),
        )
    if ranks.rank == 0:
        print_result(output)
        print_folder(arguments, output)
        check_converged(output)


def _inputs(arguments: argparse.Namespace, ranks: Ranks) -> tuple[Any, Any, list[Any], TeacherPipeline]:
    """First frame, last frame, picture of the goal, queries, rewards and models. Raises InputError."""
    for name in getattr(arguments, "recorded_files", ()):
        if getattr(arguments, name) is None:
            flag = name.replace("_", "-")
            raise InputError(f"the run in {arguments.config} had a file that it does not hold: give --{flag}")
    images = read_instance(arguments), *(read_image_flag(arguments, name) for name in ("last_image", "goal_image"))
    from vlmteacher.lora.formats import read_lora
    from vlmteacher.queries import QuerySet

    if ranks.rank == 0:
        check_run_folder(arguments)
    check_trackers(arguments)
    query_set = QuerySet.of(arguments.queries)
    if arguments.lora is not None:
        read_lora(arguments.lora, partial=arguments.lora_partial)  # raises before any model is loaded
    from vlmteacher.quiet import quiet

    quiet(notices=not arguments.quiet)
    if arguments.deterministic:  # cuBLAS reads it when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    keywords = settings.given(arguments)
    settings.Settings().updated(**keywords)  # raises for bad values before any model is loaded
    _check_video(arguments, images, refuse=keywords.get("fit", "refuse") == "refuse")
    from vlmteacher.rewards import parse_reward

    rewards = [parse_reward(text) for text in arguments.reward]
    pipe = load_pipeline(arguments)
    if arguments.lora is not None:
        pipe.load_lora(arguments.lora, arguments.lora_partial)
    keep_activations(arguments, pipe)
    pipe.share(ranks)
    return images, query_set, rewards, pipe


def _check_video(arguments: argparse.Namespace, images: Sequence[Image | None], refuse: bool) -> None:
    """Raise InputError for a size or a last frame that the Reasoner does not take.

    Its configs say so before it is loaded. refuse: whether images of another shape raise too.
    """
    size = {name: getattr(arguments, name) for name in SIZE}
    if not any(images if refuse else images[1:2]) and not any(size.values()):
        return
    from vlmteacher.media import fit_image
    from vlmteacher.planning.models import build_reasoner

    try:
        reasoner, _ = build_reasoner(arguments.reasoner or "packaged")
    except InputError:  # its configs are on the hub, or are refused when it is loaded, with a better reason
        return
    size = {name: getattr(reasoner, name) if value is None else value for name, value in size.items()}
    reasoner.check(**size)
    reasoner.check_last_image(images[1])
    for name, given in zip(IMAGES, images, strict=True):
        if refuse and given is not None:
            fit_image(given, size["height"], size["width"], name)


def keep_activations(arguments: argparse.Namespace, pipe: TeacherPipeline) -> None:
    """Apply --activations to the Reasoner. Raises InputError."""
    if arguments.activations is not None:
        from vlmteacher.reasoners.checkpointing import block_list, keep_activations, parse_levels

        transformer = pipe.reasoner.transformer
        keep_activations(transformer, parse_levels(arguments.activations, len(block_list(transformer))))


def load_pipeline(arguments: argparse.Namespace) -> TeacherPipeline:
    """Load the models that the flags name, on their devices. Raises InputError and MissingExtra."""
    if arguments.activations is not None and arguments.memory is not None:
        raise InputError(
            f"--activations {arguments.activations} and --memory {arguments.memory} exclude each other: --memory plans"
            " the activations"
        )
    import torch

    from vlmteacher.pipeline import TeacherPipeline
    from vlmteacher.placement import describe, find_devices, find_dtype
    from vlmteacher.torch_modes import deterministic

    where = parse_device_map(arguments.device_map) if arguments.device_map else arguments.device
    devices = find_devices(where, "--device", "--device-map")
    if arguments.device_map and arguments.device:
        raise InputError(f"--device {arguments.device} and --device-map {arguments.device_map} exclude each other")
    if arguments.offload and all(device.type == "cpu" for device in devices.values()):
        raise InputError("--offload keeps in main memory what a GPU does not need: give --device or --device-map too")
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else find_dtype(devices)
    print(describe(devices, dtype), flush=True)
    with deterministic(*devices.values()) if arguments.deterministic else nullcontext():  # a LoRA is merged here
        return TeacherPipeline.from_pretrained(
            arguments.reasoner,
            arguments.teacher,
            arguments.decoder,
            dtype=dtype,
            vae_dtype=arguments.vae_dtype,
            device_map=devices,
            offload=arguments.offload,
            quantize=arguments.quantize,
            fp8=arguments.fp8,
            quantization_config=arguments.quantize_reasoner,
            transformer=arguments.transformer,
            few_step_lora=arguments.few_step_lora,
            preset=arguments.preset,
            lora_partial=arguments.lora_partial,
        )
