"""The loop of test-time optimisation, which can be stopped after any step and resumed."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from vlmteacher.errors import InputError, NonFiniteError, NonFiniteFrames, OutOfMemory, first_line
from vlmteacher.interruption import raise_lost, uninterrupted
from vlmteacher.lora.adapter import load_lora_state, lora_parameters, lora_state_dict
from vlmteacher.media import STRIP, strip_indices
from vlmteacher.optimization import divergence
from vlmteacher.optimization.engines import make_engine
from vlmteacher.optimization.memory_ladder import MemoryLadder
from vlmteacher.optimization.objective import Objective
from vlmteacher.optimization.out_of_memory import is_out_of_memory
from vlmteacher.settings import Settings
from vlmteacher.state import check_like, load_optimizer

if TYPE_CHECKING:
    from vlmteacher.decoders.taehv import SurrogateDecoder
    from vlmteacher.queries import QuerySet
    from vlmteacher.reasoners.base import Reasoner
    from vlmteacher.reasoners.condition import Condition, Noise
    from vlmteacher.rewards import Rewards
    from vlmteacher.teachers.base import Teacher

log = logging.getLogger(__name__)
T = TypeVar("T")
KEPT_STEPS = (0, 5, 10)  # whose predictions are kept to be shown, beside the latest
Stopped = Literal["threshold", "max_steps", "diverged"]


@dataclass
class Evaluation:
    """The outcome of evaluating the present LoRA, before a step changes anything.

    row: the step's row of the history; its "grad_norm" is None when no update is to follow. good_enough: whether the
    loss, and with `check_final` the final video's, is at most the threshold. divergence: why the run has diverged.
    """

    row: dict[str, Any]
    good_enough: bool = False
    divergence: str | None = None


class Optimization:
    """Test-time optimisation of the LoRA on `reasoner.transformer` for one instance (method, Algorithm 1, step 3).

    Iterating yields the history row of each step until `stopped` is set; `step()` does one. A row is
    `{"step", "loss", "p_yes": [1+M floats], "grad_norm": float | None, "guards": {...}, "seconds"}`; loss and P(Yes)
    are measured before the step's update, and grad_norm is None where no update followed; "out_of_memory" names the
    rungs (`MemoryLadder`) that the step took, "rewards" the loss of each reward. Nothing in a step is random, so that
    `state_dict()` / `load_state_dict()` between any two steps change no bit of the result.

    A run diverges when, after an update, a number of a step is not finite, the gradient is exactly 0, the loss stays
    far above its start, or the frames become one colour (`divergence.py`). The step then goes back to the best LoRA so
    far with a fresh optimiser at half the learning rate; its row says why ("rolled_back") and the new "learning_rate".
    The second time the run ends there: `stopped` is "diverged".

    predictions: film strips (h, w, 3) uint8 of the one-step predictions at `KEPT_STEPS` and the latest step, by step.
    best: the lowest loss at a step without signs of divergence, and its LoRA. first_contrast: the frames' contrast
    before the first update. warm_start: the earlier instance's LoRA that a `Session` compared with the fresh one, both
    losses, and whether it was "taken"; None without one. make_room: moves to main memory the networks that no step
    needs; called when memory runs out. Call `close()` at the end.
    """

    # Parts of the objective that callbacks read (`TeacherPipeline.loop`).
    reasoner = property(attrgetter("objective.reasoner"))
    decoder = property(attrgetter("objective.decoder"))
    teacher = property(attrgetter("objective.teacher"))
    condition = property(attrgetter("objective.condition"))
    noise = property(attrgetter("objective.noise"))
    queries = property(attrgetter("objective.queries"))
    frame_indices = property(attrgetter("objective.frame_indices"))
    parameters = property(attrgetter("objective.parameters"))
    final_video = property(attrgetter("objective.final_video"))

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
        rewards: Rewards | None = None,
        frame_indices: Sequence[int] | None = None,
    ) -> None:
        self.settings, self.transformer = settings, reasoner.transformer
        self.objective = Objective(
            reasoner, decoder, teacher, condition, noise, queries, settings, rewards, frame_indices
        )
        self.optimizer = torch.optim.AdamW(
            self.objective.parameters,
            lr=settings.learning_rate,
            weight_decay=settings.lora_decay,
            capturable=settings.engine == "cuda_graph",
        )
        self.history: list[dict[str, Any]] = []
        self.best: tuple[float, dict[str, Tensor]] | None = None
        self.first_contrast: float | None = None
        self.predictions: dict[int, Tensor] = {}
        self.warm_start: dict[str, Any] | None = None
        self.stopped: Stopped | None = None if settings.max_steps else "max_steps"
        self.engine = make_engine(settings.engine, self.objective, self.optimizer)
        self.ladder = MemoryLadder(self.objective, make_room)

    @property
    def updates(self) -> int:
        """How often the LoRA was updated."""
        return sum(row["grad_norm"] is not None for row in self.history)

    @property
    def starts_warm(self) -> bool:
        """Whether the first LoRA already changes the Reasoner."""
        return self.warm_start is not None and bool(self.warm_start["taken"])

    def look(self) -> float:
        """The loss of the present LoRA, without a step. Raises OutOfMemory."""

        def evaluate() -> float:
            with torch.no_grad():
                return self.objective.read(self.objective.evaluate()[1]).loss

        return self._within_memory(evaluate)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.stopped is None:
            raise_lost()
            yield self.step()

    def step(self) -> dict[str, Any]:
        """Evaluate the one-step prediction; stop if it is good enough, else update the LoRA. Returns the step's row.

        Raises NonFiniteError and OutOfMemory; the state is then what it was before the step.
        """
        start, rungs = time.perf_counter(), len(self.ladder.taken)
        self.ladder.start()
        with ExitStack() as undo:
            try:
                evaluation = self._evaluate()
            except NonFiniteError as error:
                if self.best is None:
                    raise
                evaluation = Evaluation({}, divergence=divergence.reason(error))
            if evaluation.divergence and self.best is not None:
                undo.enter_context(self._unchanged_on_error())
                evaluation = self._roll_back(evaluation.divergence)
            elif evaluation.divergence:  # the first prediction has no gradient: no update would change anything
                evaluation.row["rolled_back"] = evaluation.divergence

            row, best = evaluation.row, self.best
            if best is None or row["loss"] < best[0]:
                best = row["loss"], self._within_memory(lambda: lora_state_dict(self.transformer))
            if evaluation.good_enough or evaluation.divergence:
                row["grad_norm"] = None
            with uninterrupted():  # an update goes with its row
                if row["grad_norm"] is not None:
                    self._within_memory(self.engine.update)
                if taken := self.ladder.taken[rungs:]:
                    row["out_of_memory"] = taken
                row["seconds"] = time.perf_counter() - start
                self.best = best
                self.history.append(row)
                if evaluation.good_enough:
                    self.stopped = "threshold"
                elif evaluation.divergence:
                    self.stopped = "diverged"
                elif len(self.history) >= self.settings.max_steps:
                    self.stopped = "max_steps"
                self._keep_prediction()
        if not self.engine.recorded:
            self.ladder.climb()
        return row

    def _keep_prediction(self) -> None:
        """Keep the film strip of this step's prediction, and of `KEPT_STEPS`; nothing is read from the device.

        Where memory is full there is none: the update is made, and a picture is not worth a rung.
        """
        if self.objective.shown is None:
            return
        self.predictions = {step: strip for step, strip in self.predictions.items() if step in KEPT_STEPS}
        try:
            self.predictions[len(self.history) - 1] = _strip(self.objective.shown)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise

    def _evaluate(self) -> Evaluation:
        """The evaluation of the present LoRA, whose gradient stays on the parameters. Raises NonFiniteError."""
        step = len(self.history)
        metrics = self._within_memory(lambda: self.engine.evaluate(step))
        divergence.check_finite(metrics, step)
        row: dict[str, Any] = {"step": step, "loss": metrics.loss, "p_yes": metrics.p_yes}
        if self.objective.rewards:
            row["rewards"] = self.objective.rewards.named(metrics.rewards)
        good_enough = metrics.loss <= self.settings.threshold
        if good_enough and self.settings.check_final:
            try:
                row["final_loss"] = self._within_memory(self.objective.final_loss)
            except NonFiniteFrames as error:
                raise NonFiniteError(f"the few-step video of step {step}: {error}") from error
            good_enough = row["final_loss"] <= self.settings.threshold
        row["grad_norm"] = None if good_enough else metrics.grad_norm
        row["guards"] = metrics.guards
        if good_enough:
            return Evaluation(row, good_enough=True)
        divergence.check_gradient(metrics, step)
        if self.first_contrast is None:
            self.first_contrast = metrics.contrast
        losses = [earlier["loss"] for earlier in self.history]
        why = divergence.diagnose(metrics, losses, self.settings.threshold, self.first_contrast)
        return Evaluation(row, divergence=why)

    def _roll_back(self, why: str) -> Evaluation:
        """Evaluate the best LoRA so far again, with a fresh optimiser and half the learning rate.

        The result's `divergence` is set where this is the end: the run had gone back before, or going back has not
        helped. Raises NonFiniteError where the best LoRA's numbers are not finite any more: something else has broken.
        """
        again = any("rolled_back" in row for row in self.history)
        self._take_best()
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = rate = group["lr"] / 2
        self.engine.reset()
        evaluation = self._evaluate()
        if again and not evaluation.good_enough:
            evaluation.divergence = why
        evaluation.row["rolled_back"] = why
        if not (evaluation.good_enough or evaluation.divergence):
            evaluation.row["learning_rate"] = rate
        then = "the end" if evaluation.divergence else f"learning rate {rate:g}"
        log.warning("step %d: %s: back to the best LoRA so far, %s", len(self.history), why, then)
        return evaluation

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        """Restore the state of before when an error or an interruption ends the step."""
        before = self.state_dict()
        try:
            yield
        except BaseException:
            if len(self.history) == len(before["history"]):
                self.load_state_dict(before)
            raise

    def _take_best(self) -> None:
        assert self.best is not None
        load_lora_state(self.transformer, self.best[1])

    def _within_memory(self, work: Callable[[], T]) -> T:
        """`work()`, which changes no state, again and again down the ladder until the memory suffices."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                why = first_line(error)
            # Here the error is gone, and with its traceback the tensors of the step.
            rung = self.ladder.down() if self.reasoner.ranks.size == 1 else None  # which the other ranks would not take
            if rung is None:
                taken = ", ".join(self.ladder.taken) or "nothing that could be smaller"
                raise OutOfMemory(
                    f"step {len(self.history)} does not fit in memory ({why}), with {taken}: give fewer or smaller"
                    " frames, a smaller or quantized Teacher, or offload; `vlmteacher plan` says what fits"
                )
            log.warning("step %d: out of memory (%s): again with %s", len(self.history), why, rung)
            self.engine.reset()

    def flatness(self, contrast: float) -> str | None:
        """Why frames of this `frame_contrast` have lost the picture that the first ones had, or None."""
        return divergence.collapse(contrast, self.first_contrast or 0.0)

    def last_divergence(self) -> str | None:
        """Why the last update, which no step has evaluated, has led to divergence, or None."""
        self.objective.parameters = lora_parameters(self.transformer)  # sampling may have moved them
        try:
            return self._evaluate().divergence
        except NonFiniteError as error:
            return divergence.reason(error)

    def diverge(self, why: str | NonFiniteFrames) -> None:
        """End as diverged after the last step, because the final video shows it; the LoRA is the best one again."""
        why = divergence.reason(why)
        self._take_best()
        self.history[-1]["rolled_back"] = why
        self.stopped = "diverged"
        log.warning("after step %d: %s: back to the best LoRA so far, the end", self.history[-1]["step"], why)

    def finish(self) -> None:
        """Leave on the transformer the LoRA that `settings.keep` asks for."""
        if self.settings.keep == "best" and self.best is not None:
            self._take_best()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the coming steps depend on; `torch.load(weights_only=True)` takes it."""
        return {
            "lora": lora_state_dict(self.transformer),
            "optimizer": None if self.stopped == "threshold" else copy.deepcopy(self.optimizer.state_dict()),
            "history": copy.deepcopy(self.history),
            "best": self.best,
            "anchor": self.objective.anchor,
            "statistics": self.objective.statistics,
            "first_contrast": self.first_contrast,
            "stopped": self.stopped,
            "rungs": list(self.ladder.taken),
            "warm_start": self.warm_start,
            "predictions": {step: strip.cpu() for step, strip in self.predictions.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume a run of the same instance and settings where `state_dict()` left it; `max_steps` may be higher now.

        Raises InputError for tensors of another shape or dtype, and KeyError or the like when `state` is not a state.
        """
        load_lora_state(self.transformer, state["lora"])
        if state["optimizer"] is not None:
            load_optimizer(self.optimizer, state["optimizer"])
            self.engine.reset()  # a recorded update reads the old state's memory
        self.history = copy.deepcopy(state["history"])
        if [row["step"] for row in self.history] != [*range(len(self.history))]:
            raise InputError("its history lacks steps")
        self.best, self.stopped, anchor = state["best"], state["stopped"], state["anchor"]
        for name, value in self.best[1].items() if self.best else ():
            check_like(value, state["lora"][name], f"its best {name}")
        self.first_contrast = state["first_contrast"]
        if self.stopped in (None, "max_steps"):
            self.stopped = None if len(self.history) < self.settings.max_steps else "max_steps"
        if anchor is not None:
            latents = self.objective.reasoner.video(self.objective.noise.z1, self.objective.condition)
            anchor = anchor.to(latents)  # a file's tensors are on the CPU
            check_like(anchor, latents, "its anchor")
        self.objective.anchor = anchor
        statistics = state.get("statistics")  # earlier versions kept none
        if statistics is not None:
            statistics = statistics.to(self.objective.noise.z1.device)
            check_like(statistics, torch.empty(len(self.objective.frame_indices), 4, 3), "its statistics of frames")
        self.objective.statistics = statistics
        self.ladder.take(state["rungs"])
        self.warm_start = state.get("warm_start")  # earlier versions kept none
        self.predictions = dict(state.get("predictions", {}))  # earlier versions kept none
        if any(strip.dtype != torch.uint8 or strip.ndim != 3 for strip in self.predictions.values()):
            raise InputError("its predictions are no pictures")

    def close(self) -> None:
        """Restore the models, but for the LoRA."""
        self.ladder.restore()
        self.engine.close()


def _strip(frames: Tensor) -> Tensor:
    """The film strip (h, w, 3) uint8 of frames (K, 3, h, w) in [0, 1]."""
    chosen = frames[strip_indices(len(frames), STRIP)].clamp(0, 1).mul(255).round().to(torch.uint8)
    return torch.cat([*chosen.permute(0, 2, 3, 1)], dim=1)
