"""The methods that benchmarks compare, by name, and how one of them solves one instance."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from vlmteacher.baselines.cost import Cost
from vlmteacher.baselines.prompt_rewrite import Rewriter
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
"""Queries that fit any task: the paper's ablation of instance-specific queries."""

NEVER = 1e-30  # a threshold that only a loss of 0 is below, which has no gradient either


@dataclass(frozen=True)
class Method:
    """A method and its parameters.

    Attributes:
        settings: keywords of `TeacherPipeline.__call__`.
        samples: N of pass@N; 0 for other methods.
        rewrite: whether the Teacher rewrites the prompt once (PE).
        rounds: R of VideoTPO; 0 for other methods.
        snapshots: numbers of updates after which to evaluate the video, instead of at the end; or of samples of which
            to pick one, instead of all.
        frames: number of Teacher frames as a multiple of the pair's default.
        queries: replace the Teacher's.
        many_step: run the Reasoner from before its few-step distillation.
        warm: the `warm_start_from` of a start from the instances before, whose LoRAs the folder of the sweep keeps;
            one instance after the other. "" for other methods.
        lora: the field of `Models` with the LoRA that the Reasoner runs with; "" for other methods.
        control: "static" or "final-frame", a video of one picture that no model makes; "" for other methods.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    samples: int = 0
    rewrite: bool = False
    rounds: int = 0
    snapshots: tuple[int, ...] = ()
    frames: float = 1.0
    queries: QuerySet | None = None
    many_step: bool = False
    warm: Literal["", "nearest", "mean"] = ""
    lora: Literal["", "lora", "post_lora", "grpo_lora"] = ""
    control: Literal["", "static", "final-frame"] = ""

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the results of one run."""
        return tuple(f"{'pass' if self.samples else 'steps'}@{n}" for n in self.snapshots) or (self.name,)


NO_UPDATE: dict[str, Any] = {"max_steps": 0, "final_samples": 1}
METHODS = {
    method.name: method
    for method in (
        Method("base", NO_UPDATE, lora="lora"),
        Method("teacher"),
        Method("post", NO_UPDATE, lora="post_lora"),
        Method("flow-grpo", NO_UPDATE, lora="grpo_lora"),
        Method("goal-only", {"goal_weight": 1.0}),
        Method("process-only", {"goal_weight": 0.0}),
        Method("generic", queries=GENERIC),
        Method("last-step", {"target": "last_step"}),
        Method("full-step", {"target": "full"}),
        Method("frames@half", frames=0.5),
        Method("frames@double", frames=2.0),
        Method("many-step", many_step=True),
        Method("many-step-base", NO_UPDATE, many_step=True),
        Method("keep-best", {"keep": "best"}),
        Method("check-final", {"check_final": True}),
        Method("preserve", {"preserve": True}),
        Method("warm", warm="nearest"),
        Method("warm-mean", warm="mean"),
        Method("pe", rewrite=True),
        Method("videotpo", rounds=3),
        Method("static", control="static"),
        Method("final-frame", control="final-frame"),
    )
}
AMOUNTS = {
    "threshold": "threshold",
    "jitter": "frame_jitter",
    "decay": "lora_decay",
    "pull": "pull",
    "statistics": "frame_statistics",
    "final": "final_samples",
}
COUNTS = ("pass@N (1 to 64)", "videotpo@R (1 to 16)", "steps@N (0 to 1000)")
KNOWN = ", ".join([*METHODS, *COUNTS, *(f"{name}@X" for name in AMOUNTS)])


def find_method(name: str) -> Method:
    """Return the method of this name. Raises InputError for an unknown method or an amount out of range."""
    if name in METHODS:
        return METHODS[name]
    kind, _, amount = name.partition("@")
    if kind == "pass" and amount.isdecimal() and 1 <= int(amount) <= 64:
        return Method(name, samples=int(amount))
    if kind == "videotpo" and amount.isdecimal() and 1 <= int(amount) <= 16:
        return Method(name, rounds=int(amount))
    if kind == "steps" and amount.isdecimal() and int(amount) <= 1000:
        return steps(int(amount))
    if kind in AMOUNTS and re.fullmatch(r"\d+(\.\d+)?", amount):
        settings: dict[str, Any] = {
            AMOUNTS[kind]: int(amount) if kind in ("jitter", "final") and amount.isdecimal() else float(amount)
        }
        Settings(**settings)
        return Method(name, settings)
    raise InputError(f"unknown method {name!r}: choose from {KNOWN}")


def steps(*numbers: int) -> Method:
    """The method with a fixed number of updates, whatever the loss is, evaluated after each of `numbers` in one run.

    With no updates it is the base.
    """
    settings = {"max_steps": max(numbers), "threshold": NEVER} if any(numbers) else NO_UPDATE
    return Method("steps", settings, snapshots=numbers)


def samples(*numbers: int) -> Method:
    """pass@N for each of `numbers`, on the first N samples of one run."""
    return Method("pass", samples=max(numbers), snapshots=numbers)


def check_teacher(method: Method, pair: str | None, teacher: str | None = None) -> None:
    """Raise InputError if the method needs texts that the Teacher does not write.

    pair: directory of the pair; None: the packaged one. teacher: instead of the pair's.
    """
    if method.rewrite or method.rounds:
        from vlmteacher.pipeline import read_pair
        from vlmteacher.teachers.base import check_free_text, read_style

        remedy = "take an instruction-tuned VLM as the Teacher, or one beside it by --vlm MODEL"
        if teacher is not None:
            label = f"method {method.name!r} rewrites prompts, and the teacher {teacher}"
            check_free_text(read_style(teacher), label, remedy)
            return
        directory, description = read_pair(pair)
        style = read_style(str(directory / description["teacher"]), local_files_only=True)
        label = f"method {method.name!r} rewrites prompts, and the teacher of the {pair or 'packaged'} pair"
        check_free_text(style, label, remedy)


Row = dict[str, Any]


class Judge(Protocol):
    """Gives the independent verdict on a video (F, 3, H, W) in [0, 1], now or from its file later.

    name: of the row that the video is the result of; None for a video that is not kept. sample: its number among the
    samples of pass@N.
    """

    def __call__(self, video: Tensor, name: str | None = None, sample: int | None = None) -> Row: ...


KEPT = ("loss", "p_yes", "grad_norm", "guards", "rolled_back", "learning_rate")  # of a step's row
Answers = Callable[[Tensor, QuerySet], list[Any] | None]
"""Gives the true answer to each query about a video (F, 3, H, W) in [0, 1]; None where they are not known."""


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
    rewriter: Rewriter | None = None,
) -> dict[str, Row]:
    """Solve one instance with a method; return the results by the names of `method.rows`.

    Seconds and calls (see `Cost`) are those of the method alone, without the benchmark's judging, writing queries and
    other snapshots. The video before the first update is among them where the pipeline has made it.

    Args:
        seed: of the noise; N samples use the seeds from `seed` to `seed + N - 1`.
        queries: unless the method brings its own. answers: true answers to them.
        judge: the independent verdict. One that keeps the video for later returns no verdict yet.
        trace: judge the few-step video of every step too. rewriter: of prompts; None: the Teacher.
    """
    if method.samples:
        return _pass_at_n(method, pipe, prompt, image, seed, queries, judge, answers)
    if method.rewrite or method.rounds:
        return {method.name: _by_new_prompts(method, pipe, prompt, image, seed, queries, judge, answers, rewriter)}
    began, skipped = time.perf_counter(), 0.0
    settings = pipe.defaults.updated(**method.settings)
    shots: dict[int, Row] = {}
    verdicts: list[Row] = []

    def row(
        name: str, cost: Cost, video: Tensor, asked: QuerySet, history: list[Row], p_yes: list[float], loss: float
    ) -> Row:
        entries = _entries(judge(video, name), answers(video, asked), loss, history)
        return {**asdict(cost), **entries, "p_yes": p_yes}

    def after_step(_: TeacherPipeline, step: int, __: Row) -> None:
        nonlocal skipped
        start, loop = time.perf_counter(), pipe.loop
        assert loop is not None
        if step + 1 in method.snapshots and loop.stopped is None:
            video, losses = loop.final_video()
            loss = vqa_objective(losses, loop.settings.goal_weight).item()
            p_yes, made = losses.neg().exp().tolist(), settings.keep == "last"  # as a run that ends there makes it
            cost = Cost(time.perf_counter() - began - skipped, *_calls(settings, loop.history, loop.warm_start, made))
            shots[step + 1] = row(f"steps@{step + 1}", cost, video, loop.queries, loop.history, p_yes, loss)
        if trace:
            verdicts.append(judge(loop.final_video()[0]))
        skipped += time.perf_counter() - start

    frames = min(max(1, round(method.frames * pipe.defaults.teacher_frames)), pipe.reasoner.num_frames)
    output = pipe(
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
    seconds, made = time.perf_counter() - began - skipped, "before" in output.seconds
    cost = Cost(seconds, *_calls(settings, output.history, output.warm_start, made))
    after = (cost, cast(Tensor, output.frames), output.queries, output.history, output.p_yes_after, output.loss_after)
    history = [{name: step[name] for name in KEPT if name in step} for step in output.history]
    if trace:  # a step evaluates the result of the updates before it
        history = [
            step | {name: verdict[name] for name in ("success", "score")}
            for step, verdict in zip(history, [judge(cast(Tensor, output.frames_before)), *verdicts], strict=False)
        ]
    end: Row = {"stopped": output.stopped, "steps": history}
    end |= {} if output.warm_start is None else {"warm_start": output.warm_start}
    rows = {
        name: shots[n] if n in shots else row(name, *after) | end
        for name, n in zip(method.rows, method.snapshots or (-1,), strict=True)
    }
    return {name: result | {"queries": output.queries.to_dict()} for name, result in rows.items()}


def _calls(settings: Settings, history: Sequence[Row], warm_start: Row | None, before: bool) -> tuple[int, int]:
    """Return the generator calls and the VLM calls of a run of the pipeline with these steps.

    warm_start: the output's; the looks at two first losses count as judged predictions. before: whether the video from
    before was made. Final samples that a divergence of the last update makes necessary are not among them.
    """
    changed = any(step["grad_norm"] is not None for step in history) or (warm_start or {}).get("taken", False)
    samples = (before and changed) + settings.final_samples  # without an update it is the first final one
    samples += settings.final_samples * sum("final_loss" in step for step in history)  # for `check_final`
    whole = 0 if settings.target == "first_step" else len(history)  # steps that run the whole sampler
    return samples + whole, samples + len(history) + 2 * (warm_start is not None)


def control(method: Method, picture: Image.Image, frames: int, judge: Judge) -> Row:
    """Return the row of a control: the video of one picture alone."""
    began = time.perf_counter()
    still = torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)
    cost = Cost(time.perf_counter() - began, generator_calls=0, vlm_calls=0)
    return {**asdict(cost), **_entries(judge(still.expand(frames, *still.shape), method.name), None, None)}


def _entries(verdict: Row, truths: list[Any] | None, loss: float | None, history: Sequence[Row] = ()) -> Row:
    """Return the entries that the rows of all methods have; `history` has the steps of an optimisation."""
    return {
        **verdict,
        "truths": truths,
        "updates": sum(step["grad_norm"] is not None for step in history),
        "loss_first": history[0]["loss"] if history else None,
        "loss_one_step": history[-1]["loss"] if history else None,
        "loss_final": loss,
    }


def _pass_at_n(
    method: Method,
    pipe: TeacherPipeline,
    prompt: str,
    image: Image.Image | None,
    seed: int,
    queries: QuerySet,
    judge: Judge,
    answers: Answers,
) -> dict[str, Row]:
    """Sample once; each row picks among the first samples, which take their share of the seconds."""
    from vlmteacher.baselines.best_of_n import best_of_n

    began = time.perf_counter()
    drawn = best_of_n(pipe, prompt, image, [seed + k for k in range(method.samples)], queries)
    seconds = time.perf_counter() - began
    verdicts = [judge(video, method.name, k) for k, video in enumerate(drawn.videos)]
    files = [verdict["video"] for verdict in verdicts if "video" in verdict]
    rows = {}
    for name, count in zip(method.rows, method.snapshots or (method.samples,), strict=True):
        picked = min(range(count), key=drawn.losses.__getitem__)
        best = drawn.videos[picked]
        cost = Cost(seconds * count / method.samples, generator_calls=count, vlm_calls=count)
        rows[name] = {
            **asdict(cost),
            **_entries(judge(best, name), answers(best, queries), drawn.losses[picked]),
            **oracle(verdicts[:count]),
            **({"picked": picked, "sample_videos": files[:count]} if files else {}),
            "queries": queries.to_dict(),
        }
    return rows


def oracle(verdicts: Sequence[Row]) -> Row:
    """Return what the scorer would pick among the samples of pass@N; nothing without verdicts."""
    if not all("score" in verdict for verdict in verdicts):
        return {}
    best = max(verdicts, key=lambda verdict: verdict["score"])
    return {
        "oracle_success": any(verdict["success"] for verdict in verdicts),
        "oracle_score": best["score"],
        "oracle_subscores": best["subscores"],
        "samples": [verdict["success"] for verdict in verdicts],
    }


def _by_new_prompts(
    method: Method,
    pipe: TeacherPipeline,
    prompt: str,
    image: Image.Image | None,
    seed: int,
    queries: QuerySet,
    judge: Judge,
    answers: Answers,
    rewriter: Rewriter | None,
) -> Row:
    from vlmteacher.baselines.best_of_n import objective
    from vlmteacher.baselines.prompt_rewrite import prompt_rewrite
    from vlmteacher.baselines.video_tpo import video_tpo

    texts: Row
    if method.rewrite:
        rewrite = prompt_rewrite(pipe, prompt, image, seed, rewriter)
        video, cost, loss = rewrite.video, rewrite.cost, objective(pipe, rewrite.video, queries)
        texts = {"new_prompt": rewrite.prompt}
    else:
        tpo = video_tpo(pipe, prompt, image, (seed, seed + 1), method.rounds, queries, rewriter)
        video, cost, loss = tpo.video, tpo.cost, tpo.loss
        texts = {"rounds": [asdict(one) for one in tpo.rounds]}
    return {
        **asdict(cost),
        **_entries(judge(video, method.name), answers(video, queries), loss),
        **texts,
        "queries": queries.to_dict(),
    }
