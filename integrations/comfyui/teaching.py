"""What the nodes do, without ComfyUI: load a pipeline, write queries, optimise a LoRA, name its layers."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from vlmteacher import InputError, TeacherPipeline, arguments, settings
from vlmteacher.arguments import did_you_mean
from vlmteacher.lora.adapter import target_layers
from vlmteacher.lora.formats import Factors, LoRA, read_lora
from vlmteacher.media import ImageInput, read_image
from vlmteacher.queries import QuerySet

from .plot import plot

if TYPE_CHECKING:
    from vlmteacher.output import TeacherPipelineOutput

OnStep = Callable[[int, int, Image.Image | None], object]
"""Called with the steps done, the steps at most, and the film strip of the latest one-step prediction."""


# ---------------------------------------------------------------- texts


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"settings: {' '.join(message.split())}")


def parse_settings(text: str) -> settings.Keywords:
    """The settings of a call from the flags of `vlmteacher solve`, such as "--max-steps 40 --check-final".

    Raises InputError for an unknown flag and a value that is out of its range.
    """
    parser = _Flags(add_help=False, allow_abbrev=False)
    settings.add_flags(parser)
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise InputError(f"settings: {error}: {arguments.show(text)}") from error
    known, unknown = parser.parse_known_args(words)
    if unknown:
        guess = did_you_mean(unknown[0].partition("=")[0], parser._option_string_actions)
        raise InputError(f"settings: unknown {unknown[0]}{guess}; the flags are those of `vlmteacher solve`")
    keywords = settings.given(known)
    settings.Settings().updated(**keywords)
    return keywords


def parse_queries(text: str) -> QuerySet | None:
    """The queries of a text, one a line and the goal first; None for a blank text. Raises InputError."""
    return QuerySet.of([line.strip() for line in text.splitlines() if line.strip()] or None)


def check_prompt(prompt: str) -> None:
    """Raise InputError for a prompt that shows nothing."""
    if arguments.is_blank(prompt):
        raise InputError("prompt is empty: say what the video must show")


def run_folder(name: str, parent: str | os.PathLike[str]) -> Path | None:
    """The folder `parent`/vlmteacher/`name` of a run; None for a blank name. Raises InputError for a way out of it."""
    if arguments.is_blank(name):
        return None
    home = Path(parent, "vlmteacher").resolve()
    folder = (home / name.strip()).resolve()
    if folder == home or home not in folder.parents:
        raise InputError(f"run_folder {arguments.show(name)} is not inside {home}: give a plain name")
    return folder


# ---------------------------------------------------------------- the pipeline


def load(
    device: torch.device,
    *,
    reasoner: str = "",
    teacher: str = "",
    decoder: str | None = None,
    transformer: list[str] | None = None,
    few_step_lora: list[str] | None = None,
    preset: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    offload: bool = False,
) -> TeacherPipeline:
    """Load a pipeline in main memory; `at_work` moves it. A quantised Teacher is on `device` from the start.

    Blank names are the packaged pair's. dtype: None is bfloat16 for a GPU, float32 for a CPU. The rest is as in
    `TeacherPipeline.from_pretrained`, which raises InputError and MissingExtra.
    """
    return TeacherPipeline.from_pretrained(
        reasoner.strip() or None,
        teacher.strip() or None,
        decoder,
        dtype=dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32),
        device_map={"reasoner": torch.device("cpu"), "teacher": device if quantize else torch.device("cpu")},
        offload=offload,
        quantize=quantize,  # type: ignore[arg-type]  # checked by from_pretrained
        transformer=transformer or None,
        few_step_lora=few_step_lora or None,
        preset=preset,
    )


@contextmanager
def at_work(pipe: TeacherPipeline, device: torch.device) -> Iterator[None]:
    """Have the models on `device` inside the block, and in main memory after it, whatever ends it."""
    idle = dict(pipe.devices)
    if not pipe.teacher.quantized:
        idle["teacher"] = torch.device("cpu")
    idle["reasoner"] = torch.device("cpu")
    try:
        pipe.to({"reasoner": device, "teacher": idle["teacher"] if pipe.teacher.quantized else device})
        yield
    finally:
        pipe.to(idle)


def fingerprint(*names: str | None) -> str:
    """Paths, sizes and times of change of the files that these names stand for; names that are no path say nothing."""
    rows = []
    for name in names:
        path = Path(name or "").expanduser()
        for file in [path] if path.is_file() else sorted(path.rglob("*")) if name and path.is_dir() else []:
            status = file.stat()
            rows.append(f"{file} {status.st_size} {status.st_mtime_ns}")
    return "\n".join(rows)


# ---------------------------------------------------------------- one instance


@dataclass(frozen=True)
class Taught:
    """The result of `optimise` in ComfyUI's forms.

    Attributes:
        lora: the LoRA under ComfyUI's names.
        frames, before: the final video, and the one without the LoRA: (F, H, W, 3) float32 in [0, 1], on the CPU.
        plot: loss and P(Yes) over the steps, (1, h, w, 3) in [0, 1].
        queries: one a line, the goal first.
        summary: the verdict, and P(Yes) of each query before and after.
        fps: frames per second.
    """

    lora: dict[str, Tensor]
    frames: Tensor
    before: Tensor
    plot: Tensor
    queries: str
    summary: str
    fps: float


def write_queries(pipe: TeacherPipeline, prompt: str, image: Tensor | None = None) -> str:
    """The Teacher's queries for a task, one a line and the goal first. image: see `first_frame`."""
    check_prompt(prompt)
    return "\n".join(pipe.write_queries(prompt, first_frame(image)).questions)


def first_frame(image: Tensor | None) -> Image.Image | None:
    """The picture of a batch (1, H, W, 3) as ComfyUI's nodes give it, whose values may be a little outside of [0, 1].

    Raises InputError for more than one picture, and for other channels than RGB.
    """
    if image is None:
        return None
    if image.ndim == 4 and len(image) != 1:
        raise InputError(f"image: a batch of {len(image)}: give the first frame alone (ImageFromBatch)")
    source: ImageInput = image.detach().float().clamp(0, 1).cpu().numpy()
    return read_image(source)


def optimise(
    pipe: TeacherPipeline,
    prompt: str,
    image: Tensor | None = None,
    *,
    queries: str = "",
    flags: str = "",
    seed: int = 0,
    size: tuple[int, int, int] = (0, 0, 0),
    run_dir: Path | None = None,
    on_step: OnStep = lambda done, most, strip: None,
) -> Taught:
    """Optimise a LoRA for one instance (`TeacherPipeline.__call__`).

    Args:
        image: see `first_frame`. queries, flags: see `parse_queries`, `parse_settings`.
        size: frames, height and width; 0 is the Reasoner's own.
        run_dir: a folder to record the run in; an interrupted run of the same inputs that is there goes on.
        on_step: may raise KeyboardInterrupt, which ends the call: the LoRA is off the Reasoner then, and the folder
            holds the state of the last step.

    Raises InputError, and what the call raises.
    """
    check_prompt(prompt)
    keywords = parse_settings(flags)
    most = pipe.defaults.updated(**keywords).max_steps

    def after_step(pipe: TeacherPipeline, step: int, row: object) -> None:
        strip = None if pipe.loop is None else pipe.loop.predictions.get(step)
        on_step(step + 1, most, None if strip is None else Image.fromarray(strip.cpu().numpy()))

    on_step(0, most, None)
    num_frames, height, width = (value or None for value in size)
    output = pipe(
        prompt,
        first_frame(image),
        num_frames=num_frames,
        height=height,
        width=width,
        generator=torch.Generator().manual_seed(seed),
        queries=parse_queries(queries),
        output_type="pt",
        callback_on_step_end=after_step,
        run_dir=run_dir,
        resume=run_dir is not None,
        **keywords,
    )
    return Taught(
        lora=safetensors.torch.load(read_lora(output.lora, "the LoRA").to_bytes("comfyui")),
        frames=_batch(output.frames),
        before=_batch(output.frames_before),
        plot=torch.from_numpy(np.asarray(plot(output), dtype=np.float32) / 255)[None],
        queries="\n".join(output.queries.questions),
        summary=summary(output),
        fps=output.fps,
    )


def _batch(video: object) -> Tensor:
    assert isinstance(video, Tensor)  # output_type="pt"
    return video.detach().permute(0, 2, 3, 1).float().clamp(0, 1).cpu().contiguous()


def summary(output: TeacherPipelineOutput) -> str:
    """The verdict, the number of updates and P(Yes) of each query before and after, in lines."""
    rows = zip(output.p_yes_before, output.p_yes_after, output.queries.questions, strict=True)
    lines = [f"{before:.2f} -> {after:.2f}  {question}" for before, after, question in rows]
    return "\n".join([str(output.verdict), f"{output.updates} updates ({output.stopped}); P(Yes):", *lines])


# ---------------------------------------------------------------- ComfyUI's names


def lora_layers(transformer: nn.Module, blocks: str | None = None) -> dict[str, tuple[int, int]]:
    """ComfyUI's names of the layers that a LoRA of this transformer changes, with the shape (out, in) of the weight.

    blocks: as in `add_lora`. Raises InputError for a transformer of no known family.
    """
    factors = {
        name: Factors(torch.zeros(1, layer.in_features), torch.zeros(layer.out_features, 1), 1.0)
        for name, layer in target_layers(transformer, blocks).items()
    }
    tensors = safetensors.torch.load(LoRA(factors).to_bytes("comfyui"))
    ends = ".lora_A.weight", ".lora_B.weight"
    names = sorted(key.removesuffix(ends[0]) for key in tensors if key.endswith(ends[0]))
    return {name: (tensors[name + ends[1]].shape[0], tensors[name + ends[0]].shape[1]) for name in names}
