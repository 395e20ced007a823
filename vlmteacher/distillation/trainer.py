"""The training loop: resumable, with a log, an average of the weights, and states that survive interruption."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from vlmteacher.distillation.kinds import check_kinds
from vlmteacher.errors import InputError, NonFiniteError
from vlmteacher.files import append_text, claimed, make_folder, remove_leftovers, write_text
from vlmteacher.interruption import raise_lost, uninterrupted
from vlmteacher.placement import peak_memory, used_memory
from vlmteacher.progress import Reporter, listening, reporting
from vlmteacher.state import check_like, load_optimizer, read_state, unusable, write_state

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE = Path("state") / "state.pt"
FORM = "vlmteacher training 1"  # of the state; another number when its content changes
LARGEST_BATCH = 2**16  # a larger one fills the memory before it fails
STATE_ROOM = 2**26  # bytes of a state file apart from its tensors
AVERAGED = "student"  # the module that is trained for use, and averaged by default


@dataclass(frozen=True)
class TrainSettings:
    """Settings of every training. Raises InputError.

    Attributes:
        steps: number of updates; a resumed run may have more than before.
        batch_size: videos per batch; an update takes `gradient_accumulation` batches.
        learning_rate: learning rate of AdamW, reached linearly in `warmup` steps and constant afterwards.
        max_grad_norm: norm to which the gradient is clipped.
        ema: decay of the moving average of the weights that is the result, below 1; 0 keeps the last weights.
        dtype: "bfloat16" runs the networks in mixed precision.
        save_every, log_every, validate_every: intervals in steps; 0 never validates.
        gradient_checkpointing: recompute the blocks' activations in the backward pass instead of keeping them.
        full: train all weights instead of a LoRA of `rank`.
    """

    steps: int = 1000
    batch_size: int = 8
    learning_rate: float = 1e-4
    gradient_accumulation: int = 1
    warmup: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema: float = 0.0
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    save_every: int = 100
    log_every: int = 10
    validate_every: int = 0
    gradient_checkpointing: bool = False
    full: bool = False
    rank: int = 32

    def __post_init__(self) -> None:
        check_kinds(self)
        least = {"steps": 1, "batch_size": 1, "gradient_accumulation": 1, "save_every": 1, "log_every": 1, "rank": 1}
        for name, low in (least | {"warmup": 0, "validate_every": 0, "seed": 0}).items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise InputError(f"{name} must be a whole number of at least {low}, not {value}")
        if self.batch_size > LARGEST_BATCH:
            raise InputError(f"batch_size must be at most {LARGEST_BATCH}, not {self.batch_size}: accumulate gradients")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and value > 0 and math.isfinite(value)):
                raise InputError(f"{name} must be greater than 0, not {value}")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema must lie between 0 and 1, not {self.ema}")
        if self.weight_decay < 0:
            raise InputError(f"weight_decay must not be negative, not {self.weight_decay}")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype must be float32 or bfloat16, not {self.dtype!r}")


@contextmanager
def training_folder(out: Path, resume: bool, accelerator: Accelerator) -> Iterator[None]:
    """Lock `out` for a training (see `claimed` and `check_out`); of several processes the main one holds the lock."""
    with claimed(out) if accelerator.is_main_process else nullcontext():
        check_out(out, resume)
        for folder in ((out / STATE).parent, out / "samples", out / "cache"):
            if accelerator.is_main_process and folder.is_dir():
                remove_leftovers(folder)
        yield


def check_out(out: Path, resume: bool) -> None:
    """Raise InputError if `out` holds a training and `resume` is not set, or no training and it is."""
    exists = (out / STATE).exists()
    if resume and not exists:
        raise InputError(f"{out} holds no training to resume: leave out --resume")
    if exists and not resume:
        raise InputError(f"{out} already holds a training: give another --out, or --resume to continue it")


class OtherSettings(InputError):
    """A training was resumed with settings other than its own."""


class Trainer:
    """Runs a training in the folder `out`; a training that is stopped and resumed gives the same result.

    ``state/state.pt`` holds all state; it is replaced atomically, every `save_every` steps and when the training is
    interrupted. ``log.jsonl`` has a row every `log_every` steps with the mean of each metric over the steps that report
    it, ``validation.jsonl`` a row every `validate_every` steps.

    Args:
        out: folder to write to.
        modules: the modules that change, by name.
        optimizers: the optimizers of these modules, by name.
        settings: what a resumed run must share, JSON values by name, those of `TrainSettings` among them.
        accelerator: only its main process writes.
        schedule: ``schedule(step)`` is the factor of the learning rates; by default it rises linearly to 1 in
            `warmup` steps.
        averaged: the parameters whose exponential moving average is kept where `ema` is set; by default those of the
            module ``student``.
        average_warmup: the decay of the average after step n is at most ``n / (n + average_warmup)``.
    """

    def __init__(
        self,
        out: Path,
        modules: dict[str, nn.Module],
        optimizers: dict[str, torch.optim.Optimizer],
        settings: dict[str, Any],
        accelerator: Accelerator,
        *,
        schedule: Callable[[int], float] | None = None,
        averaged: Sequence[nn.Parameter] | None = None,
        average_warmup: int = 10,
    ) -> None:
        self.out, self.modules, self.optimizers, self.accelerator = out, modules, optimizers, accelerator
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.state_file = out / STATE
        self.step = 0
        self.saved: int | None = None  # the step of the state on disk
        self.sums: dict[str, list[float]] = {}  # of each metric since the last row of the log: its sum, and its count
        self.validated = 0  # the step of the last validation
        self.rates = [group["lr"] for group in self._groups()]
        self.schedule = schedule or (lambda step: min(1.0, (step + 1) / max(self.settings["warmup"], 1)))
        self.averaged_parameters: list[nn.Parameter] = []
        if self.settings["ema"]:
            self.averaged_parameters = list(modules[AVERAGED].parameters() if averaged is None else averaged)
        self.average: list[Tensor] = [p.detach().clone() for p in self.averaged_parameters]
        self.average_warmup = average_warmup

    def _groups(self) -> list[dict[str, Any]]:
        """The optimizers' parameter groups, which `load_state_dict` replaces by new objects."""
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def resume(self) -> None:
        """Load the state in `out`.

        Raises InputError: there is none, it cannot be used, or its settings differ; the message names those.
        """
        check_out(self.out, resume=True)
        tensors = [*self.average, *(x for module in self.modules.values() for x in module.state_dict().values())]
        sizes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        state = read_state(self.state_file, FORM, limit=8 * sizes + STATE_ROOM)
        try:
            self._load(state, json.loads(state["settings"]))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, OtherSettings):
                raise
            reason = str(error).splitlines()[0] if isinstance(error, InputError) else "it is damaged"
            raise unusable(self.state_file, reason) from error
        if self.accelerator.is_main_process:
            _cut(self.out / "log.jsonl", self.step)
            _cut(self.out / "validation.jsonl", self.validated)  # which may be due again

    def _load(self, state: dict[str, Any], before: dict[str, Any]) -> None:
        names = [n for n in sorted(before | self.settings) if n != "steps" and before.get(n) != self.settings.get(n)]
        if names:
            listed = ", ".join(f"{n} ({before.get(n)}, now {self.settings.get(n)})" for n in names)
            raise OtherSettings(
                f"{self.out} was trained with other settings: {listed}; set them back or give another --out"
            )
        for name, module in self.modules.items():
            for key, value in module.state_dict().items():
                check_like(state["modules"][name][key], value, key)
            module.load_state_dict(state["modules"][name])
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, state["optimizers"][name])
        for mean, value in zip(self.average, state["average"], strict=True):
            check_like(value, mean, "a mean")
            mean.copy_(value)
        self.sums = {name: [float(total), int(count)] for name, (total, count) in state.get("sums", {}).items()}
        self.step = self.saved = int(state["step"])
        self.validated = int(state.get("validated", self.step))

    def run(
        self,
        step: Callable[[int, torch.Generator], dict[str, float]],
        steps: int,
        validate: Callable[[int], dict[str, float]] | None = None,
        save_interrupted: bool = True,
    ) -> None:
        """Call ``step(index, generator)``, which makes an update and returns metrics, until `steps` are done.

        The generator is seeded by the seed and the index. The averaged parameters end as their average.

        Args:
            validate: ``validate(step)`` returns the metrics of the averaged parameters.
            save_interrupted: save the state when interrupted; otherwise the last regular one stays.

        Raises:
            OutputError: `out` cannot be written to; the last state stays usable.
            KeyboardInterrupt: interrupted; the current step was finished and saved.
            NonFiniteError: raised by `step`; the last state stays.
        """
        settings = self.settings
        self._timed, self._since = 0.0, self.step
        with (
            nullcontext() if self.accelerator.is_main_process else listening(),
            reporting("train", steps, done=self.step, settings=settings) as advance,
            self._saved_when_interrupted() if save_interrupted else nullcontext(),
        ):
            self._validate(validate, advance)  # where it was interrupted
            while self.step < steps:
                raise_lost()
                with uninterrupted():
                    values = self._make(step)
                    if self.step % settings["log_every"] == 0 or self.step == steps:
                        self._log()
                advance({**values, **self._now()})
                self._validate(validate, advance)
                if self.step % settings["save_every"] == 0 or self.step == steps:
                    self.save()
        with torch.no_grad():
            for mean, p in zip(self.average, self.averaged_parameters, strict=True):
                p.copy_(mean)

    def _make(self, step: Callable[[int, torch.Generator], dict[str, float]]) -> dict[str, float]:
        """Make the next step; update the average, and the sums of the metrics and of the time. Returns its metrics."""
        settings = self.settings
        for group, rate in zip(self._groups(), self.rates, strict=True):
            group["lr"] = rate * self.schedule(self.step)
        began = time.perf_counter()
        try:
            values = step(self.step, torch.Generator().manual_seed(settings["seed"] * 1_000_003 + self.step))
        except NonFiniteError as error:
            kept = "nothing was saved yet" if self.saved is None else f"the state of step {self.saved} stays"
            raise NonFiniteError(f"{error}; {kept} in {self.out}: lower the learning rate") from error
        self._timed += time.perf_counter() - began
        self.step += 1
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = [total + value, count + 1]
        decay = min(settings["ema"], self.step / (self.step + self.average_warmup))
        for mean, p in zip(self.average, self.averaged_parameters, strict=True):
            mean.lerp_(p.detach(), 1 - decay)
        return values

    def _log(self) -> None:
        """Write a row of log.jsonl, and begin the next one."""
        row = {name: total / count for name, (total, count) in self.sums.items()}
        row |= self._speed(self._timed / (self.step - self._since))
        self._write("log.jsonl", row)
        self.sums, self._timed, self._since = {}, 0.0, self.step

    def _validate(self, validate: Callable[[int], dict[str, float]] | None, report: Reporter) -> None:
        """Write a row of validation.jsonl where one is due and not yet there."""
        every = self.settings["validate_every"]
        if validate and every and self.step % every == 0 and self.validated < self.step:
            with self.averaged():
                row = validate(self.step)
            self._write("validation.jsonl", row)
            report({f"validation_{name}": value for name, value in row.items()}, count=0)
            self.validated = self.step

    @contextmanager
    def _saved_when_interrupted(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            if self.step and self.step != self.saved:
                self.save()
            raise

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Replace the averaged parameters by their average inside the block."""
        last = [p.detach().clone() for p in self.averaged_parameters]
        try:
            for p, mean in zip(self.averaged_parameters, self.average, strict=True):
                p.data.copy_(mean)
            yield
        finally:
            with uninterrupted():  # a state may be saved next
                for p, value in zip(self.averaged_parameters, last, strict=True):
                    p.data.copy_(value)

    def save(self) -> None:
        """Replace the state on disk. Raises OutputError; the previous state then stays."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "average": self.average,
            "sums": self.sums,
            "validated": self.validated,
            "step": self.step,
            "settings": json.dumps(self.settings),
        }
        make_folder(self.state_file.parent)
        write_state(self.state_file, FORM, state)
        self.saved = self.step

    def _speed(self, seconds: float) -> dict[str, float]:
        batch = self.settings["batch_size"] * self.settings["gradient_accumulation"] * self.accelerator.num_processes
        return {
            "seconds_per_step": seconds,
            "samples_per_second": batch / seconds,
            "peak_gigabytes": peak_memory(self.accelerator.device) / 1e9,
            "learning_rate": self._groups()[0]["lr"],
        }

    def _now(self) -> dict[str, float]:
        return {"learning_rate": self._groups()[0]["lr"], "memory": used_memory(self.accelerator.device)}

    def _write(self, name: str, row: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            make_folder(self.out)
            append_text(self.out / name, json.dumps({"step": self.step, **row}) + "\n")


def _cut(path: Path, step: int) -> None:
    """Drop the rows of a log after `step`, which will be written again, and a row that a crash has cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
    write_text(path, "".join(kept))
