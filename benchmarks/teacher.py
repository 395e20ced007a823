"""Times a Teacher's losses of four questions and their gradient to the pixels against one stock pass per question.

python -m benchmarks.teacher [--json] [--preset tiny|mid] [--no-flops]

Stock is the forward and backward of transformers' `Qwen3VLForConditionalGeneration`, question by question, with logits
at the answer only and its Conv3d patch embedding replaced by the equal linear layer; with gradient checkpointing, as
its documentation recommends, or without, whichever is faster. The weights are random.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.memory import saved_bytes
from benchmarks.presets import QUERIES, qwen3_vl
from benchmarks.timing import machine
from vlmteacher.planning.teacher import stock_reader
from vlmteacher.queries import QuerySet
from vlmteacher.teachers.preprocessing import VisionSettings, preprocess_video
from vlmteacher.teachers.prompt import Clip, Layout
from vlmteacher.teachers.qwen_vl import QwenVLTeacher
from vlmteacher.teachers.visual_checkpoint import stream
from vlmteacher.teachers.vlm import CHUNK_PATCHES

FPS = 8.0
# vision: depth, width, MLP, heads; language: depth, width, MLP, heads, key heads, head dimension; frames: K, height,
# width
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vision": (4, 192, 768, 3),
        "language": (4, 192, 512, 4, 2, 48),
        "deepstack": [2],
        "patch": 8,
        "frames": (12, 64, 64),
    },
    "mid": {
        "vision": (12, 384, 1536, 6),
        "language": (8, 512, 1536, 8, 4, 64),
        "deepstack": [3, 6, 9],
        "patch": 16,
        "frames": (24, 384, 384),
    },
    "4b": {
        "vision": (24, 1024, 4096, 16),
        "language": (36, 2560, 9728, 32, 8, 128),
        "deepstack": [5, 11, 17],
        "patch": 16,
        "frames": (24, 704, 1280),
        "vocabulary": 151936,
    },
}


def build(preset: dict[str, Any], dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """Make (the stock model with random weights, its tokenizer)."""
    from transformers import Qwen3VLForConditionalGeneration

    vision, language, deepstack, patch = (preset[name] for name in ("vision", "language", "deepstack", "patch"))
    config, tokenizer = qwen3_vl(vision, language, deepstack, patch, preset.get("vocabulary"))
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3VLForConditionalGeneration(config)
    return model.to(dtype).eval(), tokenizer


def teacher_of(model: Any, tokenizer: Any, patch: int) -> QwenVLTeacher:
    return QwenVLTeacher(model, tokenizer, VisionSettings(patch_size=patch, min_pixels=1024))


def prompts(teacher: QwenVLTeacher, clip: Clip) -> list[tuple[Tensor, list[int]]]:
    """Return (token ids (1, n) of prompt and answer, token ids of the answer) for every question."""
    chats = teacher.chats(clip, QUERIES.questions)
    return [(torch.tensor([prompt + answer]), answer) for prompt, answer in chats]


def stock_losses(
    model: Any, frames: Tensor, settings: VisionSettings, questions: Sequence[tuple[Tensor, list[int]]]
) -> list[Callable[[], Tensor]]:
    """Return a closure for every question that computes the stock model's loss of it."""

    def loss(ids: Tensor, answer: list[int]) -> Tensor:
        pixels, grid = preprocess_video(frames, settings)
        logits = model(
            input_ids=ids,
            pixel_values_videos=pixels,
            video_grid_thw=grid,
            mm_token_type_ids=(ids == model.config.video_token_id).int() * 2,
            use_cache=False,
            logits_to_keep=len(answer) + 1,
        ).logits
        return F.cross_entropy(logits[0, :-1].float(), ids[0, -len(answer) :], reduction="sum")

    return [functools.partial(loss, ids, answer) for ids, answer in questions]


def memory(teacher: QwenVLTeacher, frames: Tensor, layout: Layout, size: tuple[int, int]) -> dict[str, float]:
    """Measure saved bytes, ours over stock.

    visual_saved: of the visual encoder between forward and backward. visual_peak: with the graph of the chunk that the
    backward works on. memory_ratio: of a whole pass (stock: of one question).
    """
    weights = list(teacher.model.parameters())
    nbytes = lambda outputs: sum(t.nbytes for t in outputs)  # noqa: E731
    pixels, grid = preprocess_video(frames, teacher.video)
    visual = teacher.model.model.visual

    def stock_visual() -> list[Tensor]:
        out = visual(pixels.to(visual.dtype), grid_thw=grid, return_dict=True)
        return [out.pooler_output, *out.deepstack_features]

    stock, outputs = saved_bytes(stock_visual, weights)
    stock += nbytes(outputs)
    step = max(1, CHUNK_PATCHES["cpu"] // teacher.patches_per_frame(size)) * teacher.frames_per_patch
    ours, outputs = saved_bytes(lambda: stream(lambda x: teacher.encode(x, size), frames, step), weights)
    ours += nbytes(outputs)
    chunk, _ = saved_bytes(lambda: teacher.encode(frames[:step], size), weights)
    one = prompts(teacher, clip_of(len(frames), size))[:1]
    stock_all, _ = saved_bytes(stock_losses(teacher.model, frames, teacher.video, one)[0], weights)
    ours_all, _ = saved_bytes(lambda: teacher.packed_losses(frames, layout, size), weights)
    return {
        "visual_saved": ours / stock,
        "visual_peak": (ours + chunk) / stock,
        "memory_ratio": ours_all / stock_all,
        "stock_saved_mib": stock_all / 2**20,
    }


def clip_of(num_frames: int, size: tuple[int, int]) -> Clip:
    return Clip(tuple(range(0, 2 * num_frames, 2)), FPS, size)


def alternate(case: str, ours: Callable[[], Tensor], stock: Callable[[], Tensor], pairs: int) -> dict[str, Any]:
    """Time two functions in alternation, wall and CPU seconds, without a warm-up: both have run before."""

    def seconds(function: Callable[[], Tensor]) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        return time.perf_counter() - wall, time.process_time() - cpu

    times = []
    for pair in range(pairs):
        first = seconds(ours if pair % 2 == 0 else stock)
        second = seconds(stock if pair % 2 == 0 else ours)
        times.append((first, second) if pair % 2 == 0 else (second, first))
    ratios = [b[0] / a[0] for a, b in times]
    low, middle, high = statistics.quantiles(ratios, n=4) if pairs > 1 else ratios * 3
    return {
        "case": case,
        "ours_ms": 1e3 * statistics.median(a[0] for a, _ in times),
        "stock_ms": 1e3 * statistics.median(b[0] for _, b in times),
        "speedup": middle,
        "speedup_low": low,
        "speedup_high": high,
        "ours_cpu_s": statistics.median(a[1] for a, _ in times),
        "stock_cpu_s": statistics.median(b[1] for _, b in times),
        "cpu_speedup": statistics.median(b[1] / a[1] for a, b in times),
    }


def timing(name: str, dtype: torch.dtype, pairs: int) -> dict[str, Any]:
    """Measure one row of the table: four questions, forward and backward to the pixels."""
    preset = PRESETS[name]
    model, tokenizer = build(preset, dtype, "cpu")
    teacher = teacher_of(model, tokenizer, preset["patch"])
    model, _ = build(preset, dtype, "cpu")  # the same weights, in torch's own layers
    model.requires_grad_(False)
    count, height, width = preset["frames"]
    frames = torch.rand(count, 3, height, width).requires_grad_()
    size = teacher.resized(count, height, width)
    layout = teacher.layout(clip_of(count, size), QUERIES)
    losses = stock_losses(model, frames, teacher.video, prompts(teacher, clip_of(count, size)))

    def ours() -> Tensor:
        return torch.autograd.grad(teacher.losses(frames, clip_of(count, size).indices, FPS, QUERIES).sum(), frames)[0]

    def stock() -> Tensor:
        gradient = torch.zeros_like(frames)
        for loss in losses:
            gradient += torch.autograd.grad(loss(), frames)[0]
        return gradient

    def one_question() -> float:  # CPU seconds
        start = time.process_time()
        torch.autograd.grad(losses[0](), frames)
        return time.process_time() - start

    a, b = ours(), stock()
    difference = float((a - b).norm() / b.norm())
    plain = one_question()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = one_question()
    if checkpointed > plain:
        model.gradient_checkpointing_disable()
        model.eval()
    row = alternate(f"{name}: {count} frames {height}x{width}, {len(QUERIES.questions)} questions", ours, stock, pairs)
    model.gradient_checkpointing_disable()
    model.eval()
    row["stock_is_checkpointed"] = checkpointed <= plain
    row["stock_question_cpu_s"] = {"plain": plain, "checkpointed": checkpointed}
    row["gradient_difference"] = difference
    return row | memory(teacher, frames, layout, size)


class Flops(TorchDispatchMode):
    """Sums torch's formulas over every operator that runs.

    Unlike FlopCounterMode, whose module hooks fail there, it counts inside our backward passes too. The CPU's flash
    attention, for which torch has no formula, gets that of the others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        names = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")
        aten = torch.ops.aten
        self.formulas = dict(flop_registry)
        for name in names:
            self.formulas.setdefault(getattr(aten, name), flop_registry[getattr(aten, name.replace("_for_cpu", ""))])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (formula := self.formulas.get(func.overloadpacket)) is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def flops() -> dict[str, float]:
    """Count the FLOPs of three questions to Qwen3-VL-4B about 24 frames of 704x1280, on meta tensors.

    Stock is three passes without recomputation, logits at the answer only. Attention counts in full, causal or not.
    """
    preset = PRESETS["4b"]
    model, tokenizer = build(preset, torch.bfloat16, "meta")
    teacher = teacher_of(model, tokenizer, preset["patch"])
    teacher.activation_bytes = 24 * 2**30
    count, height, width = preset["frames"]
    size = teacher.resized(count, height, width)
    clip = clip_of(count, size)
    three = QuerySet(QUERIES.goal, QUERIES.process[:2])
    layout = teacher.layout(clip, three)
    frames = torch.empty(count, 3, height, width, device="meta", requires_grad=True)

    def ours() -> Tensor:
        return teacher.packed_losses(frames, layout, size).sum()

    encode = teacher.stock_encoder(clip)

    def stock(question: str) -> Tensor:
        return stock_reader(teacher, clip, question)(encode(frames)).sum()

    def counted(function: Callable[[], Tensor]) -> int:
        with Flops() as counter:
            torch.autograd.grad(function(), frames)
        return counter.total

    mine = counted(ours)
    theirs = sum(counted(functools.partial(stock, question)) for question in three.questions)
    return {"ours_tflop": mine / 1e12, "stock_tflop": theirs / 1e12, "ratio": mine / theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--preset", choices=["tiny", "mid"], action="append", help="default: both")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=2, help="alternating measurements per preset")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own)")
    parser.add_argument("--no-flops", action="store_true", help="do not count FLOPs at the paper's scale")
    settings = parser.parse_args()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    rows = []
    for name in settings.preset or ["tiny", "mid"]:
        rows.append(timing(name, getattr(torch, settings.dtype), settings.pairs))
        gc.collect()
    summary: dict[str, Any] = {
        "speedup": math.exp(statistics.fmean(math.log(row["speedup"]) for row in rows)),
        "memory_ratio": statistics.fmean(row["memory_ratio"] for row in rows),
    }
    print(f"teacher on cpu, {settings.dtype}, {torch.get_num_threads()} of {os.cpu_count()} threads")
    for row in rows:
        print(
            f"  {row['case']:<44} ours {row['ours_ms']:9.1f} ms  stock {row['stock_ms']:9.1f} ms  "
            f"x{row['speedup']:.2f} [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}], "
            f"CPU seconds {row['ours_cpu_s']:.2f} / {row['stock_cpu_s']:.2f} x{row['cpu_speedup']:.2f}, saved bytes "
            f"{row['memory_ratio']:.3f}, visual {row['visual_saved']:.4f} ({row['visual_peak']:.4f} with a chunk's)"
        )
    if not settings.no_flops:
        summary["flops_4b"] = flops()
        print(
            "  4B, 24 frames 704x1280, 3 questions: "
            + ", ".join(f"{k} {v:.3f}" for k, v in summary["flops_4b"].items())
        )
    if settings.json:
        header = {"benchmark": "teacher", "device": "cpu", "dtype": settings.dtype} | machine()
        print(json.dumps(header | {"rows": rows, "summary": summary}))


if __name__ == "__main__":
    main()
