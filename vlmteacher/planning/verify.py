"""Run one whole optimisation step of every known Reasoner at full size, on tensors without data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

from vlmteacher.decoders.taehv import check_decoder
from vlmteacher.errors import InputError
from vlmteacher.lora.adapter import add_lora, lora_parameters
from vlmteacher.optimization.frames import teacher_frame_indices
from vlmteacher.optimization.reward import vqa_objective
from vlmteacher.planning.models import build_decoder, build_reasoner, build_teacher, known_models
from vlmteacher.planning.plan import GB, nbytes
from vlmteacher.planning.reasoner import blank_instance
from vlmteacher.planning.teacher import query_set
from vlmteacher.planning.tracing import tracing
from vlmteacher.reasoners.checkpointing import Keep, keep_activations

TEACHER = "qwen3-vl-4b"
QUESTIONS, TEACHER_FRAMES, RANK = 4, 24, 16


def verify_step(name: str, teacher: Any) -> dict[str, Any]:
    """Run a step of the Reasoner `name` in one piece, as `Optimization` does: prediction, decoder, Teacher, backward.

    Reasoner and Teacher recompute all that they can. Returns the shapes, the FLOPs, the bytes of the weights
    (transformer, LoRA and AdamW's moments, decoder, Teacher), the peak with them, and the number of LoRA tensors with a
    gradient. Raises InputError for an unknown Reasoner.
    """
    start = time.perf_counter()
    reasoner, decoder_name = build_reasoner(name)
    if decoder_name is None:
        raise InputError(f"unknown --reasoner {name!r} of --verify: choose from {', '.join(known_models('reasoner'))}")
    decoder = build_decoder(decoder_name)
    check_decoder(decoder, reasoner, decoder_name)
    settings, network = reasoner.settings, reasoner.transformer
    size = settings.num_frames, settings.height, settings.width
    reasoner.check(*size)
    parameters = sum(p.numel() for p in network.parameters())
    add_lora(network, RANK)
    keep_activations(network, Keep.INPUT)
    decoder.layers()  # folded once, not at every step
    condition, noise = blank_instance(reasoner, size)
    indices = teacher_frame_indices(settings.num_frames, min(TEACHER_FRAMES, settings.num_frames))
    clip = teacher.clip(indices, reasoner.fps, *size[1:])
    layout = teacher.layout(clip, query_set(QUESTIONS))
    loras = lora_parameters(network)
    with tracing() as trace:
        trace.weights(network, decoder, teacher.model)
        trace.inputs(condition.prompt_embeds, noise.z1, *condition.inputs.values())
        latents = reasoner.predict_clean(condition, noise)
        frames = decoder.decode(latents, reasoner.decoded_indices(indices))
        losses = teacher.packed_losses(frames, layout, clip.size)
        vqa_objective(losses, 0.5).backward()
    assert frames.shape == (len(indices), 3, *size[1:]) and losses.shape == (QUESTIONS,)
    weights = nbytes(network, decoder, teacher.model) + 2 * sum(parameter.nbytes for parameter in loras)
    return {
        "reasoner": name,
        "decoder": decoder_name,
        "parameters": parameters,
        "size": list(size),
        "latents": list(latents.shape),
        "tokens": math.prod(noise.z1.shape[2:]) // (math.prod(reasoner.patch) * reasoner.temporal_patch),
        "guided": condition.negative is not None,
        "frames": list(frames.shape),
        "losses": list(losses.shape),
        "lora_tensors": len(loras),
        "lora_gradients": sum(parameter.grad is not None for parameter in loras),
        "flops": sum(trace.flops.values()),
        "weights_bytes": weights,
        "peak_bytes": weights + trace.peak[""],
        "seconds": time.perf_counter() - start,
    }


def verify(reasoner: str | None = None, teacher: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield `verify_step` of one known Reasoner, or of all. Raises InputError for unknown names."""
    names = known_models("reasoner") if reasoner is None else [reasoner]
    the_teacher = build_teacher(teacher or TEACHER)
    the_teacher.activation_bytes = 0
    for name in names:
        yield verify_step(name, the_teacher)


def format_verified(row: dict[str, Any]) -> str:
    """Format a result of `verify_step` as a row under `HEADER`, in Markdown."""
    frames, height, width = row["size"]
    channels, *latents = row["latents"][1:]
    return (
        f"| {row['reasoner']} | {row['parameters'] / 1e9:.1f} B | {frames} x {height} x {width} |"
        f" {channels} x {' x '.join(map(str, latents))} | {row['tokens']:,} | {'yes' if row['guided'] else 'no'} |"
        f" {row['decoder']} | {row['lora_gradients']} of {row['lora_tensors']} | {row['flops'] / 1e12:,.0f} |"
        f" {row['weights_bytes'] / GB:.1f} | {row['peak_bytes'] / GB:.1f} |"
    )


HEADER = """\
| Reasoner | size | video | latents | tokens | guided | decoder | LoRA gradients | TFLOP | weights, GB | peak, GB |
|---|---|---|---|---|---|---|---|---|---|---|"""
