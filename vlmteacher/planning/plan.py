"""A whole step out of its parts, and the settings of the fewest FLOPs that fit."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmteacher.decoders.taehv import check_decoder
from vlmteacher.errors import InputError
from vlmteacher.lora.adapter import add_lora
from vlmteacher.optimization.objective import teacher_frame_indices
from vlmteacher.planning.costs import Cost
from vlmteacher.planning.decoder import decoder_cost, stock_decoder_cost
from vlmteacher.planning.models import build_decoder, build_reasoner, build_teacher, known_facts, known_models
from vlmteacher.planning.reasoner import ReasonerCosts
from vlmteacher.planning.teacher import (
    Video,
    activation_budget,
    language_costs,
    preprocessing_cost,
    query_set,
    stock_teacher_cost,
    vision_costs,
)
from vlmteacher.reasoners.checkpointing import Keep, format_levels
from vlmteacher.teachers.vlm import CHUNK_PATCHES

GB = 10**9


@dataclass(frozen=True)
class Step:
    """One whole step: what each part costs, what its models weigh, and how it is set up."""

    reasoner: Cost
    decoder: Cost
    preprocessing: Cost
    vision: Cost
    language: Cost
    weights: dict[str, int]
    passes: int = 1  # of the Teacher, one after the other
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        teacher = sum(part.forward + part.backward for part in (self.vision, self.language))
        return sum(part.forward + part.backward for part in (self.reasoner, self.decoder)) + self.passes * teacher

    @functools.cached_property
    def stages(self) -> dict[str, dict[str, int]]:
        """FLOPs and the most bytes alive, weights included, by stage in the order of a step."""
        weights = sum(self.weights.values())
        between = weights + self.reasoner.kept
        seen = between + self.decoder.kept
        alive = {
            "reasoner": (weights, weights),
            "decoder": (between, between),
            "preprocessing": (seen, seen),
            "teacher.vision": (seen, seen),
            "teacher.language": (seen + self.vision.kept, seen + self.vision.kept),
        }
        parts = {
            "reasoner": self.reasoner,
            "decoder": self.decoder,
            "preprocessing": self.preprocessing,
            "teacher.vision": self.vision,
            "teacher.language": self.language,
        }
        found = {}
        for name, part in parts.items():
            times = self.passes if name.startswith("teacher") else 1
            rows = {
                "forward": (part.forward, part.forward_bytes, 0),
                "recompute": (part.repeated, part.backward_bytes, 1),
                "backward": (part.backward - part.repeated, part.backward_bytes, 1),
            }
            for row, (flops, nbytes, place) in rows.items():
                if row != "recompute" or flops:
                    found[f"{name}.{row}"] = {"flops": times * flops, "peak_bytes": alive[name][place] + nbytes}
        found["optimiser"] = {"flops": 0, "peak_bytes": weights}  # element-wise
        return found

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


def nbytes(*modules: nn.Module) -> int:
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    return sum(t.nbytes for t in tensors.values())


def mixes(blocks: int) -> Iterator[list[Keep]]:
    """Levels for every block, at most two different ones; the later blocks, which go backward first, keep more."""
    for less in Keep:
        yield [less] * blocks
        for more in Keep:
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
    rank: int = 16,
    memory: float = 48.0,
    text_encoder: str = "device",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """What one optimisation step costs, ours with the settings of the fewest FLOPs that fit, and stock.

    Args:
        reasoner, teacher, decoder: names of known models, "packaged", or local directories (the decoder: a file) of
            which only configs are read. The decoder is by default the Reasoner's family's.
        num_frames, height, width: of the video, by default the Reasoner's own.
        questions: 1 + M, the goal's and the process questions. teacher_frames: K, by default 24 or all.
        memory: GB (10^9 bytes) of the device. text_encoder: where it waits, "device" or "cpu", and with it what else a
            step does not need: an image encoder, the low-noise one of two experts.

    Returns:
        {"ours", "stock": {"flops", "peak_bytes", "stages": {name: {"flops", "peak_bytes"}}, "weights", "settings"},
        "ratio": FLOPs of ours over stock, "fits", "memory_bytes", "advice": what to change where it does not fit}.

    Raises InputError: unknown models, sizes that the Reasoner cannot make, no memory.
    """
    if not (memory > 0 and math.isfinite(memory)):
        raise InputError(f"--memory must be a number of GB above 0, not {memory:g}")
    for name, value in (("questions", questions), ("rank", rank)):
        if value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")
    if not Path(teacher).is_dir() and teacher != "packaged":
        known_facts(teacher, "teacher")  # a misspelt name shows before the Reasoner is built
    the_reasoner, family_decoder = build_reasoner(reasoner, dtype)
    given = {"num_frames": num_frames, "height": height, "width": width}
    size = {name: getattr(the_reasoner, name) if value is None else value for name, value in given.items()}
    the_reasoner.check(**size)
    if teacher_frames is None:
        teacher_frames = min(24, size["num_frames"])
    indices = teacher_frame_indices(size["num_frames"], teacher_frames)
    decoder = decoder or family_decoder or ("packaged" if reasoner == "packaged" else None)
    if decoder is None:
        known = ", ".join(known_models("decoder"))
        raise InputError(f"--decoder is needed for a Reasoner in a directory: a checkpoint file or one of {known}")
    the_decoder = build_decoder(decoder, dtype)
    check_decoder(the_decoder, the_reasoner, decoder)
    the_teacher = build_teacher(teacher, dtype)
    video = Video(tuple(indices), the_reasoner.fps, size["height"], size["width"])
    shape = (size["num_frames"], size["height"], size["width"])

    network: Any = the_reasoner.transformer
    weights = {"reasoner": nbytes(network)}
    add_lora(network, rank)
    lora = nbytes(network) - weights["reasoner"]
    waiting = {name: part for name, part in the_reasoner.networks.items() if name not in ("transformer", "vae")}
    weights |= {
        "vae": nbytes(the_reasoner.vae),
        **{name: nbytes(part) if text_encoder == "device" else 0 for name, part in waiting.items()},
        "decoder": nbytes(the_decoder),
        "teacher": nbytes(the_teacher.model),
        "lora": lora,
        "lora gradient and AdamW": 3 * lora,
    }
    latents = the_reasoner.latent_shape(*shape)
    costs = ReasonerCosts.of(the_reasoner, shape)
    pair = the_teacher.frames_per_patch
    resized = the_teacher.resized(teacher_frames, *shape[1:])
    patches = the_teacher.patches_per_frame(resized)
    default = max(1, CHUNK_PATCHES["cuda"] // patches) * pair
    visions = vision_costs(the_teacher, video, sorted({pair, default, len(indices)}))
    languages = language_costs(the_teacher, video, questions)
    ours = functools.partial(
        Step,
        decoder=decoder_cost(the_decoder, latents, indices),
        preprocessing=preprocessing_cost(the_teacher, video),
        weights=weights,
    )
    reasoners = [(levels, costs.total(levels)) for levels in mixes(costs.blocks)]
    candidates = [
        (levels, chunk, keep, ours(reasoner=r, vision=v, language=t))
        for levels, r in reasoners
        for chunk, v in visions.items()
        for keep, t in languages.items()
    ]
    budget = int(memory * GB)
    fitting = [c for c in candidates if c[3].peak_bytes <= budget]
    fits = bool(fitting)
    levels, chunk, keep, best = (
        min(fitting, key=lambda c: (c[3].flops, sum(c[0]), c[2], c[3].peak_bytes))
        if fits
        else min(candidates, key=lambda c: (c[3].peak_bytes, c[3].flops))
    )
    clip = the_teacher.clip(indices, the_reasoner.fps, *shape[1:])
    tokens = the_teacher.layout(clip, query_set(questions)).tokens
    best.settings.update(
        activations=format_levels(levels),
        teacher_activation_bytes=activation_budget(the_teacher, tokens, keep),
        teacher_keeps=keep.name.lower(),
        teacher_chunk_patches=-(-chunk // pair) * patches,
        text_encoder=text_encoder,
        decoder="fused",
        rank=rank,
    )

    add_lora(network, rank, fused=False)
    stock_costs = ReasonerCosts.of(the_reasoner, shape, (Keep.INPUT,))
    stock_vision, stock_language = stock_teacher_cost(the_teacher, video)
    stock = Step(
        stock_costs.total([Keep.INPUT] * stock_costs.blocks),
        stock_decoder_cost(the_decoder, latents, indices),
        best.preprocessing,
        stock_vision,
        stock_language,
        weights,
        passes=questions,
        settings={"activations": format_levels([Keep.INPUT] * stock_costs.blocks), "teacher_passes": questions},
    )
    return {
        "reasoner": reasoner,
        "teacher": teacher,
        "decoder": decoder,
        **size,
        "teacher_frames": teacher_frames,
        "questions": questions,
        "reasoner_tokens": math.prod(latents[2:]) // math.prod(the_reasoner.patch),
        "teacher_tokens": tokens,
        "ours": best.to_dict(),
        "stock": stock.to_dict(),
        "ratio": best.flops / stock.flops,
        "memory_bytes": budget,
        "fits": fits,
        "advice": [] if fits else advice(best, budget, text_encoder),
    }


def advice(step: Step, budget: int, text_encoder: str) -> list[str]:
    """What to change where even the least memory is too much."""
    over, found = step.peak_bytes - budget, []
    if text_encoder == "device":
        saved = step.weights["text_encoder"]
        enough = "enough" if saved >= over else "not enough alone"
        found.append(f"--text-encoder cpu saves {saved / GB:.1f} GB ({enough})")
    largest = max(step.stages, key=lambda name: step.stages[name]["peak_bytes"])
    what = (
        "--teacher-frames or a smaller --teacher"
        if largest.startswith("teacher")
        else "--num-frames, --height, --width"
    )
    found.append(f"the peak is in {largest}: reduce {what}")
    if (total := sum(step.weights.values())) > budget:
        found.append(f"the weights alone take {total / GB:.1f} GB: take smaller models")
    return found
