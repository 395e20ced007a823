"""The loop of test-time optimisation, as an object that can be stopped after any step and taken up again."""

from __future__ import annotations

import copy
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from vlmteacher.errors import InputError, NonFiniteFrames, OutOfMemory
from vlmteacher.interruption import raise_lost, uninterrupted
from vlmteacher.lora.adapter import frozen_blocks, load_lora_state, lora_parameters, lora_state_dict
from vlmteacher.ops.patchify import PatchRows
from vlmteacher.optimization.engines import make_engine
from vlmteacher.optimization.guards import GUARDS, frame_contrast, frame_guards, small_frames
from vlmteacher.optimization.memory_ladder import MemoryLadder, is_out_of_memory
from vlmteacher.optimization.reward import pick, vqa_objective
from vlmteacher.reasoners.frozen_front import FrozenFront
from vlmteacher.settings import Settings
from vlmteacher.state import check_like, load_optimizer
from vlmteacher.teachers.base import check_range

if TYPE_CHECKING:
    from vlmteacher.decoders.taehv import SurrogateDecoder
    from vlmteacher.queries import QuerySet
    from vlmteacher.reasoners.base import Reasoner
    from vlmteacher.reasoners.condition import Condition, Noise
    from vlmteacher.teachers.base import Teacher

GRADIENT_CLIP = 1.0
REMEDY = "try a lower learning rate or another dtype"
DIVERGED_RISE = math.log(5)  # of the loss above its start: the P(Yes) of the questions have fallen to a fifth
WORSE = 0.1  # a rise of the final video's loss that makes the last update worth another look
DIVERGED_LOOKS = 5  # in a row; a healthy run rises so far at single steps only (docs/step.md)
FLAT_CONTRAST = 0.5 / 255  # standard deviation of frames that 8 bits show as one colour
SEEN_CONTRAST = 4 * FLAT_CONTRAST  # frames of less were nearly blank before: no collapse
log = logging.getLogger(__name__)
T = TypeVar("T")
Stopped = Literal["threshold", "max_steps", "diverged"]


class NonFiniteError(ArithmeticError):
    """The loss or its gradient is not a finite number and no earlier LoRA is a remedy: the run stands before that step.

    Where an update was made before, `Optimization.step` goes back to the best LoRA instead.
    """


def teacher_frame_indices(num_frames: int, count: int) -> list[int]:
    """`count` frame indices spread uniformly over 0..num_frames-1, both ends included, strictly rising.

    Raises InputError when there are fewer frames than asked for.
    """
    if not 1 <= count <= num_frames:
        raise InputError(f"the Teacher cannot see {count} frames of a video of {num_frames}: give 1 to {num_frames}")
    return [round(k * (num_frames - 1) / max(count - 1, 1)) for k in range(count)]


def _cause(error: object) -> str:
    """What went wrong, without the remedy that rolling back is."""
    return str(error).removesuffix(f": {REMEDY}")


class Optimization:
    """Test-time optimisation of the LoRA on `reasoner.transformer` for one instance (method, Algorithm 1, step 3).

    Iterating yields the history row of each step until `stopped` is set; `step()` does one. A row is
    `{"step", "loss", "p_yes": [1+M floats], "grad_norm": float | None, "guards": {...}, "seconds"}`; loss and P(Yes)
    are measured before the step's update, and grad_norm is None where no update followed; "out_of_memory" names the
    rungs (`MemoryLadder`) that the step took. Nothing in a step is drawn at random, so that `state_dict()` /
    `load_state_dict()` between any two steps change no bit of the result.

    A run diverges when, after an update, a number of a step is not finite, the gradient is exactly 0, the loss stays
    `DIVERGED_RISE` above its start for `DIVERGED_LOOKS` steps, or the frames become one colour. The step then goes back
    to the best LoRA so far with a fresh optimiser at half the learning rate; its row says why ("rolled_back") and the
    new "learning_rate". The second time the run ends there: `stopped` is "diverged".

    make_room: moves to main memory what no step needs, where memory runs out. `close()` when it is not used any more.
    """

    def __init__(
        self,
        reasoner: Reasoner,
        decoder: SurrogateDecoder,
        teacher: Teacher,
        condition: Condition,
        noise: Noise,
        queries: QuerySet,
        settings: Settings,
        make_room: Callable[[], object] = lambda: None,
    ) -> None:
        self.reasoner, self.decoder, self.teacher = reasoner, decoder, teacher
        self.condition, self.noise, self.queries, self.settings = condition, noise, queries, settings
        self.frame_indices = teacher_frame_indices(condition.num_frames, settings.teacher_frames)
        self.parameters = list(lora_parameters(reasoner.transformer))
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            weight_decay=settings.lora_decay,
            capturable=settings.engine == "cuda_graph",
        )
        self.history: list[dict[str, Any]] = []
        self.best: tuple[float, dict[str, Tensor]] | None = None  # the lowest loss that was sound, and its LoRA
        self.first_contrast: float | None = None  # `frame_contrast` before the first update
        self.stopped: Stopped | None = None if settings.max_steps else "max_steps"
        self.decoder_chunk: int | None = None
        self.offload = False  # of what the Reasoner saves for the backward, to pinned host memory
        self.anchor: Tensor | None = None  # the latents before the first update, where there is a pull to them
        frozen = frozen_blocks(reasoner.transformer, settings.lora_blocks)
        if settings.target != "first_step":  # later predictions have other inputs at every step
            frozen = 0
        self.front: AbstractContextManager[object] = (
            FrozenFront(reasoner.transformer, frozen) if frozen else nullcontext()
        )
        self.ladder = MemoryLadder(self, make_room)
        self.engine = make_engine(settings.engine, self)

    @property
    def updates(self) -> int:
        """How often the LoRA was updated."""
        return sum(row["grad_norm"] is not None for row in self.history)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.stopped is None:
            raise_lost()
            yield self.step()

    def look(self) -> tuple[Tensor, Tensor]:
        """(what is to fall, what the host wants to know of the step), nothing read from the device.

        The first is the Teacher's loss on the prediction, and the pull. The second is (10 + 1+M,) float32: the loss
        alone, whether the latents hold NaN, the frames' extremes, `GUARDS`, the frames' contrast, P(Yes) of each query.
        """
        offload: Any = torch.autograd.graph.save_on_cpu(pin_memory=True) if self.offload else nullcontext()
        with offload, self.front:
            latents = self.reasoner.predict_target(self.condition, self.noise, self.settings.target)
        frames = self._decode(latents)
        looked_at = self._jittered(frames) if self.settings.frame_jitter else frames
        losses = self.teacher.losses(looked_at, self.frame_indices, self.reasoner.fps, self.queries, check=False)
        loss = vqa_objective(losses, self.settings.goal_weight)
        with torch.no_grad():
            small = small_frames(frames)
            guards, contrast = frame_guards(small), frame_contrast(small)
            seen = (latents.isnan().any(), *frames.aminmax(), guards, contrast, losses.neg().exp())
            facts = torch.cat([each.to(loss.device, torch.float32).view(-1) for each in (loss, *seen)])
        if self.settings.pull:
            if self.anchor is None:
                self.anchor = latents.detach()
            loss = loss + self.settings.pull * (latents - self.anchor).square().mean().to(loss)
        return loss, facts

    def _jittered(self, frames: Tensor | PatchRows) -> Tensor:
        """The frames (K, 3, H, W) shifted as the step's number says, edges repeated."""
        assert isinstance(frames, Tensor)  # see `_decode`
        most = self.settings.frame_jitter
        draw = random.Random(len(self.history))
        down, across = (most + draw.randint(-most, most) for _ in range(2))
        padded = torch.nn.functional.pad(frames, (most,) * 4, mode="replicate")
        return padded[..., down : down + frames.shape[-2], across : across + frames.shape[-1]]

    def differentiate(self, loss: Tensor, facts: Tensor) -> Tensor:
        """Leave the clipped gradient of `loss` on the parameters; `facts` with its norm before clipping at the end."""
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
        return torch.cat([facts, norm.to(facts).view(1)])

    def needs_gradient(self, facts: Sequence[float]) -> bool:
        """Whether an update can follow a look with these facts."""
        return facts[0] > self.settings.threshold or self.settings.check_final

    def step(self) -> dict[str, Any]:
        """Look at the one-step prediction through the Teacher; stop if it is good enough, else update the LoRA.

        Raises NonFiniteError and OutOfMemory; the state is then what it was before the step.
        """
        start, rungs = time.perf_counter(), len(self.ladder.taken)
        with ExitStack() as undo:
            diverged = False
            try:
                row, stop, why = self._assess()
            except NonFiniteError as error:
                if self.best is None:
                    raise
                stop, why = False, _cause(error)
            if why and self.best is not None:
                undo.enter_context(self._whole_or_not_at_all())
                row, stop, diverged = self._roll_back(why)
            elif why:  # the first prediction has no gradient: no update would change anything
                row["rolled_back"], diverged = why, True

            best = self.best
            if best is None or row["loss"] < best[0]:
                best = row["loss"], self._within_memory(lambda: lora_state_dict(self.reasoner.transformer))
            if stop or diverged:
                row["grad_norm"] = None
            with uninterrupted():  # an update goes with its row
                if row["grad_norm"] is not None:
                    self._within_memory(self.engine.update)
                if taken := self.ladder.taken[rungs:]:
                    row["out_of_memory"] = taken
                row["seconds"] = time.perf_counter() - start
                self.best = best
                self.history.append(row)
                if stop:
                    self.stopped = "threshold"
                elif diverged:
                    self.stopped = "diverged"
                elif len(self.history) >= self.settings.max_steps:
                    self.stopped = "max_steps"
        return row

    def _assess(self) -> tuple[dict[str, Any], bool, str | None]:
        """The row of a look, whether it is good enough to stop, and else what shows that the run has diverged.

        Changes no LoRA. Raises NonFiniteError.
        """
        facts = self._within_memory(self.engine.facts)
        loss, contrast, number = facts[0], facts[9], len(self.history)
        row: dict[str, Any] = {"step": number, "loss": loss, "p_yes": facts[10 : 11 + len(self.queries.process)]}
        self._check(row, nan=bool(facts[1]), extremes=facts[2:4])
        stop = loss <= self.settings.threshold
        if stop and self.settings.check_final:
            try:
                row["final_loss"] = self._within_memory(self._final_loss)
            except NonFiniteFrames as error:
                raise NonFiniteError(f"the few-step video of step {number}: {error}") from error
            stop = row["final_loss"] <= self.settings.threshold
        row["grad_norm"] = None if stop else facts[-1]
        row["guards"] = dict(zip(GUARDS, facts[4:9], strict=True))
        if stop:
            return row, True, None
        if not math.isfinite(facts[-1]):
            raise NonFiniteError(f"the gradient of step {number} is not finite: {REMEDY}")
        if self.first_contrast is None:
            self.first_contrast = contrast
        return row, False, self._divergence(loss, facts[-1], contrast)

    def _divergence(self, loss: float, grad_norm: float, contrast: float) -> str | None:
        """What shows, of finite numbers, that the updates have led nowhere."""
        number = len(self.history)
        if grad_norm == 0 and loss > self.settings.threshold:
            return f"the gradient of step {number} is exactly 0"
        if not self.history:
            return None
        losses = [*(row["loss"] for row in self.history[1 - DIVERGED_LOOKS :]), loss]
        if len(losses) == DIVERGED_LOOKS and min(losses) > self.history[0]["loss"] + DIVERGED_RISE:
            return f"the loss is far above its start for {DIVERGED_LOOKS} steps"
        return self.flatness(contrast)

    def flatness(self, contrast: float) -> str | None:
        """What there is to say of frames of this contrast when they have lost the picture that the first ones had."""
        if contrast < FLAT_CONTRAST and (self.first_contrast or 0.0) >= SEEN_CONTRAST:
            return "the frames have become one colour"
        return None

    @contextmanager
    def _whole_or_not_at_all(self) -> Iterator[None]:
        """A step that an error or an interruption ends leaves everything as it was before."""
        before = self.state_dict()
        try:
            yield
        except BaseException:
            if len(self.history) == len(before["history"]):
                self.load_state_dict(before)
            raise

    def _roll_back(self, why: str) -> tuple[dict[str, Any], bool, bool]:
        """Look again with the best LoRA so far, a fresh optimiser and half the learning rate.

        Returns the row, whether it is good enough, and whether this is the end. Raises NonFiniteError where the best
        LoRA's numbers are not finite any more: something else has broken.
        """
        again = any("rolled_back" in row for row in self.history)
        self._take_best()
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = rate = group["lr"] / 2
        self.engine.reset()
        row, stop, still = self._assess()
        diverged = not stop and (again or still is not None)
        row["rolled_back"] = why
        if not (stop or diverged):
            row["learning_rate"] = rate
        then = "the end" if diverged else f"learning rate {rate:g}"
        log.warning("step %d: %s: back to the best LoRA so far, %s", row["step"], why, then)
        return row, stop, diverged

    def last_divergence(self) -> str | None:
        """What one more look says of the last update, which no step looks at."""
        self.parameters = list(lora_parameters(self.reasoner.transformer))  # sampling may have moved them elsewhere
        try:
            return self._assess()[2]
        except NonFiniteError as error:
            return _cause(error)

    def diverge(self, why: str | NonFiniteFrames) -> None:
        """End as diverged after all, where the video of the last update shows it: the LoRA is the best one."""
        why = _cause(why)
        self._take_best()
        self.history[-1]["rolled_back"] = why
        self.stopped = "diverged"
        log.warning("after step %d: %s: back to the best LoRA so far, the end", self.history[-1]["step"], why)

    def _take_best(self) -> None:
        assert self.best is not None
        load_lora_state(self.reasoner.transformer, self.best[1])

    def _decode(self, latents: Tensor) -> Tensor | PatchRows:
        """What the Teacher sees: where it would not resize the frames, its own patch rows right from the decoder.

        What is still to be shifted must be frames.
        """
        height, width = (side * self.decoder.spatial_stride for side in latents.shape[-2:])
        layout = self.teacher.patch_layout(len(self.frame_indices), height, width)
        if layout is None or self.settings.frame_jitter:
            return self.decoder.decode(latents, self.frame_indices, self.decoder_chunk, check=False)
        return self.decoder.decode_rows(latents, layout, self.frame_indices, self.decoder_chunk, check=False)

    def _check(self, row: dict[str, Any], nan: bool, extremes: Sequence[float]) -> None:
        if nan:
            raise NonFiniteError(f"the prediction of step {row['step']} holds NaN: {REMEDY}")
        try:
            check_range(*extremes)
        except NonFiniteFrames as error:
            raise NonFiniteError(f"step {row['step']}: {error}") from error
        if not math.isfinite(row["loss"]):
            raise NonFiniteError(f"the loss of step {row['step']} is {row['loss']}: {REMEDY}")

    def _within_memory(self, work: Callable[[], T]) -> T:
        """`work()`, which changes no state, again and again down the ladder as long as the memory does not suffice."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            # Here the error is gone, and with its traceback the tensors of the step.
            if not self.ladder.down(why):
                taken = ", ".join(self.ladder.taken) or "nothing that could be smaller"
                raise OutOfMemory(
                    f"step {len(self.history)} does not fit in memory ({why}), with {taken}: give fewer or smaller"
                    " frames, a smaller or quantized Teacher, or offload; `vlmteacher plan` says what fits"
                )
            self.engine.reset()

    @torch.no_grad()
    def final_video(self) -> tuple[Tensor, Tensor]:
        """The few-step video (F, 3, H, W) in [0, 1] that the adapted Reasoner would give now, and its losses (1+M,)."""
        latents = [self.reasoner.sample(self.condition, noise) for noise in self.noise.samples()]
        videos = [self.reasoner.decode(each) for each in latents]
        at, fps = self.frame_indices, self.reasoner.fps
        losses = [self.teacher.losses(video[at], at, fps, self.queries) for video in videos]
        best = pick(losses, self.settings.goal_weight)
        return videos[best], losses[best]

    def _final_loss(self) -> float:
        """The objective on `final_video`."""
        return vqa_objective(self.final_video()[1], self.settings.goal_weight).item()

    def finish(self) -> None:
        """Leave on the transformer the LoRA that `settings.keep` asks for."""
        if self.settings.keep == "best" and self.best is not None:
            self._take_best()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the coming steps depend on; `torch.load(weights_only=True)` takes it."""
        return {
            "lora": lora_state_dict(self.reasoner.transformer),
            "optimizer": None if self.stopped == "threshold" else copy.deepcopy(self.optimizer.state_dict()),
            "history": copy.deepcopy(self.history),
            "best": self.best,
            "anchor": self.anchor,
            "first_contrast": self.first_contrast,
            "stopped": self.stopped,
            "rungs": list(self.ladder.taken),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a run of the same instance and settings where `state_dict()` left it; it may have more steps now.

        Raises InputError for tensors of another shape or dtype, KeyError and the like for what is no state.
        """
        load_lora_state(self.reasoner.transformer, state["lora"])
        if state["optimizer"] is not None:
            load_optimizer(self.optimizer, state["optimizer"])
            self.engine.reset()  # a recorded update reads the old state's memory
        self.history = copy.deepcopy(state["history"])
        if [row["step"] for row in self.history] != [*range(len(self.history))]:
            raise InputError("its history lacks steps")
        self.best, self.stopped, self.anchor = state["best"], state["stopped"], state["anchor"]
        for name, value in self.best[1].items() if self.best else ():
            check_like(value, state["lora"][name], f"its best {name}")
        self.first_contrast = state["first_contrast"]
        if self.stopped in (None, "max_steps"):
            self.stopped = None if len(self.history) < self.settings.max_steps else "max_steps"
        if self.anchor is not None:  # read from a file it is on the CPU
            self.anchor = self.anchor.to(self.noise.z1)
            check_like(self.anchor, self.noise.z1, "its anchor")
        self.ladder.take(state["rungs"])

    def close(self) -> None:
        """Leave the models as they were, but for the LoRA."""
        self.engine.close()
        self.ladder.restore()
