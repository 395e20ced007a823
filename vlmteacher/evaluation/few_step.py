"""Quality of a few-step Reasoner on the microworld: rule score, distance to real videos, one-step agreement.

The method optimises a Reasoner's one-step prediction and then samples in a few steps: only what the two have in common
survives of the optimisation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.evaluation.microworld import first_frame, judge, noise_seed
from vlmteacher.evaluation.video_distance import video_distance
from vlmteacher.files import write_json
from vlmteacher.microworld import world
from vlmteacher.microworld.questions import right_queries
from vlmteacher.optimization.frames import teacher_frame_indices
from vlmteacher.optimization.reward import vqa_objective
from vlmteacher.progress import track
from vlmteacher.queries import QuerySet
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.condition import Condition, Noise
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.reasoners.many_step import sample_many
from vlmteacher.reasoners.sampling import relative_rms
from vlmteacher.teachers import load_teacher
from vlmteacher.teachers.base import Teacher

TEACHER_FRAMES = 12
GOAL_WEIGHT = 0.5
PICTURED = 6


@torch.no_grad()
def agreement(
    reasoner: Reasoner,
    condition: Condition,
    noise: Noise,
    teacher: Teacher,
    queries: QuerySet,
    teacher_frames: int = TEACHER_FRAMES,
) -> dict[str, float]:
    """Compare the one-step prediction with the few-step video of the same noise, both decoded by the standard VAE.

    Returns `relative_rms` of their latents, and the Teacher's objective on both: `loss_one_step`, `loss_few_step`.
    """
    one, few = reasoner.predict_clean(condition, noise), reasoner.sample(condition, noise)
    losses = (teacher_loss(reasoner, teacher, reasoner.decode(x), queries, teacher_frames) for x in (one, few))
    names = ("loss_one_step", "loss_few_step")
    return {"relative_rms": relative_rms(one, few, condition.first_frame), **dict(zip(names, losses, strict=True))}


@torch.no_grad()
def teacher_loss(
    reasoner: Reasoner, teacher: Teacher, video: Tensor, queries: QuerySet, teacher_frames: int = TEACHER_FRAMES
) -> float:
    """Return the Teacher's objective on a video (F, 3, H, W) in [0, 1], with the optimisation's goal weight."""
    indices = teacher_frame_indices(len(video), teacher_frames)
    return vqa_objective(teacher.losses(video[indices], indices, reasoner.fps, queries), GOAL_WEIGHT).item()


@torch.no_grad()
def measure(
    reasoner: Reasoner,
    teacher: Teacher | None,
    limit: int,
    seed: int,
    many_steps: int = 0,
    guidance: float = 1.0,
    empty: Tensor | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a microworld Reasoner on the first `limit` instances (at least 2) of the test in domain.

    Scene, prompt and noise of an instance are those of the benchmark, so that Reasoners can be compared in pairs.

    Args:
        teacher: is asked the right questions, not its own.
        seed: draws the instances.
        many_steps: sample in that many steps of the ODE instead of with the few-step sampler.
        guidance: classifier-free guidance of these steps.
        empty: embeddings of the empty prompt, for the guidance.
        callback: called with the index of an instance, its one-step prediction and its video, both (F, 3, H, W) in
            [0, 1].

    Returns:
        Means over instances: rule `score` and `success_rate` of the videos, `score_one_step` of the one-step
        predictions, `relative_rms` between the two, `seconds` per video, and with a Teacher `loss_one_step`,
        `loss_few_step` and `loss_gap` (the mean absolute difference). Further `video_distance` from the right videos
        and the rows of the `instances`.

    Raises InputError: a limit below 2.
    """
    if limit < 2:
        raise InputError(f"few-step quality is measured on at least 2 instances, not {limit}")
    rows, videos, real = [], [], []
    for index in track(range(limit), "measure", "instance"):
        scene, prompt = world.instance(index, seed)
        condition = reasoner.encode(
            prompt, first_frame(scene), num_frames=world.NUM_FRAMES, height=world.SIZE, width=world.SIZE
        )
        noise = reasoner.noise(condition, torch.Generator().manual_seed(noise_seed(index, seed)))
        began = time.perf_counter()
        if many_steps:
            latents = sample_many(reasoner, condition, empty, noise, steps=many_steps, guidance=guidance)
        else:
            latents = reasoner.sample(condition, noise)
        seconds = time.perf_counter() - began
        one = reasoner.predict_clean(condition, noise)
        video, early = reasoner.decode(latents), reasoner.decode(one)
        verdict = judge(video, scene)
        row: dict[str, Any] = {
            "index": index,
            "task": scene.family,
            "success": verdict.success,
            "score": verdict.score,
            "score_one_step": judge(early, scene).score,
            "relative_rms": relative_rms(one, latents, condition.first_frame),
            "seconds": seconds,
        }
        if teacher is not None:
            queries = right_queries(scene)
            row["loss_one_step"] = teacher_loss(reasoner, teacher, early, queries)
            row["loss_few_step"] = teacher_loss(reasoner, teacher, video, queries)
            row["loss_gap"] = abs(row["loss_one_step"] - row["loss_few_step"])
        rows.append(row)
        if callback is not None:
            callback(index, early, video)
        videos.append(video.cpu())
        real.append(torch.from_numpy(world.render(scene)).permute(0, 3, 1, 2))
    return {**_means(rows), "video_distance": video_distance(videos, real), "instances": rows}


def report(
    reasoner: str, teacher: str | None, limit: int, seed: int, out: Path, many_steps: int = 0, guidance: float = 1.0
) -> dict[str, Any]:
    """`measure` the Reasoner in a directory or on the hub; write results.json and frames.png to `out`.

    The picture shows the one-step predictions of the first six instances above their videos. teacher: a directory or
    hub id, None to leave out the losses.

    Raises InputError: `out` holds results, a negative number of steps, a Reasoner that cannot be trained.
    """
    if (out / "results.json").exists():
        raise InputError(f"{out} already holds results: give another --out")
    if many_steps < 0:
        raise InputError(f"--many-steps must not be negative, not {many_steps}")
    model = load_reasoner(reasoner)
    empty = model.encode_prompt("")
    rows: list[np.ndarray] = []

    def collect(index: int, one: Tensor, few: Tensor) -> None:
        for video in (one, few) if index < PICTURED else ():
            frames = (video[[0, 3, 6, 9, 12]].cpu().permute(0, 2, 3, 1) * 255).round().byte().numpy()
            rows.append(np.concatenate(list(frames), 1))

    judging = load_teacher(teacher) if teacher else None
    measured = measure(model, judging, limit, seed, many_steps, guidance, empty, collect)
    results = {"reasoner": reasoner, "seed": seed, "many_steps": many_steps, "guidance": guidance, **measured}
    out.mkdir(parents=True, exist_ok=True)
    pairs = [np.concatenate(rows[i : i + 2]) for i in range(0, len(rows), 2)]
    columns = [np.concatenate(pairs[i::2]) for i in range(2) if pairs[i::2]]
    height = min(len(column) for column in columns)
    sheet = Image.fromarray(np.concatenate([column[:height] for column in columns], 1))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(out / "frames.png")
    write_json(out / "results.json", results)
    return results


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    names = [name for name in rows[0] if name not in ("index", "task", "success")]
    means = {name: fmean(row[name] for row in rows) for name in names}
    return {"n": len(rows), "success_rate": fmean(row["success"] for row in rows), **means}
