"""Adds the costs of the parts to one step, and chooses the settings of the fewest FLOPs that fit."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from vlmteacher.decoders.taehv import SurrogateDecoder, check_decoder
from vlmteacher.errors import InputError
from vlmteacher.lora.adapter import add_lora
from vlmteacher.lora.float8 import saved_bytes
from vlmteacher.optimization.frames import uniform_indices
from vlmteacher.planning.cards import seconds_by_card
from vlmteacher.planning.costs import Cost, passes_in_turn
from vlmteacher.planning.decoder import decoder_cost, stock_decoder_cost
from vlmteacher.planning.models import build_decoder, build_reasoner, build_teacher, known_models, read_known
from vlmteacher.planning.reasoner import ReasonerCosts
from vlmteacher.planning.teacher import (
    Video,
    language_costs,
    preprocessing_cost,
    query_set,
    stock_teacher_cost,
    vision_costs,
)
from vlmteacher.reasoners import quantization
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.checkpointing import Keep as Activations
from vlmteacher.reasoners.checkpointing import format_levels
from vlmteacher.reasoners.few_step_lora import EXPERTS
from vlmteacher.settings import Settings
from vlmteacher.teachers.shared_prefix import Keep, kept_bytes
from vlmteacher.teachers.vlm import CHUNK_PATCHES, VLMTeacher

GB = 10**9
CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Step:
    """One optimisation step: the cost of each part, the bytes of its models' weights, and its settings.

    passes: of the Teacher, one after the other.
    """

    reasoner: Cost
    decoder: Cost
    preprocessing: Cost
    vision: Cost
    language: Cost
    weights: dict[str, int]
    passes: int = 1
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        teacher = sum(part.forward + part.backward for part in (self.vision, self.language))
        return sum(part.forward + part.backward for part in (self.reasoner, self.decoder)) + self.passes * teacher

    @functools.cached_property
    def stages(self) -> dict[str, dict[str, int]]:
        """FLOPs and the most bytes alive, weights included, by stage in the order of a step."""
        weights = sum(self.weights.values())
        latents = weights + self.reasoner.kept
        frames = latents + self.decoder.kept
        features = frames + self.vision.kept
        # the part, and the bytes that are alive beside its own in the forward and in the backward
        parts = {
            "reasoner": (self.reasoner, weights),
            "decoder": (self.decoder, latents),
            "preprocessing": (self.preprocessing, frames),
            "teacher.vision": (self.vision, frames),
            "teacher.language": (self.language, features),
        }
        stages = {}
        for name, (part, others) in parts.items():
            times = self.passes if name.startswith("teacher") else 1
            rows = {
                "forward": (part.forward, part.forward_bytes),
                "recompute": (part.repeated, part.backward_bytes),
                "backward": (part.backward - part.repeated, part.backward_bytes),
            }
            for row, (flops, nbytes) in rows.items():
                if row != "recompute" or flops:
                    stages[f"{name}.{row}"] = {"flops": times * flops, "peak_bytes": others + nbytes}
        stages["optimiser"] = {"flops": 0, "peak_bytes": weights}  # element-wise
        return stages

    @property
    def peak_bytes(self) -> int:
        return max(stage["peak_bytes"] for stage in self.stages.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "flops": self.flops,
            "peak_bytes": self.peak_bytes,
            "stages": self.stages,
            "weights": self.weights,
            "settings": self.settings,
        }


@dataclass(frozen=True)
class Instance:
    """The models of a step on the meta device, and the video that it works on.

    shape: (frames, height, width). video: the frames of it that the Teacher reads, in this number of windows.
    """

    reasoner: Reasoner
    decoder: SurrogateDecoder
    teacher: VLMTeacher
    shape: tuple[int, int, int]
    video: Video
    decoder_name: str
    windows: int = 1

    @property
    def window(self) -> Video:
        """The frames that the Teacher reads in one pass."""
        return replace(self.video, indices=self.video.indices[: len(self.video.indices) // self.windows])

    def passes(self, questions: int) -> list[int]:
        """The number of questions of each pass of the Teacher in a step (see `window_losses`)."""
        if self.windows == 1:
            return [questions]
        return [1, *([questions - 1] * self.windows if questions > 1 else [])]

    @property
    def network(self) -> Any:
        return self.reasoner.transformer

    @property
    def latents(self) -> tuple[int, ...]:
        return self.reasoner.latent_shape(*self.shape)


@dataclass(frozen=True)
class Choice:
    """Settings that decide between memory and FLOPs, and the step that they make.

    levels: what each block of the Reasoner keeps. chunk: frames that the visual encoder works on at a time. keep: what
    the Teacher's layers keep.
    """

    levels: list[Activations]
    chunk: int
    keep: Keep
    step: Step

    def settings(self, models: Instance, questions: int) -> dict[str, Any]:
        """The settings that `Step.settings` and a loaded pipeline take, by the names of the Teacher's attributes."""
        teacher, clip = models.teacher, models.window.clip(models.teacher)
        tokens = max(teacher_tokens(models, questions))
        return {
            "activations": format_levels(self.levels),
            "teacher_activation_bytes": kept_bytes(teacher.language.layers, tokens, teacher.decoder)[self.keep],
            "teacher_keeps": self.keep.name.lower(),
            "teacher_chunk_patches": -(-self.chunk // teacher.frames_per_patch) * teacher.patches_per_frame(clip.size),
        }


def nbytes(*modules: nn.Module) -> int:
    """Bytes of the modules' parameters and buffers; a shared one counts once."""
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    return sum(t.nbytes for t in tensors.values())


def teacher_tokens(models: Instance, questions: int) -> list[int]:
    """The tokens of each pass of the Teacher."""
    clip = models.window.clip(models.teacher)
    return [models.teacher.layout(clip, query_set(count)).tokens for count in models.passes(questions)]


def gigabytes_up(size: int) -> str:
    """A number of bytes in GB, rounded up to three digits, so that it is enough."""
    unit = 10 ** max(len(str(size)) - 3, 0)
    return f"{-(-size // unit) * unit / GB:.12g}"


def mixes(blocks: int) -> Iterator[list[Activations]]:
    """Levels for every block, at most two different ones; the later blocks, which go backward first, keep more."""
    for less in Activations:
        yield [less] * blocks
        for more in Activations:
            if more < less:
                yield from ([less] * n + [more] * (blocks - n) for n in range(1, blocks))


def make_plan(
    reasoner: str,
    teacher: str,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    *,
    decoder: str | None = None,
    questions: int = 4,
    teacher_frames: int | None = None,
    goal_image: bool = False,
    windows: int = 1,
    rank: int = 16,
    memory: float = 48.0,
    text_encoder: str = "device",
    dtype: torch.dtype = torch.bfloat16,
    quantize_reasoner: str | None = None,
) -> dict[str, Any]:
    """Plan one optimisation step: ours, with the settings of the fewest FLOPs that fit the memory, and stock.

    Args:
        reasoner, teacher, decoder: names of known models, "packaged", or local directories (the decoder: a file) of
            which only configs are read. The decoder is by default the Reasoner's family's.
        num_frames, height, width: of the video, by default the Reasoner's own.
        questions: 1 + M, the goal's and the process questions.
        teacher_frames: K, by default 24 or all.
        windows: of K frames each, which the Teacher judges one by one.
        goal_image: whether the Teacher sees a picture of the goal, of the video's size, before the video.
        rank: of the LoRA.
        memory: GB (10^9 bytes) of the device.
        text_encoder: where it is kept during the steps, "device" or "cpu", together with the other networks that a step
            does not need: an image encoder, the low-noise one of two experts.
        dtype: of the weights.
        quantize_reasoner: the Reasoner's weights in fewer bits, as `solve --quantize-reasoner` keeps them.

    Returns:
        {"ours", "stock": {"flops", "peak_bytes", "stages": {name: {"flops", "peak_bytes"}}, "weights", "settings"},
        "ratio": FLOPs of ours over stock, "fp8_saves_bytes": of weights by `solve --fp8`,
        "quantization_saves_bytes": of plain ones by each choice of `--quantize-reasoner`, "fits", "floor_bytes": the
        least memory in which a step fits, "memory_bytes", "seconds": of a step by card (see `seconds_by_card`),
        "advice": changes that help where it does not fit} and the sizes of the instance.

    Raises InputError: unknown models, sizes that the Reasoner cannot make, a memory, rank or number of questions that
    is not positive.
    """
    _check(teacher, questions, rank, windows, memory)
    models = _build(reasoner, teacher, decoder, (num_frames, height, width), teacher_frames, windows, dtype)
    if goal_image:
        picture = Image.new("RGB", models.shape[:0:-1])
        models = replace(models, teacher=models.teacher.with_goal(picture))
    budget = int(memory * GB)
    saved, quantised = saved_bytes(models.network), quantization.saved_bytes(models.network)
    weights = add_lora_and_weigh(models, rank, text_encoder, quantize_reasoner=quantize_reasoner)
    choices = our_steps(models, weights, questions)
    fitting = [choice for choice in choices if choice.step.peak_bytes <= budget]
    best = fewest_flops(fitting) if fitting else min(choices, key=lambda c: (c.step.peak_bytes, c.step.flops))
    other = {"text_encoder": text_encoder, "decoder": "fused", "rank": rank}
    other |= {} if quantize_reasoner is None else {"quantize_reasoner": quantize_reasoner}
    ours = replace(best.step, settings=best.settings(models, questions) | other)
    stock = _stock(models, weights, questions, rank)
    return {
        "reasoner": reasoner,
        "teacher": teacher,
        "decoder": models.decoder_name,
        **_sizes(models, questions),
        "ours": ours.to_dict(),
        "stock": stock.to_dict(),
        "ratio": ours.flops / stock.flops,
        "fp8_saves_bytes": saved,
        "quantization_saves_bytes": quantised,
        "memory_bytes": budget,
        "fits": bool(fitting),
        "floor_bytes": min(choice.step.peak_bytes for choice in choices),
        "seconds": seconds_by_card(ours.flops, ours.peak_bytes),
        "advice": [] if fitting else advice(ours, budget, text_encoder),
    }


def _sizes(models: Instance, questions: int) -> dict[str, Any]:
    """The sizes of the instance in a plan."""
    frames, height, width = models.shape
    return {
        "num_frames": frames,
        "height": height,
        "width": width,
        "teacher_frames": len(models.window.indices),
        "windows": models.windows,
        "questions": questions,
        "goal_image": models.teacher.goal is not None,
        "reasoner_tokens": math.prod(models.latents[2:]) // math.prod(models.reasoner.patch),
        "teacher_tokens": sum(teacher_tokens(models, questions)),
    }


def _check(teacher: str, questions: int, rank: int, windows: int, memory: float) -> None:
    if not (memory > 0 and math.isfinite(memory)):
        raise InputError(f"--memory must be a number of GB above 0, not {memory:g}")
    for name, value in (("questions", questions), ("rank", rank), ("windows", windows)):
        if value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")
    if not Path(teacher).is_dir() and teacher != "packaged":
        read_known(teacher, "teacher")  # a misspelt name shows before the Reasoner is built


def _build(
    reasoner_name: str,
    teacher_name: str,
    decoder_name: str | None,
    size: tuple[int | None, int | None, int | None],
    teacher_frames: int | None,
    windows: int,
    dtype: torch.dtype,
) -> Instance:
    """Build the models, and check them and the size against each other."""
    reasoner, family_decoder = build_reasoner(reasoner_name, dtype)
    defaults = reasoner.num_frames, reasoner.height, reasoner.width
    num_frames, height, width = (own if given is None else given for given, own in zip(size, defaults, strict=True))
    reasoner.check(num_frames, height, width)
    each = min(24, num_frames // windows) if teacher_frames is None else teacher_frames
    indices = uniform_indices(num_frames, Settings(teacher_frames=each or 24, windows=windows))
    decoder_name = decoder_name or family_decoder or ("packaged" if reasoner_name == "packaged" else None)
    if decoder_name is None:
        known = ", ".join(known_models("decoder"))
        raise InputError(f"--decoder is needed for a Reasoner in a directory: a checkpoint file or one of {known}")
    decoder = build_decoder(decoder_name, dtype)
    check_decoder(decoder, reasoner, decoder_name)
    video = Video(tuple(indices), reasoner.fps, height, width)
    return Instance(
        reasoner, decoder, build_teacher(teacher_name, dtype), (num_frames, height, width), video, decoder_name, windows
    )


def add_lora_and_weigh(
    models: Instance, rank: int, text_encoder: str, fused: bool = True, quantize_reasoner: str | None = None
) -> dict[str, int]:
    """Add the LoRA to the Reasoner; returns the bytes of all weights and of the optimiser's tensors.

    quantize_reasoner: count the transformers' weights as this choice of `QUANTIZATIONS` keeps them, and one that is
    dequantised for its product.
    """
    networks, saved, made = models.reasoner.networks, dict[str, int](), {}
    if quantize_reasoner is not None:
        saved = {
            name: quantization.saved_bytes(networks[name])[quantize_reasoner] for name in EXPERTS & networks.keys()
        }
        made = {"dequantised weight": quantization.made_bytes(models.network)}
    base = nbytes(models.network)
    add_lora(models.network, rank, fused=fused)
    lora = nbytes(models.network) - base
    idle = {name: part for name, part in networks.items() if name not in ("transformer", "vae")}
    return {
        "reasoner": base - saved.get("transformer", 0),
        **made,
        "vae": nbytes(models.reasoner.vae),
        **{name: nbytes(part) - saved.get(name, 0) if text_encoder == "device" else 0 for name, part in idle.items()},
        "decoder": nbytes(models.decoder),
        "teacher": nbytes(models.teacher.model),
        "lora": lora,
        "lora gradient and AdamW": 3 * lora,
    }


def our_steps(models: Instance, weights: dict[str, int], questions: int, device: torch.device = CUDA) -> list[Choice]:
    """Our step with every combination of the settings that decide between memory and FLOPs, on a kind of device."""
    teacher, video = models.teacher, models.window
    pair, patches = teacher.frames_per_patch, teacher.patches_per_frame(video.clip(teacher).size)
    default = max(1, CHUNK_PATCHES.get(device.type, CHUNK_PATCHES["cuda"]) // patches) * pair
    costs = ReasonerCosts.of(models.reasoner, models.shape)
    visions = vision_costs(teacher, video, sorted({pair, default, len(video.indices)}))
    counts = models.passes(questions)
    languages = {count: language_costs(teacher, video, count) for count in {*counts}}
    step = functools.partial(
        Step,
        decoder=decoder_cost(models.decoder, models.latents, models.video.indices),
        preprocessing=preprocessing_cost(teacher, models.video),
        weights=weights,
    )
    reasoners = [(levels, costs.total(levels)) for levels in mixes(costs.blocks)]
    teachers = [
        (chunk, keep, *passes_in_turn(vision, [languages[count][keep] for count in counts]))
        for chunk, vision in visions.items()
        for keep in Keep
    ]
    return [
        Choice(levels, chunk, keep, step(reasoner=cost, vision=vision, language=language))
        for levels, cost in reasoners
        for chunk, keep, vision, language in teachers
    ]


def fewest_flops(choices: Sequence[Choice]) -> Choice:
    return min(choices, key=lambda c: (c.step.flops, sum(c.levels), c.keep, c.step.peak_bytes))


def _stock(models: Instance, weights: dict[str, int], questions: int, rank: int) -> Step:
    """The step of a plain loop: whole checkpoints, PEFT's layers, all frames decoded, a pass for each question."""
    add_lora(models.network, rank, fused=False)
    costs = ReasonerCosts.of(models.reasoner, models.shape, (Activations.INPUT,))
    levels = [Activations.INPUT] * costs.blocks
    vision, language = stock_teacher_cost(models.teacher, models.window)
    passes = sum(models.passes(questions))
    return Step(
        costs.total(levels),
        stock_decoder_cost(models.decoder, models.latents, models.video.indices),
        preprocessing_cost(models.teacher, models.video),
        vision,
        language,
        weights,
        passes=passes,
        settings={"activations": format_levels(levels), "teacher_passes": passes},
    )


def advice(step: Step, budget: int, text_encoder: str) -> list[str]:
    """Changes that help where even the least memory is too much."""
    excess, lines = step.peak_bytes - budget, []
    if text_encoder == "device":
        saved = step.weights["text_encoder"]
        enough = "enough" if saved >= excess else "not enough alone"
        lines.append(f"--text-encoder cpu saves {saved / GB:.1f} GB ({enough})")
    largest = max(step.stages, key=lambda name: step.stages[name]["peak_bytes"])
    what = (
        "--teacher-frames or a smaller --teacher"
        if largest.startswith("teacher")
        else "--num-frames, --height, --width"
    )
    lines.append(f"the peak is in {largest}: reduce {what}")
    if (total := sum(step.weights.values())) > budget:
        lines.append(f"the weights alone take {total / GB:.1f} GB: take smaller models")
    return lines
