"""Seconds of a whole instance: ours, a stock loop's of the same method, and plain sampling's (for `benchmarks.step`).

Of processor time, all threads, on a CPU, which other programs hardly change; of the clock on a GPU. Ours is what
`vlmteacher solve` does: it makes the video without the LoRA too, and a run folder. The stock loop encodes the prompt
and has its questions written as ours does, takes as many steps of `benchmarks.stock`, samples with its own transformer,
decodes, judges, and writes the video and the LoRA. Plain sampling is the text, one sample, the VAE and the video file.
"""

from __future__ import annotations

import copy
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from benchmarks.presets import Instance
from benchmarks.stock import StockLoop
from vlmteacher.lora.adapter import lora_state_dict, remove_lora
from vlmteacher.media import write_video
from vlmteacher.microworld.example import packaged_example
from vlmteacher.output import TeacherPipelineOutput
from vlmteacher.pipeline import TeacherPipeline

UPDATES = 16  # that the packaged example needs
ROUNDS = 3
T = TypeVar("T")


def measure_instance(
    instance: Instance, stock: StockLoop, steps: tuple[float, float], device: str, updates: int = UPDATES
) -> dict[str, Any]:
    """Seconds of the parts of an instance of this many updates, by side: medians of `ROUNDS`, in alternation.

    steps: seconds of a step of ours and of `stock`, which have taken theirs before; both have a LoRA on. An instance of
    random weights has no tokenizer and a VAE of no meaning: text, questions, VAE and writing are left out on all sides.
    """
    clock = Clock(device)
    rounds = [_round(instance, stock, clock) for _ in range(ROUNDS)]
    seconds = {part: statistics.median(parts[part] for parts in rounds) for part in rounds[0]}
    if "vae" in seconds:
        seconds["run folder"] = _run_folder(instance, clock)

    def of(*names: str) -> float:
        return sum(seconds.get(name, 0.0) for name in names)

    video = of("sample", "vae", "judge")
    text = {"text": of("text"), "queries": of("queries")}
    parts = {
        "ours": text | {"before": video, "steps": updates * steps[0], "after": video, "writing": of("run folder")},
        "stock": text
        | {"steps": updates * steps[1], "after": of("stock sample", "vae", "stock judge")}
        | {"writing": of("video file", "lora file")},
        "plain": {"text": of("text"), "after": of("plain sample", "vae"), "writing": of("video file")},
    }
    totals = {side: sum(each.values()) for side, each in parts.items()}
    above = {side: totals[side] - totals["plain"] for side in ("ours", "stock")}
    return {
        "updates": updates,
        "parts_s": parts,
        "total_s": totals,
        "above_sampling_s": above,
        "speedup": totals["stock"] / totals["ours"],
        "above_sampling_speedup": above["stock"] / above["ours"],
    }


class Clock:
    """Calls a function and gives the seconds that it took, and its result."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def _now(self) -> float:
        if not self.cuda:
            children = resource.getrusage(resource.RUSAGE_CHILDREN)  # ffmpeg
            return time.process_time() + children.ru_utime + children.ru_stime
        torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, function: Callable[[], T]) -> tuple[float, T]:
        start = self._now()
        result = function()
        return self._now() - start, result


@torch.no_grad()
def _round(instance: Instance, stock: StockLoop, clock: Clock) -> dict[str, float]:
    """The seconds of what an instance does besides its steps, once."""
    ours, condition, noise = instance.reasoner, instance.condition, instance.noise
    seconds: dict[str, float] = {}
    seconds["sample"], latents = clock(lambda: ours.sample(condition, noise))
    theirs = copy.copy(ours)  # the same sampler with the stock LoRA, which is on, or off
    theirs.transformer = stock.transformer
    seconds["stock sample"], _ = clock(lambda: theirs.sample(condition, noise))
    stock.transformer.disable_adapters()
    seconds["plain sample"], _ = clock(lambda: theirs.sample(condition, noise))
    stock.transformer.enable_adapters()
    frames = instance.decoder.decode(latents, stock.indices).float()
    if getattr(ours, "tokenizer", None) is not None:
        prompt, image, _, _ = packaged_example()
        size = (condition.num_frames, condition.height, condition.width)
        seconds["text"], _ = clock(lambda: ours.encode(prompt, image, *size))
        seconds["queries"], _ = clock(lambda: instance.teacher.write_queries(prompt, image))
        seconds["vae"], video = clock(lambda: ours.decode(latents))
        frames = video[stock.indices]
        lora = lora_state_dict(stock.transformer)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            seconds["video file"], _ = clock(lambda: _write(path / "video.mp4", video, ours.fps))
            seconds["lora file"], _ = clock(lambda: safetensors.torch.save_file(lora, path / "lora.safetensors"))
    losses = instance.teacher.losses
    seconds["judge"], _ = clock(lambda: losses(frames, stock.indices, ours.fps, instance.queries))
    seconds["stock judge"], _ = clock(lambda: stock.losses(*stock.pixels(frames)))
    return seconds


def _run_folder(instance: Instance, clock: Clock) -> float:
    """Seconds of writing a run folder: two videos, LoRA, card, pictures, report. Takes the LoRA off the Reasoner."""
    remove_lora(instance.reasoner.transformer)
    pipe = TeacherPipeline(instance.reasoner, instance.teacher, instance.decoder)
    prompt, image, seed, _ = packaged_example()
    settings = instance.settings.to_dict() | {"max_steps": 1, "final_samples": 1}
    generator = torch.Generator().manual_seed(seed)
    out = pipe(prompt, image, queries=instance.queries, generator=generator, progress=False, **settings)
    with tempfile.TemporaryDirectory() as folder:
        return statistics.median(clock(partial(out.save, Path(folder, str(turn))))[0] for turn in range(ROUNDS))


def _write(path: Path, video: Tensor, fps: float) -> None:
    write_video(path, TeacherPipelineOutput.uint8(video), fps)


def show(row: dict[str, Any]) -> None:
    """Print the seconds of each part, a column for each side."""
    sides = row["parts_s"]
    print(f"  an instance of {row['updates']} updates".ljust(34) + "".join(f"{name:>10}" for name in sides))
    for part in dict.fromkeys(part for parts in sides.values() for part in parts):
        print(f"    {part:<30}" + "".join(f"{parts.get(part, 0.0):>8.2f} s" for parts in sides.values()))
    print(f"    {'in all':<30}" + "".join(f"{total:>8.2f} s" for total in row["total_s"].values()))
    above = row["above_sampling_s"]
    print(
        f"    x{row['speedup']:.2f}; above plain sampling {above['ours']:.2f} s against {above['stock']:.2f} s,"
        f" x{row['above_sampling_speedup']:.2f}"
    )
