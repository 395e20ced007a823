"""What the two trained baselines share: one LoRA for all instances, trained on prompts that no test has.

A training is resumable and keeps the settings, states and logs of every training here (`distillation.trainer`). Its
folder also gets ``queries.jsonl``, the Teacher's queries of the prompts that were drawn, and at the end
``lora.safetensors``, which ``vlmteacher bench --lora`` takes, and ``cost.json``.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from vlmteacher.baselines.training_prompts import MICROWORLD, QueryFile, TrainingPrompt, check_disjoint, load_prompts
from vlmteacher.distillation.kinds import check_kinds
from vlmteacher.distillation.trainer import Trainer, TrainSettings, training_folder
from vlmteacher.distillation.training import build_settings, read_settings
from vlmteacher.errors import InputError, NonFiniteError
from vlmteacher.files import make_folder, write_bytes, write_json
from vlmteacher.lora.adapter import add_lora, export_lora, lora_parameters
from vlmteacher.media import fit_image, write_video
from vlmteacher.optimization.objective import Objective
from vlmteacher.optimization.reward import vqa_objective
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.reasoners.checkpointing import Keep, keep_activations
from vlmteacher.reasoners.condition import Condition, Noise
from vlmteacher.state import fingerprint
from vlmteacher.teachers.quantization import Quantize
from vlmteacher.torch_modes import plain_torch
from vlmteacher.trackers import LOGS, Trackers, tracking

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image

    from vlmteacher.queries import QuerySet

S = TypeVar("S", bound="SharedSettings")
REFUSALS = 20  # prompts in a row for which the Teacher writes no queries, before a training gives up


@dataclass(frozen=True)
class SharedSettings:
    """Settings of both trainings: the entries of their YAML files. Raises InputError.

    Attributes:
        out: folder to write to.
        data: folder in VBVR's layout, whose prompt.txt and first_frame.png are read, or "microworld": its train split.
        pair: directory of a pair of models; None: the packaged one.
        reasoner, teacher, decoder: hub ids, directories or a file, each instead of the pair's.
        transformer, few_step_lora, preset, quantize: see `TeacherPipeline.from_pretrained`.
        num_frames, height, width: of every video; None: the Reasoner's own.
        device: None: the GPU, if there is one.
        count: number of prompts, from the first on; `held_out` of them are validated on.
        tests: folders in VBVR's layout of the tests, none of whose prompts may be trained on, beside the microworld's.
        held_out: number of prompts to validate on, spread over the data.
        samples: number of them whose videos are written at each validation.
        teacher_frames, goal_weight, fit: as in a call; None: the pair's or the paper's.
        train: steps, prompts per update (`batch_size`), learning rate, rank, ...
    """

    out: str
    data: str = MICROWORLD
    pair: str | None = None
    reasoner: str | None = None
    teacher: str | None = None
    decoder: str | None = None
    transformer: str | None = None
    few_step_lora: str | None = None
    preset: str | None = None
    quantize: Quantize | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    device: str | None = None
    count: int = 512
    tests: tuple[str, ...] = ()
    held_out: int = 16
    samples: int = 2
    teacher_frames: int | None = None
    goal_weight: float | None = None
    fit: Literal["refuse", "crop", "pad"] | None = None
    train: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        check_kinds(self)
        for name, low in {"count": 2, "held_out": 1, "samples": 0}.items():
            if getattr(self, name) < low:
                raise InputError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if self.train.full:
            raise InputError("full must be false: this training gives a LoRA")
        if self.train.gradient_accumulation != 1:
            raise InputError("gradient_accumulation must be 1: the prompts of a batch are computed one by one anyway")

    def to_dict(self) -> dict[str, Any]:
        """The settings that a resumed run must share, by their names in the YAML file."""
        values = asdict(self)
        return {
            **values.pop("train"),
            **{name: value for name, value in values.items() if name not in ("out", "device")},
        }

    @classmethod
    def from_dict(cls: type[S], values: dict[str, Any]) -> S:
        """Make settings from the entries of a YAML file, in which those of `TrainSettings` stand beside the others."""
        return build_settings(values, lambda entries: cls(**entries))

    @classmethod
    def load(cls: type[S], path: Path, overrides: dict[str, Any]) -> S:
        """Read settings from a YAML file; `overrides` take precedence over its entries. Raises InputError."""
        return read_settings(path, overrides, lambda entries: cls(**entries))


class TrainingCost(nn.Module):
    """The cost of a training so far, which its state keeps.

    seconds: of the updates, with writing queries and without validation. generator_calls: videos that the Reasoner
    sampled. predictions: one-step predictions that were differentiated. vlm_calls: videos and predictions that the
    Teacher judged. queries_written: prompts that it wrote queries for. Of several processes, the main one's are counted
    for each.
    """

    NAMES = ("seconds", "generator_calls", "predictions", "vlm_calls", "queries_written")

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.processes = processes
        self.register_buffer("values", torch.zeros(len(self.NAMES), dtype=torch.float64))
        self.values: Tensor

    def add(self, seconds: float = 0.0, **calls: int) -> None:
        self.values[0] += seconds
        for name, count in calls.items():
            self.values[self.NAMES.index(name)] += count * self.processes

    def to_dict(self) -> dict[str, float]:
        seconds, *calls = self.values.tolist()
        return dict(zip(self.NAMES, (seconds, *map(int, calls)), strict=True))


class SharedTraining(ABC):
    """A training of one LoRA on many prompts; `Trainer` calls `step`. All changing state is in modules and optimizers.

    Args:
        settings: of the training.
        pipe: the models; the LoRA is added to its Reasoner and stays there.
        prompts: all prompts.
        accelerator: of several processes, each draws its own prompts.
        out: folder of the training.
    """

    def __init__(
        self,
        settings: SharedSettings,
        pipe: TeacherPipeline,
        prompts: Sequence[TrainingPrompt],
        accelerator: Accelerator,
        out: Path,
    ) -> None:
        self.settings, self.pipe, self.accelerator, self.out = settings, pipe, accelerator, out
        self.train, self.reasoner = settings.train, pipe.reasoner
        self.method = pipe.defaults.updated(
            teacher_frames=settings.teacher_frames, goal_weight=settings.goal_weight, fit=settings.fit
        )
        if settings.held_out >= len(prompts):
            raise InputError(
                f"{settings.held_out} of {len(prompts)} prompts cannot be held out: leave some to train on"
            )
        held = {k * len(prompts) // settings.held_out for k in range(settings.held_out)}
        self.prompts = [prompt for k, prompt in enumerate(prompts) if k not in held]
        self.held_out = [prompts[k] for k in sorted(held)]
        self.queries = QueryFile(out / "queries.jsonl", accelerator.is_main_process)
        transformer = self.reasoner.transformer
        if self.train.gradient_checkpointing:
            keep_activations(transformer, Keep.INPUT)
        add_lora(transformer, self.train.rank, seed=self.train.seed)
        self.parameters = lora_parameters(transformer)
        self.cost = TrainingCost(accelerator.num_processes)
        self.modules: dict[str, nn.Module] = {"student": nn.ParameterList(self.parameters), "cost": self.cost}
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.train.learning_rate, weight_decay=self.train.weight_decay
        )
        self.optimizers: dict[str, torch.optim.Optimizer] = {"student": self.optimizer}

    @abstractmethod
    def learn(self, index: int, generator: torch.Generator) -> dict[str, float]:
        """Update the LoRA on `batch_size` drawn prompts; returns metrics. Raises NonFiniteError."""

    def step(self, index: int, generator: torch.Generator) -> dict[str, float]:
        """`learn` with this process's own draws."""
        began = time.perf_counter()
        seeds = torch.randint(2**62, (self.accelerator.num_processes,), generator=generator)
        values = self.learn(index, torch.Generator().manual_seed(int(seeds[self.accelerator.process_index])))
        self.cost.add(seconds=time.perf_counter() - began)
        return values

    def draw(self, generator: torch.Generator) -> tuple[Condition, QuerySet]:
        """Draw a prompt; returns it encoded, and the Teacher's queries. Prompts for which it writes none are left out.

        Raises InputError: it writes none for `REFUSALS` prompts in a row; a prompt that the Reasoner cannot take.
        """
        for _ in range(REFUSALS):
            prompt = self.prompts[int(torch.randint(len(self.prompts), (), generator=generator))]
            queries = self.find_queries(prompt)
            if queries is not None:
                return self.encode(prompt), queries
        raise InputError(f"the Teacher writes no queries for {REFUSALS} prompts in a row, last {prompt.name}")

    def find_queries(self, prompt: TrainingPrompt) -> QuerySet | None:
        """The Teacher's queries of a prompt, written once in a training; None where no answer of it can be used."""
        if prompt not in self.queries:
            image = self.first_frame(prompt)
            try:
                self.queries[prompt] = self.pipe.write_queries(prompt.text, image)
            except InputError:
                self.queries[prompt] = None
            self.cost.add(queries_written=1)
        return self.queries[prompt]

    def first_frame(self, prompt: TrainingPrompt) -> Image.Image | None:
        """The first frame of a prompt in the size of the video, as a call gives it to Reasoner and Teacher."""
        image = prompt.image()
        return (
            None
            if image is None
            else fit_image(
                image, self.reasoner.height, self.reasoner.width, f"first frame of {prompt.name}", self.method.fit
            )
        )

    def encode(self, prompt: TrainingPrompt) -> Condition:
        """Encode a prompt for a video of the Reasoner's own size. Raises InputError, which names it."""
        reasoner = self.reasoner
        try:
            image = self.first_frame(prompt)
            return reasoner.encode(prompt.text, image, reasoner.num_frames, reasoner.height, reasoner.width)
        except InputError as error:
            raise InputError(f"{prompt.name}: {error}") from error

    def objective(self, condition: Condition, queries: QuerySet, noise: Noise) -> Objective:
        """The method's objective on the one-step prediction from `noise`."""
        pipe = self.pipe
        return Objective(self.reasoner, pipe.decoder, pipe.teacher, condition, noise, queries, self.method)

    def update(self, index: int) -> float:
        """Apply the gradients on the LoRA, clipped, and drop them; returns their norm. Raises NonFiniteError."""
        for parameter in self.parameters:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.accelerator.reduce(grad, "mean")
        norm = nn.utils.clip_grad_norm_(self.parameters, self.train.max_grad_norm).item()
        if not math.isfinite(norm):
            raise NonFiniteError(f"the loss or gradient of step {index} is not finite")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """The mean objective of the held-out prompts, each with a noise of its own that stays; writes ``samples/``.

        `loss_one_step` is that of the one-step prediction by the surrogate decoder, `loss_few_step` that of the
        few-step video by the standard VAE. The folder also gets the LoRA.
        """
        pipe, losses, samples = self.pipe, [], self.out / "samples"
        make_folder(samples)
        for index, prompt in enumerate(self.held_out):
            queries = self.find_queries(prompt)
            if queries is None:
                continue
            condition = self.encode(prompt)
            noise = self.reasoner.noise(condition, torch.Generator().manual_seed(index))
            objective = self.objective(condition, queries, noise)
            one = objective.read(objective.evaluate()[1]).loss
            video = pipe.sample(condition, noise)
            few = vqa_objective(pipe.judge(video, objective.frame_indices, queries), self.method.goal_weight).item()
            losses.append((one, few))
            if index < self.settings.samples and self.accelerator.is_main_process:
                frames = (video.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
                write_video(samples / f"step-{step:06d}-{index}.mp4", frames, self.reasoner.fps)
        if self.accelerator.is_main_process:
            write_bytes(samples / f"step-{step:06d}.safetensors", export_lora(self.reasoner.transformer))
        if not losses:
            raise InputError("the Teacher writes no queries for any held-out prompt: hold out more (held_out)")
        means = torch.tensor(losses).mean(0).tolist()
        return dict(zip(("loss_one_step", "loss_few_step"), means, strict=True))


@plain_torch()
def run_training(
    settings: SharedSettings,
    training: Callable[[Any, TeacherPipeline, Sequence[TrainingPrompt], Accelerator, Path], SharedTraining],
    resume: bool,
    tracker: Trackers = None,
) -> Path:
    """Train the LoRA; returns its file, ``lora.safetensors`` in `settings.out`.

    training: the class of the training. tracker: see `trackers.tracking`.

    Raises:
        InputError: a setting, a prompt or a model cannot be used; a training prompt is an instance of a test.
        NonFiniteError: the training broke down; the last good state stays.
    """
    from accelerate import Accelerator

    out, train = Path(settings.out), settings.train
    accelerator = Accelerator()
    with tracking(tracker, out / LOGS), training_folder(out, resume, accelerator):
        prompts = load_prompts(settings.data, settings.count, train.seed)
        check_disjoint(prompts, settings.tests)
        pipe = _load(settings, accelerator.device)
        shared = settings.to_dict() | _fingerprints(pipe, prompts)
        learning = training(settings, pipe, prompts, accelerator, out)
        trainer = Trainer(out, learning.modules, learning.optimizers, shared, accelerator)
        if resume:
            trainer.resume()
        trainer.run(learning.step, train.steps, learning.validate)
        if accelerator.is_main_process:
            write_json(out / "cost.json", {"steps": train.steps, **learning.cost.to_dict()})
            write_bytes(out / "lora.safetensors", export_lora(pipe.reasoner.transformer))
    return out / "lora.safetensors"


def _load(settings: SharedSettings, device: torch.device) -> TeacherPipeline:
    """Load the models; of several processes, each has a `device` of its own."""
    pipe = TeacherPipeline.from_pretrained(
        settings.reasoner,
        settings.teacher,
        settings.decoder,
        pair=settings.pair,
        transformer=settings.transformer,
        few_step_lora=settings.few_step_lora,
        preset=settings.preset,
        quantize=settings.quantize,
        dtype=settings.train.dtype,
        device_map=settings.device or (None if device.type == "cpu" else device),
    )
    reasoner = pipe.reasoner
    size = {name: getattr(settings, name) or getattr(reasoner, name) for name in ("num_frames", "height", "width")}
    reasoner.check(**size)
    reasoner.settings = replace(reasoner.settings, **size)
    return pipe


def _fingerprints(pipe: TeacherPipeline, prompts: Sequence[TrainingPrompt]) -> dict[str, str]:
    teacher = getattr(pipe.teacher, "model", None)
    listed = json.dumps([(prompt.name, prompt.text) for prompt in prompts])
    return {
        "models": fingerprint(
            {**pipe.reasoner.networks, "decoder": pipe.decoder} | ({} if teacher is None else {"teacher": teacher}),
            pipe.reasoner.settings,
        ),
        "prompts": hashlib.sha256(listed.encode()).hexdigest()[:16],
    }
