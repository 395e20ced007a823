"""The result of a call."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from vlmteacher.files import claimed
from vlmteacher.optimization.loop import Stopped
from vlmteacher.queries import QuerySet
from vlmteacher.runs.folder import RunFolder, checked
from vlmteacher.runs.notebook import as_html
from vlmteacher.runs.verdict import Verdict

Frames: TypeAlias = list[Image.Image] | np.ndarray | Tensor
"""A video: list of F images ("pil"), array (F, H, W, 3) ("np") or tensor (F, 3, H, W) ("pt"), floats in [0, 1]."""


class FirstFrame(Image.Image):
    """The first frame of a list of frames, and, as a sequence, all of them.

    So `export_to_video(out.frames[0], FILE)` writes the video, as after a pipeline of diffusers, whose `frames` holds a
    list of videos.
    """

    video: list[Image.Image]

    @classmethod
    def of(cls, video: list[Image.Image]) -> list[Image.Image]:
        """The same frames, the first as a `FirstFrame`."""
        first: Any = video[0].copy()
        first.__class__ = cls
        video = [first, *video[1:]]
        first.video = video
        return video

    def __getitem__(self, index: int) -> Image.Image:
        return self.video[index]

    def __len__(self) -> int:
        return len(self.video)


@dataclass(frozen=True)
class Before:
    """The video with the LoRA as it was at first, and the Teacher's P(Yes) of each query and loss L_VQA on it."""

    frames: Frames
    p_yes: list[float]
    loss: float


@dataclass(repr=False)
class TeacherPipelineOutput:
    """The result of a call. `out[0]` is `out.frames`, as in diffusers' outputs.

    Attributes:
        frames, frames_before: the final video with the trained LoRA, and the video with the LoRA as it was at first,
            from the same noise. The latter, and the Teacher's answers about it, are made when they are asked for, if
            the call has not made them, by the pipeline's models as they are then.
        history: one row per step (see `Optimization`). updates: of the LoRA.
        stopped: "threshold", "max_steps" or "diverged" (the LoRA is then the best one before the divergence).
        p_yes_before, p_yes_after: the Teacher's P(Yes) of each query, goal first, on the two videos.
        loss_before, loss_after: the Teacher's loss L_VQA on the two videos.
        sample: index of `frames` among the `final_samples` videos; 0 has the noise of `frames_before`.
        seconds: wall time of each part of the call.
        config: settings, size, sampling and seed of the call.
        models: names of the models.
        fps: frames per second of the videos.
        lora: the bytes of lora.safetensors.
        predictions: by step, for some steps and the last one, up to 8 frames of the one-step prediction that the
            Teacher saw, side by side: (h, w, 3) uint8.
        memory: bytes of the peak so far at the end of each part (see `placement.peak_memory`).
        attention: the Reasoner's: "native", or those of torch in the order in which it tries them.
        verdict: "solved", "improved", "unchanged" or "worse" by the final video, what got worse and what to try.
        cut_tokens: number of tokens of each text beyond the limit of the Reasoner's text encoder.
        rewards: of one's own: their "weights", their losses "before" and "after" by name, and the objective with them,
            "objective_before" and "objective_after"; None without rewards.
        warm_start: the earlier instance that was compared with a fresh LoRA ("from", or "mean"), its "similarity", the
            losses of both before the first update, and whether it was "taken"; None where there was none.
        make_before: gives the video from before. before_made: whether it has been made.
    """

    frames: Frames
    prompt: str
    queries: QuerySet
    history: list[dict[str, Any]]
    stopped: Stopped
    updates: int
    p_yes_after: list[float]
    loss_after: float
    sample: int
    seconds: dict[str, float]
    config: dict[str, Any]
    models: dict[str, str]
    fps: float
    lora: bytes
    make_before: Callable[[], Before] = field(repr=False)
    cut_tokens: dict[str, int] = field(default_factory=dict)
    rewards: dict[str, Any] | None = None
    predictions: dict[int, np.ndarray] = field(default_factory=dict, repr=False)
    memory: dict[str, int] = field(default_factory=dict)
    warm_start: dict[str, Any] | None = None
    attention: str = ""

    @cached_property
    def _before(self) -> Before:
        return self.make_before()

    @property
    def before_made(self) -> bool:
        return "_before" in vars(self)

    @property
    def frames_before(self) -> Frames:
        return self._before.frames

    @property
    def p_yes_before(self) -> list[float]:
        return self._before.p_yes

    @property
    def loss_before(self) -> float:
        return self._before.loss

    @property
    def verdict(self) -> Verdict:
        return Verdict.of(self._content())

    def __getitem__(self, key: int | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else (self.frames,)[key]

    def __repr__(self) -> str:
        frames, height, width, _ = self.uint8(self.frames).shape
        first, losses = "", f"{self.loss_after:.3f}"
        if self.before_made:
            losses = f"{self.loss_before:.3f} -> {losses}"
            first = " ".join(f"{p:.2f}" for p in self.p_yes_before) + " -> "
        after = " ".join(f"{p:.2f}" for p in self.p_yes_after)
        outcome = Verdict.of(self._content(self.before_made)).outcome
        return (
            f"{type(self).__name__}({outcome}: {frames} frames of {width}x{height}; {self.updates} updates,"
            f" {self.stopped}; loss {losses}; P(Yes) {first}{after})"
        )

    def _repr_html_(self) -> str:
        """Both videos and P(Yes) of the questions, for a notebook."""
        before, after = self.uint8(self.frames_before), self.uint8(self.frames)
        return as_html(self._content(True), self.verdict.outcome, before, after, self.fps)

    def record(self) -> dict[str, Any]:
        """The content of run.json, without the version."""
        return {**self._content(), "verdict": self.verdict.to_dict()}

    def _content(self, with_before: bool | None = None) -> dict[str, Any]:
        """The entries of run.json; with_before: with those of the video from before, by default as `config` says."""
        first = self._before if (self.config["before"] if with_before is None else with_before) else None
        return {
            "prompt": self.prompt,
            "config": self.config,
            "queries": self.queries.to_dict(),
            "steps": self.history,
            "stopped": self.stopped,
            "updates": self.updates,
            "p_yes_before": first and first.p_yes,
            "p_yes_after": self.p_yes_after,
            "loss_before": first and first.loss,
            "loss_after": self.loss_after,
            "sample": self.sample,
            "seconds": self.seconds,
            "models": self.models,
            "cut_tokens": self.cut_tokens,
            **({} if self.rewards is None else {"rewards": self.rewards}),
            "fps": self.fps,
            "memory": self.memory,
            "attention": self.attention,
            "predictions": [*self.predictions],
            **({} if self.warm_start is None else {"warm_start": self.warm_start}),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a run folder: before.mp4, after.mp4, lora.safetensors and its README.md, queries.json, run.json,
        report.html.

        Raises InputError when `path` cannot be written to or already holds a run, OutputError when the disk is full.
        """
        with claimed(checked(path)):
            folder = RunFolder(path)
            folder.begin(self.record())
            self.finish(folder)

    def finish(self, folder: RunFolder) -> None:
        """Write the results to the folder of a run that has begun (see `RunFolder.finish`)."""
        before = self.uint8(self.frames_before) if self.config["before"] else None
        folder.finish(self.record(), before, self.uint8(self.frames), self.fps, self.lora, self.predictions)

    @staticmethod
    def uint8(frames: Frames) -> np.ndarray:
        """A video of any output type as an array (F, H, W, 3) uint8."""
        if isinstance(frames, Tensor):
            frames = frames.permute(0, 2, 3, 1).float().cpu().numpy()
        if isinstance(frames, np.ndarray):
            return (frames * 255).round().clip(0, 255).astype(np.uint8)
        return np.stack([np.asarray(frame) for frame in frames])


class TeacherPipelineOutputs(list[TeacherPipelineOutput]):
    """The results of a call with several instances; `frames` is the list of their videos, as in diffusers' outputs."""

    @property
    def frames(self) -> list[Frames]:
        return [output.frames for output in self]


def convert(video: Tensor, output_type: Literal["pil", "np", "pt"]) -> Frames:
    """A video (F, 3, H, W) in [0, 1] as the output type."""
    if output_type == "pt":
        return video
    if output_type == "np":
        return video.permute(0, 2, 3, 1).float().cpu().numpy()
    return FirstFrame.of([Image.fromarray(frame) for frame in TeacherPipelineOutput.uint8(video)])
