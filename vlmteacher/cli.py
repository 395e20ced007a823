"""The command line.

Exit status: 0 done; 1 the optimisation broke down, or a result cannot be written; 2 bad input (one line on stderr);
130, 143 and 129 interrupted by SIGINT, SIGTERM and SIGHUP (`--resume` goes on).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vlmteacher import __version__, settings
from vlmteacher.errors import InputError, MissingExtra, OutputError, TaskFailed
from vlmteacher.files import check_text
from vlmteacher.interruption import Interrupted, endings_interrupt
from vlmteacher.placement import EXAMPLE, parse_device_map
from vlmteacher.quiet import quiet_warnings

if TYPE_CHECKING:
    from PIL import Image

    from vlmteacher.pipeline import TeacherPipeline, TeacherPipelineOutput

RESUMABLE = (
    "run.json",
    "settings.json",
    "base/settings.json",
    "state/state.pt",
)  # of a run, a sweep, a table, a training

# Heavy imports stand inside the commands: `vlmteacher --help` must answer at once.


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage that argparse prints before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    quiet_warnings()
    for stream in (sys.stdout, sys.stderr):  # a message must not fail on what a terminal cannot show
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        with endings_interrupt():
            _check_texts(arguments)
            arguments.command(arguments)
            sys.stdout.flush()
    except (InputError, MissingExtra) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (ArithmeticError, TaskFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"interrupted{_how_to_go_on(arguments)}", file=sys.stderr)
        return stop.status if isinstance(stop, Interrupted) else 130
    except OutputError as error:
        print(f"error: {' '.join(str(error).split())}{_how_to_go_on(arguments)}", file=sys.stderr)
        return 1
    except OSError as error:  # standard output; its reader, `head` for one, may have seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def _how_to_go_on(arguments: argparse.Namespace) -> str:
    if "stage" in arguments:
        return "; the same command goes on"
    out = arguments.out if "resume" in arguments else None
    can_resume = out is not None and any((Path(out) / name).exists() for name in RESUMABLE)
    return "; the same with --resume goes on" if can_resume else ""


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="vlmteacher", description="A vision-language model teaches a video generator, at test time.")
    top.add_argument("--version", action="version", version=f"vlmteacher {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, command: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    sub = add("demo", demo, "solve one packaged example with the packaged pair of models")
    sub.add_argument("--out", metavar="DIR", help="run folder to write (default: runs/demo, runs/demo-2, ...)")
    sub.add_argument("--resume", action="store_true", help="take up the interrupted run in --out (default: runs/demo)")
    settings.add_flags(sub, "fused_lora")

    sub = add("solve", solve, "answer one prompt with a video, improved by the Teacher")
    _add_instance(sub)
    sub.add_argument("--queries", metavar="FILE.json", help="the Teacher's queries (default: it writes them)")
    sub.add_argument("--reasoner", metavar="ID", help="video model: hub id or directory (default: the packaged one)")
    sub.add_argument(
        "--decoder",
        metavar="FILE",
        help="surrogate decoder: file, or OWNER/REPO/FILE on the hub (default: the one that is known for the Reasoner)",
    )
    both = "; two for the experts of Wan 2.2 A14B, high noise first"
    sub.add_argument(
        "--transformer", nargs="+", metavar="ID", help=f"instead of the Reasoner's: directory, hub id or file{both}"
    )
    sub.add_argument("--few-step-lora", nargs="+", metavar="FILE", help=f"merged into the Reasoner{both}")
    sub.add_argument("--preset", metavar="NAME", help="how the Reasoner samples (default: reasoner.json, or by hub id)")
    sub.add_argument("--num-inference-steps", type=int, metavar="N", help="evenly spaced, instead of the preset's")
    sub.add_argument("--guidance-scale", type=float, metavar="X", help="1: no guidance (default: the preset's)")
    sub.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from (default: the preset's)")
    sub.add_argument("--lora", metavar="FILE", help="go on from this LoRA (default: a fresh one)")
    _add_lora_partial(sub)
    sub.add_argument("--num-frames", type=int, metavar="F", help="frames of the video")
    sub.add_argument("--height", type=int, metavar="H", help="pixels")
    sub.add_argument("--width", type=int, metavar="W", help="pixels")
    settings.add_flags(sub)
    sub.add_argument("--device-map", metavar="MAP", help=f"a device for each, {EXAMPLE}, instead of --device")
    sub.add_argument("--offload", action="store_true", help="what is not needed waits in main memory")
    sub.add_argument(
        "--activations",
        metavar="LEVELS",
        help="what the Reasoner's blocks keep for the backward, as `vlmteacher plan` says it (default: everything)",
    )
    sub.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of the noise (default: 0)")
    sub.add_argument("--out", required=True, metavar="DIR", help="run folder to write")
    sub.add_argument("--resume", action="store_true", help="take up the interrupted run in --out")

    sub = add("queries", queries, "only write the Teacher's queries, to read and edit them")
    _add_instance(sub)
    sub.add_argument("-o", "--output", metavar="FILE.json", help="where to (default: standard output)")

    sub = add("lora", lora, "LoRA files in the names that other tools use")
    kinds = sub.add_subparsers(required=True, metavar="WHAT", parser_class=Parser)
    kind = kinds.add_parser("convert", help="write a LoRA of any tool that is known in the names of another one")
    kind.add_argument("file", metavar="FILE", help="a .safetensors file, or PEFT's folder")
    kind.add_argument(
        "--to", required=True, choices=("diffusers", "comfyui", "musubi"), help="whose names the new file has"
    )
    kind.add_argument("-o", "--output", required=True, metavar="FILE", help="where to; of two experts, two files")
    _add_lora_partial(kind)

    sub = add("bench", bench, "a sweep over the instances of a benchmark")
    sub.add_argument("benchmark", choices=("microworld", "vbvr", "ruler"))
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--method", metavar="NAME", help="base, teacher, pass@N, steps@N, goal-only and more (see docs)")
    what.add_argument("--table", metavar="NAME", help="all methods of a table: paper, or remedies (on validation)")
    sub.add_argument("--limit", type=int, default=100, metavar="N", help="scenes of each split (default: 100)")
    sub.add_argument(
        "--seeds", type=int, metavar="N", help="noises for each scene; of a table's main methods (default: 1; table: 3)"
    )
    sub.add_argument("--seed", type=int, default=1, metavar="N", help="draws the split (default: 1, the frozen one)")
    sub.add_argument("--split", metavar="NAME", help="of a method: id (default), ood or validation")
    sub.add_argument("--trace", action="store_true", help="the scorer's verdict on the video after every step too")
    sub.add_argument("--many-step", metavar="ID", help="the Reasoner before its few-step distillation, for many-step")
    _add_families(sub)
    sub.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    settings.add_flags(sub, "lora_blocks")
    sub.add_argument("--out", required=True, metavar="DIR", help="where results.json goes")
    sub.add_argument("--resume", action="store_true", help="keep the instances that --out already has")

    sub = add("train-microworld", train_microworld, "deprecated: `python -m recipes.microworld` in a checkout")
    sub.add_argument("--stage", required=True, metavar="NAME", help="what to train")
    sub.add_argument("--out", required=True, metavar="DIR", help="for the weights; earlier stages are read from it")
    sub.add_argument("--init", metavar="DIR", help="a pair whose weights the stage starts from (default: from scratch)")
    sub.add_argument(
        "--device", default="cpu", metavar="D", help="of the stage teacher-point: cpu (default), cuda, ..."
    )

    sub = add("microworld", microworld, "instances of the built-in world as files; how good a Reasoner's few steps are")
    kinds = sub.add_subparsers(required=True, metavar="WHAT", parser_class=Parser, dest="what")
    kind = kinds.add_parser("export", help="write instances in VBVR's layout")
    kind.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    kind.add_argument("--count", type=int, default=100, metavar="N", help="instances (default: 100)")
    kind.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the instances (default: 0)")
    kind.add_argument("--split", default="train", metavar="NAME", help="train (default), id, ood or validation")
    _add_families(kind)
    kind.add_argument("--flawed", action="store_true", help="videos with the Reasoner's documented flaw")
    kind = kinds.add_parser("measure", help="rule score, distance and one-step agreement on held-out instances")
    kind.add_argument("--reasoner", metavar="ID", help="hub id or directory (default: the packaged one)")
    kind.add_argument("--teacher", metavar="ID", help="judge of both videos (default: the packaged one)")
    kind.add_argument("--limit", type=int, default=100, metavar="N", help="instances (default: 100)")
    kind.add_argument("--seed", type=_seed, default=1, metavar="N", help="of the held-out split (default: 1)")
    kind.add_argument(
        "--many-steps", type=int, default=0, metavar="N", help="sample by N Euler steps, not by few steps"
    )
    kind.add_argument("--guidance", type=float, default=1.0, metavar="X", help="of these steps (default: 1, none)")
    kind.add_argument("--out", required=True, metavar="DIR", help="for results.json and frames.png")

    sub = add("train", train, "fine-tune a Reasoner on the videos of a domain")
    sub.add_argument("what", choices=("sft",))
    _add_training(sub, "video model to start from: hub id or directory")

    sub = add("distill", distill, "make a few-step Reasoner from a many-step one, or a surrogate decoder from a VAE")
    sub.add_argument("what", choices=("reasoner", "decoder"))
    sub.add_argument("--method", metavar="NAME", help="of a reasoner: dmd2, consistency or few-timesteps")
    sub.add_argument("--vae", metavar="ID", help="of a decoder: hub id or directory of the VAE or of its pipeline")
    _add_training(sub, "the many-step video model: hub id or directory")

    sub = add("plan", plan, "FLOPs and peak memory of one optimisation step, ours and stock, at any size; needs no GPU")
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
    sub.add_argument("--rank", type=int, default=16, metavar="R", help="rank of the LoRA (default: 16)")
    sub.add_argument("--memory", type=float, default=48, metavar="GB", help="of the device, 10^9 bytes (default: 48)")
    sub.add_argument(
        "--text-encoder",
        choices=("device", "cpu"),
        default="device",
        help="where it, an image encoder and a low-noise expert wait during the steps",
    )
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    sub.add_argument("--json", action="store_true", help="machine-readable")

    sub = add("env", env, "devices, compiled backends and versions; why a backend is missing")
    sub.add_argument("--json", action="store_true", help="machine-readable")
    return top


def _add_families(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--family",
        action="append",
        metavar="NAME",
        help="of tasks, more than once for more, or all (the default)",
    )


def _add_lora_partial(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--lora-partial",
        action="store_true",
        help="leave out what a LoRA file has for other networks, instead of refusing",
    )


def _add_instance(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--prompt", required=True, metavar="TEXT", help="the task")
    sub.add_argument("--image", metavar="FILE", help="the first frame")
    sub.add_argument("--teacher", metavar="ID", help="VLM: hub id or directory (default: the packaged one)")
    sub.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: the GPU, if there is one)")
    sub.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    sub.add_argument("--quantize", choices=("8bit", "4bit"), help="of the Teacher's weights (extra: quantized)")


# ---------------------------------------------------------------- commands


def demo(arguments: argparse.Namespace) -> None:
    if arguments.out is None:
        arguments.out = "runs/demo" if arguments.resume else _first_free("runs/demo")
    out = Path(arguments.out)
    _check_run_folder(arguments)
    from vlmteacher.quiet import quiet

    quiet()
    import numpy as np
    import torch
    from PIL import Image

    from vlmteacher.microworld.scorer import score
    from vlmteacher.microworld.world import Scene, render
    from vlmteacher.pipeline import TeacherPipeline, TeacherPipelineOutput, read_pair
    from vlmteacher.placement import describe, find_devices, find_dtype

    example = read_pair()[1]["example"]
    scene = Scene.from_json(example["scene"])
    image = Image.fromarray(TeacherPipelineOutput.uint8(render(scene)[:1])[0])
    devices = find_devices(None)
    print(describe(devices, find_dtype(devices)))
    pipe = TeacherPipeline.from_pretrained()
    print(f"Task: {example['prompt']}", flush=True)
    output = pipe(
        example["prompt"],
        image,
        generator=torch.Generator().manual_seed(example["seed"]),
        output_type="np",
        fused_lora=arguments.fused_lora,
        run_dir=out,
        resume=arguments.resume,
    )
    _print_result(output)
    for name, frames in (("before", output.frames_before), ("after", output.frames)):
        verdict = score(np.asarray(frames), scene)
        parts = ", ".join(f"{part} {value:.2f}" for part, value in verdict.subscores.items())
        print(f"Rule scorer {name}: {'success' if verdict.success else 'failure'}, score {verdict.score:.2f} ({parts})")
    _print_folder(out)
    _check_converged(output)


def solve(arguments: argparse.Namespace) -> None:
    image = _open_image(arguments.image)
    _check_instance(arguments)
    from vlmteacher.lora.formats import read_lora
    from vlmteacher.queries import QuerySet

    _check_run_folder(arguments)
    query_set = None if arguments.queries is None else QuerySet.load(arguments.queries)
    if arguments.lora is not None:
        read_lora(
            arguments.lora, partial=arguments.lora_partial
        )  # one that cannot be read shows before any model is loaded
    from vlmteacher.quiet import quiet

    quiet()
    if arguments.deterministic:  # cuBLAS reads it when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    keywords = settings.given(arguments)
    settings.Settings().updated(**keywords)  # bad values show before any model is loaded
    pipe = _pipeline(arguments)
    if arguments.lora is not None:
        pipe.load_lora(arguments.lora, arguments.lora_partial)
    if arguments.activations is not None:
        from vlmteacher.reasoners.checkpointing import block_list, keep_activations, parse_levels

        transformer = pipe.reasoner.transformer
        keep_activations(transformer, parse_levels(arguments.activations, len(block_list(transformer))))
    output = pipe(
        arguments.prompt,
        image,
        num_frames=arguments.num_frames,
        height=arguments.height,
        width=arguments.width,
        num_inference_steps=arguments.num_inference_steps,
        guidance_scale=arguments.guidance_scale,
        negative_prompt=arguments.negative_prompt,
        generator=torch.Generator().manual_seed(arguments.seed),
        queries=query_set,
        run_dir=arguments.out,
        resume=arguments.resume,
        **keywords,
    )
    _print_result(output)
    _print_folder(Path(arguments.out))
    _check_converged(output)


def queries(arguments: argparse.Namespace) -> None:
    image = _open_image(arguments.image)
    _check_instance(arguments)
    if arguments.output and not (parent := Path(arguments.output).absolute().parent).is_dir():
        raise InputError(f"queries file {arguments.output}: the directory {parent} does not exist")
    if arguments.output and Path(arguments.output).is_dir():
        raise InputError(f"queries file {arguments.output} is a directory: give the name of a file in it")
    from vlmteacher.quiet import quiet

    quiet()
    import torch

    from vlmteacher.media import fit_image
    from vlmteacher.pipeline import read_pair
    from vlmteacher.placement import find_devices, find_dtype
    from vlmteacher.reasoners import Settings
    from vlmteacher.teachers import load_teacher

    if arguments.teacher is None:
        directory, pair = read_pair()
        arguments.teacher = str(directory / pair["teacher"])
        if image is not None:  # the first frame as the packaged Reasoner gets it
            frame = Settings.load(directory / pair["reasoner"] / "reasoner.json")
            image = fit_image(image, frame.height, frame.width)
    devices = find_devices(arguments.device, "--device")
    device, dtype = devices["teacher"], getattr(torch, arguments.dtype) if arguments.dtype else find_dtype(devices)
    teacher = load_teacher(arguments.teacher, dtype=dtype, quantize=arguments.quantize, device=device).to(device)
    written = teacher.write_queries(arguments.prompt, image)
    if arguments.output:
        written.save(arguments.output)
        for kind, question in zip(("goal", *["process"] * len(written.process)), written.questions, strict=True):
            print(f"{kind:8} {question}")
        print(f"Edit {arguments.output} if you like, then: vlmteacher solve --queries {arguments.output} ...")
    else:
        print(written.to_json())


def lora(arguments: argparse.Namespace) -> None:
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


def bench(arguments: argparse.Namespace) -> None:
    if arguments.benchmark != "microworld":
        raise InputError(f"bench {arguments.benchmark} is not there yet: only microworld is")
    for name, least in (("limit", 1), ("workers", 1), ("seed", 0), ("seeds", 1)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise InputError(f"--{name} must be at least {least}, not {value}")
    from vlmteacher.quiet import quiet

    quiet()
    from vlmteacher.evaluation.microworld import run_benchmark

    if arguments.table is not None:
        return _bench_table(arguments)
    results = run_benchmark(
        method=arguments.method,
        limit=arguments.limit,
        seed=arguments.seed,
        out=Path(arguments.out),
        workers=arguments.workers,
        resume=arguments.resume,
        lora_blocks=arguments.lora_blocks,
        split=arguments.split or "id",
        chosen=_families(arguments),
        noises=arguments.seeds or 1,
        trace=arguments.trace,
        many_step=arguments.many_step,
    )
    print(f"{results['benchmark']}, method {results['method']}")
    print(f"{'split':10} {'n':>5} {'success':>8} {'score':>6}")
    for name, row in {**results.get("splits", {}), "all": results}.items():
        if row["n"]:
            print(f"{name:10} {row['n']:5} {row['success_rate']:8.2f} {row['score']:6.3f}")
    print(f"{results['updates_mean']:.1f} updates and {results['seconds_mean']:.1f} s per instance")
    print(f"Results: {Path(arguments.out) / 'results.json'}")


def _bench_table(arguments: argparse.Namespace) -> None:
    from vlmteacher.evaluation.microworld import Bench
    from vlmteacher.evaluation.tables import TABLES, format_table, run_table

    if arguments.table not in TABLES:
        raise InputError(f"--table {arguments.table} is not there: it can be {' or '.join(TABLES)}")
    for name in ("split", "lora_blocks"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} goes with --method: a table has its own splits and methods")
    table, families = TABLES[arguments.table], tuple(_families(arguments))
    bench = Bench(arguments.seed, families, None, arguments.many_step, arguments.trace)
    out = Path(arguments.out)
    noises = arguments.seeds or 3
    print(
        format_table(run_table(table, bench, arguments.limit, noises, out, arguments.workers, arguments.resume), table)
    )
    print(f"Results: {out / 'table.json'}, and a folder for each method")


def train_microworld(arguments: argparse.Namespace) -> None:
    """Run a stage of the recipe, which is no part of the installed package. Raises InputError outside a checkout."""
    from importlib import import_module

    from vlmteacher.quiet import quiet

    quiet()
    checkout = Path(__file__).parents[1]
    if not (checkout / "recipes/microworld").is_dir():
        raise InputError(
            "the training of the packaged models is no part of the installed package: clone the repository and run"
            " `python -m recipes.microworld` there"
        )
    warning = "warning: `vlmteacher train-microworld` goes with the next release: run `python -m recipes.microworld`"
    print(warning, file=sys.stderr)
    sys.path.insert(0, str(checkout))
    run = import_module("recipes.microworld.stages").run
    run(arguments.stage, Path(arguments.out), Path(arguments.init) if arguments.init else None, arguments.device)


def microworld(arguments: argparse.Namespace) -> None:
    from vlmteacher.quiet import quiet

    quiet()
    out = Path(arguments.out)
    if arguments.what == "export":
        from vlmteacher.microworld.export import export

        export(out, arguments.count, arguments.seed, arguments.split, arguments.flawed, chosen=_families(arguments))
        print(f"{arguments.count} instances in VBVR's layout: {out}")
        return
    from vlmteacher.evaluation.few_step import report
    from vlmteacher.pipeline import PACKAGED_PAIR

    found = report(
        arguments.reasoner or str(PACKAGED_PAIR / "reasoner"),
        arguments.teacher or str(PACKAGED_PAIR / "teacher"),
        arguments.limit,
        arguments.seed,
        out,
        arguments.many_steps,
        arguments.guidance,
    )
    for name, value in found.items():
        if isinstance(value, float):
            print(f"{name:16} {value:.3f}")
    print(f"Results: {out / 'results.json'}, {out / 'frames.png'}")


def train(arguments: argparse.Namespace) -> None:
    from vlmteacher.quiet import quiet

    quiet()
    from vlmteacher.distillation.sft import load_settings, run

    settings = load_settings(Path(arguments.config), _overrides(arguments, TRAINING))
    arguments.out = settings.out  # where an interrupted run can be taken up
    print(f"Fine-tuned Reasoner: {run(settings, arguments.resume)}")


def distill(arguments: argparse.Namespace) -> None:
    from vlmteacher.quiet import quiet

    quiet()
    given = _overrides(arguments, (*TRAINING, "method", "vae"))
    if arguments.what == "decoder":
        from vlmteacher.distillation import decoder

        wanted = decoder.load_settings(Path(arguments.config), given)
        arguments.out = wanted.out
        print(f"Surrogate decoder: {decoder.run(wanted, arguments.resume)}")
        return
    from vlmteacher.distillation.distill import load_settings, run

    settings = load_settings(Path(arguments.config), given)
    arguments.out = settings.out
    print(f"Reasoner of {len(settings.timesteps)} steps: {run(settings, arguments.resume)}")


def plan(arguments: argparse.Namespace) -> None:
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

    found = make_plan(
        arguments.reasoner,
        arguments.teacher,
        arguments.num_frames,
        arguments.height,
        arguments.width,
        decoder=arguments.decoder,
        questions=arguments.questions,
        teacher_frames=arguments.teacher_frames,
        rank=arguments.rank,
        memory=arguments.memory,
        text_encoder=arguments.text_encoder,
        dtype=getattr(torch, arguments.dtype),
    )
    print(json.dumps(found) if arguments.json else format_plan(found))


def env(arguments: argparse.Namespace) -> None:
    from vlmteacher.environment import format_report, report

    facts = report()
    print(json.dumps(facts, indent=2) if arguments.json else format_report(facts))


# ---------------------------------------------------------------- helpers


TRAINING = ("reasoner", "data", "out", "steps", "batch_size", "learning_rate", "seed")


def _add_training(sub: argparse.ArgumentParser, reasoner: str) -> None:
    """The flags of `TRAINING`, which override the entries of the same names in --config."""
    sub.add_argument("--config", required=True, metavar="FILE.yaml", help="settings; the flags below override them")
    sub.add_argument("--reasoner", metavar="ID", help=reasoner)
    sub.add_argument("--data", metavar="DIR", help="instances in VBVR's layout")
    sub.add_argument("--out", metavar="DIR", help="folder to write; the result is its folder `pipeline`")
    sub.add_argument("--steps", type=int, metavar="N", help="updates of the result")
    sub.add_argument("--batch-size", type=int, metavar="N", help="videos per update")
    sub.add_argument("--lr", type=float, metavar="X", dest="learning_rate", help="learning rate of the result")
    sub.add_argument("--seed", type=_seed, metavar="N", help="of all that is drawn")
    sub.add_argument("--resume", action="store_true", help="take up the interrupted run in --out")


def _overrides(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _families(arguments: argparse.Namespace) -> Sequence[str]:
    """The families of --family, in the world's order whatever the order of the flags."""
    from vlmteacher.microworld import world

    if not arguments.family:
        return world.FAMILIES
    world.check("id", [name for name in arguments.family if name != "all"])
    return [name for name in world.FAMILIES if {name, "all"} & {*arguments.family}]


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**63 - 1, not {text}")
    return int(text)


def _check_texts(arguments: argparse.Namespace) -> None:
    """Raise InputError for an argument that is no text: bytes that are not UTF-8, from the shell, or a NUL."""
    for name, value in vars(arguments).items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str):
                check_text(each, f"argument {name.replace('_', '-')}")


def _open_image(path: str | None) -> Image.Image | None:
    if path is None:
        return None
    from vlmteacher.media import read_image

    return read_image(path)


def _check_instance(arguments: argparse.Namespace) -> None:
    if not arguments.prompt.strip():
        raise InputError("--prompt is empty: say what the video must show")


def _pipeline(arguments: argparse.Namespace) -> TeacherPipeline:
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
            device_map=devices,
            offload=arguments.offload,
            quantize=arguments.quantize,
            transformer=arguments.transformer,
            few_step_lora=arguments.few_step_lora,
            preset=arguments.preset,
            lora_partial=arguments.lora_partial,
        )


def _check_run_folder(arguments: argparse.Namespace) -> None:
    """A folder that cannot be used shows before any model is loaded."""
    from vlmteacher.files import claimed
    from vlmteacher.runs.folder import RunFolder, checked

    with claimed(checked(arguments.out)):
        RunFolder(arguments.out, arguments.resume)


def _first_free(path: str) -> Path:
    number = 1
    while (candidate := Path(path if number == 1 else f"{path}-{number}")).exists():
        number += 1
    return candidate


def _print_result(output: TeacherPipelineOutput) -> None:
    reasons = {"threshold": "the threshold was reached", "max_steps": "no step was left", "diverged": "diverged"}
    reason = reasons[output.stopped]
    steps, total = output.seconds["steps"], output.seconds["total"]
    print(f"{output.updates} updates in {steps:.1f} s ({reason}), {total:.1f} s in all")
    print("P(Yes) before -> after")
    for question, before, after in zip(output.queries.questions, output.p_yes_before, output.p_yes_after, strict=True):
        print(f"  {before:.2f} -> {after:.2f}  {question}")


def _check_converged(output: TeacherPipelineOutput) -> None:
    if output.stopped == "diverged":
        why = output.history[-1]["rolled_back"]
        raise ArithmeticError(f"the optimisation diverged ({why}); the best LoRA before is kept: try a lower --lr")


def _print_folder(path: Path) -> None:
    files = " ".join(sorted(file.name for file in path.iterdir() if file.suffix != ".pt"))
    print(f"Run folder {path}: {files}")
