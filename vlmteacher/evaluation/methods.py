"""The methods that are compared, by name, and what one of them does with one instance."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.optimization.reward import vqa_objective
from vlmteacher.queries import QuerySet
from vlmteacher.settings import Settings

if TYPE_CHECKING:
    from PIL import Image

    from vlmteacher.pipeline import TeacherPipeline

GENERIC = QuerySet(
    "Does the video carry out the task?",
    ("Does everything move as it should all the way?", "Do all things keep their shapes?"),
)
"""Queries that fit any task and say nothing about one: the paper's ablation of instance-specific ones."""

NEVER = 1e-30  # a threshold that only a loss of 0 reaches, which has no gradient either
NOT_HERE = {
    "pe": "one rewrite of the prompt by a VLM; the packaged Teacher writes queries and no prompts",
    "videotpo": "rewrites of the prompt after critiques by a VLM; the packaged Teacher writes queries and no prompts",
}


@dataclass(frozen=True)
class Method:
    """settings: keywords of `TeacherPipeline.__call__`. samples: N of pass@N, or 0. snapshots: numbers of updates after
    which the video counts, instead of that at the end. frames: K as a multiple of the pair's. queries: instead of the
    Teacher's. many_step: of the Reasoner before its few-step distillation."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    samples: int = 0
    snapshots: tuple[int, ...] = ()
    frames: float = 1.0
    queries: QuerySet | None = None
    many_step: bool = False

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the results that a run gives."""
        return tuple(f"steps@{n}" for n in self.snapshots) or (self.name,)


METHODS = {
    method.name: method
    for method in (
        Method("base", {"max_steps": 0, "final_samples": 1}),
        Method("teacher"),
        Method("goal-only", {"goal_weight": 1.0}),
        Method("process-only", {"goal_weight": 0.0}),
        Method("generic", queries=GENERIC),
        Method("last-step", {"target": "last_step"}),
        Method("full-step", {"target": "full"}),
        Method("frames@half", frames=0.5),
        Method("frames@double", frames=2.0),
        Method("many-step", many_step=True),
        Method("keep-best", {"keep": "best"}),
        Method("check-final", {"check_final": True}),
        Method("preserve", {"preserve": True}),
    )
}
AMOUNTS = {
    "threshold": "threshold",
    "jitter": "frame_jitter",
    "decay": "lora_decay",
    "pull": "pull",
    "final": "final_samples",
}
KNOWN = ", ".join([*METHODS, "pass@N (1 to 64)", "steps@N (0 to 1000)", *(f"{name}@X" for name in AMOUNTS)])


def find_method(name: str) -> Method:
    """Raises InputError for a method that is not there, or an amount that cannot be."""
    if name in METHODS:
        return METHODS[name]
    if name in NOT_HERE:
        raise InputError(f"method {name!r} is not there: it needs {NOT_HERE[name]}")
    kind, _, amount = name.partition("@")
    if kind == "pass" and amount.isdecimal() and 1 <= int(amount) <= 64:
        return Method(name, samples=int(amount))
    if kind == "steps" and amount.isdecimal() and int(amount) <= 1000:
        return steps(int(amount))
    if kind in AMOUNTS and re.fullmatch(r"\d+(\.\d+)?", amount):
        settings: dict[str, Any] = {
            AMOUNTS[kind]: int(amount) if kind in ("jitter", "final") and amount.isdecimal() else float(amount)
        }
        Settings(**settings)
        return Method(name, settings)
    raise InputError(f"method {name!r} is not there: it can be {KNOWN}")


def steps(*numbers: int) -> Method:
    """So many updates whatever the loss is; one run serves all the numbers, each of which is a state on its way.

    None at all is the base.
    """
    settings = {"max_steps": max(numbers), "threshold": NEVER} if any(numbers) else METHODS["base"].settings
    return Method("steps", settings, snapshots=numbers)


Row = dict[str, Any]
Judge = Callable[[Tensor], Row]
"""The independent verdict on a video (F, 3, H, W)."""
Answers = Callable[[Tensor, QuerySet], list[Any]]
"""What is true of each query about a video (F, 3, H, W)."""


def run(
    method: Method,
    pipe: TeacherPipeline,
    prompt: str,
    image: Image.Image | None,
    seed: int,
    queries: QuerySet,
    judge: Judge,
    answers: Answers,
    trace: bool = False,
) -> dict[str, Row]:
    """What there is to say about the videos of one instance, by the names of `method.rows`.

    seed: of the noise; N samples take the N seeds from there on. trace: ask `judge` about the few-step video of every
    step too. Seconds are those of the method alone, without judging, writing queries and other snapshots.
    """
    if method.samples:
        return {method.name: _pass_at_n(method.samples, pipe, prompt, image, seed, queries, judge, answers)}
    began, skipped = time.perf_counter(), 0.0
    shots: dict[int, Row] = {}
    verdicts: list[Row] = []

    def row(video: Tensor, asked: QuerySet, history: list[Row], p_yes: list[float], loss: float) -> Row:
        return {
            "seconds": time.perf_counter() - began - skipped,
            **judge(video),
            "truths": answers(video, asked),
            "updates": sum(each["grad_norm"] is not None for each in history),
            "loss_first": history[0]["loss"] if history else None,
            "loss_one_step": history[-1]["loss"] if history else None,
            "loss_final": loss,
            "p_yes": p_yes,
        }

    def after_step(_: TeacherPipeline, step: int, __: Row) -> None:
        nonlocal skipped
        start, loop = time.perf_counter(), pipe.loop
        assert loop is not None
        if step + 1 in method.snapshots and loop.stopped is None:
            video, losses = loop.final_video()
            loss = vqa_objective(losses, loop.settings.goal_weight).item()
            shots[step + 1] = row(video, loop.queries, loop.history, losses.neg().exp().tolist(), loss)
        if trace:
            verdicts.append(judge(loop.final_video()[0]))
        skipped += time.perf_counter() - start

    frames = min(max(1, round(method.frames * pipe.defaults.teacher_frames)), pipe.reasoner.num_frames)
    made = pipe(
        prompt,
        image,
        generator=torch.Generator().manual_seed(seed),
        queries=method.queries or queries,
        teacher_frames=frames,
        output_type="pt",
        progress=False,
        callback_on_step_end=after_step,
        **method.settings,
    )
    assert isinstance(made.frames, Tensor) and isinstance(made.frames_before, Tensor)
    end = row(made.frames, made.queries, made.history, made.p_yes_after, made.loss_after)
    kept = ("loss", "p_yes", "grad_norm", "guards", "rolled_back", "learning_rate")
    history = [{name: each[name] for name in kept if name in each} for each in made.history]
    if trace:  # a step looks at what the updates before it have made
        seen = [judge(made.frames_before), *verdicts]
        history = [
            each | {name: verdict[name] for name in ("success", "score")}
            for each, verdict in zip(history, seen, strict=False)
        ]
    end |= {"stopped": made.stopped, "steps": history}
    rows = {name: shots.get(n, end) for name, n in zip(method.rows, method.snapshots or (-1,), strict=True)}
    return {name: each | {"queries": made.queries.to_dict()} for name, each in rows.items()}


def _pass_at_n(
    samples: int,
    pipe: TeacherPipeline,
    prompt: str,
    image: Image.Image | None,
    seed: int,
    queries: QuerySet,
    judge: Judge,
    answers: Answers,
) -> Row:
    from vlmteacher.baselines.best_of_n import best_of_n

    began = time.perf_counter()
    found = best_of_n(pipe, prompt, image, [seed + k for k in range(samples)], queries)
    seconds = time.perf_counter() - began
    verdicts = [judge(video) for video in found.videos]
    return {
        "seconds": seconds,
        **verdicts[found.best],
        "truths": answers(found.videos[found.best], queries),
        "updates": 0,
        "loss_first": None,
        "loss_one_step": None,
        "loss_final": found.losses[found.best],
        "oracle_success": any(verdict["success"] for verdict in verdicts),
        "oracle_score": max(verdict["score"] for verdict in verdicts),
        "samples": [verdict["success"] for verdict in verdicts],
        "queries": queries.to_dict(),
    }
