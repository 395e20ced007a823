"""`vlmteacher distill reasoner`: a few-step Reasoner from a many-step one, by one of three methods.

``dmd2`` (the default, see ``dmd2.py``), ``consistency`` (``consistency.py``), and ``few-timesteps``: plain flow
matching on the videos at the few timesteps alone, which distils nothing and is there for comparison.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmteacher.distillation import consistency, dmd2
from vlmteacher.distillation.adapters import Networks, Role, SeparateNetworks, SharedBackbone
from vlmteacher.distillation.dataset import LatentDataset
from vlmteacher.distillation.trainer import Trainer, TrainSettings
from vlmteacher.errors import InputError
from vlmteacher.evaluation.few_step import relative_rms
from vlmteacher.optimization import NonFiniteError
from vlmteacher.reasoners import load_reasoner
from vlmteacher.reasoners.base import Condition, Reasoner
from vlmteacher.run_folder import write_json, write_video

if TYPE_CHECKING:
    from accelerate import Accelerator

METHODS = ("dmd2", "consistency", "few-timesteps")
Loss = Callable[[Condition, Tensor, torch.Generator], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Settings:
    """What a distillation may be told; the entries of its YAML file. Raises InputError.

    Attributes:
        reasoner: the many-step Reasoner: a directory or a hub id.
        data: folder in VBVR's layout: first frames and prompts, and videos for those methods that look at them.
        out: folder to write to.
        method: one of `METHODS`.
        timesteps, shift: of the few-step sampler (see the Reasoner's settings).
        offload: with full weights, keep idle networks in the main memory.
        train: steps, batch size, learning rate, LoRA or full weights, ... (a step is one update of the student).
        dmd2, consistency: the method's own settings.
    """

    reasoner: str
    data: str
    out: str
    method: str = "dmd2"
    timesteps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 1.0
    offload: bool = False
    train: TrainSettings = field(default_factory=TrainSettings)
    dmd2: dmd2.Settings = field(default_factory=dmd2.Settings)
    consistency: consistency.Settings = field(default_factory=consistency.Settings)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"method {self.method!r} is not there: it can be {', '.join(METHODS)}")
        ts = self.timesteps
        if not ts or ts[0] != 1000 or ts[-1] <= 0 or any(a <= b for a, b in pairwise(ts)):
            raise InputError(f"timesteps must fall from 1000 and stay above 0, not {list(ts)}")
        if not (self.shift > 0 and math.isfinite(self.shift)):
            raise InputError(f"shift must be greater than 0, not {self.shift}")

    def to_dict(self) -> dict[str, Any]:
        """What a resumed run must agree with: every entry that the method looks at, by its name in the YAML file."""
        values = asdict(self)
        for name in ("dmd2", "consistency"):
            own = values.pop(name)
            if name == self.method:
                values |= {f"{name}.{entry}": value for entry, value in own.items()}
        return {**values.pop("train"), **{name: value for name, value in values.items() if name != "out"}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """From the entries of a YAML file; those of `TrainSettings` stand beside the others."""
        values = dict(values)
        train = {f.name: values.pop(f.name) for f in fields(TrainSettings) if f.name in values}
        try:
            for name, part in (("dmd2", dmd2.Settings), ("consistency", consistency.Settings)):
                if name in values:
                    values[name] = part(**(values[name] or {}))
            if "timesteps" in values:
                values["timesteps"] = tuple(float(t) for t in values["timesteps"])
            return cls(**values, train=TrainSettings(**train))
        except TypeError as error:  # what is unknown or missing is named in it
            raise InputError(f"the configuration cannot be used: {str(error).split('__init__() ')[-1]}") from error


def load_settings(path: Path, overrides: dict[str, Any]) -> Settings:
    """Read a YAML file of `Settings`; `overrides` replace its entries. Raises InputError."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"configuration {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"configuration {path} is no list of `name: value`")
    return Settings.from_dict(values | overrides)


class Distillation:
    """Networks, optimizers and one step of a method on the data; the trainer's loop calls `step`.

    `modules` and `optimizers` are all that changes while it runs.
    """

    def __init__(self, settings: Settings, reasoner: Reasoner, data: LatentDataset, accelerator: Accelerator) -> None:
        self.settings, self.reasoner, self.data, self.accelerator = settings, reasoner, data, accelerator
        train = settings.train
        roles: tuple[Role, ...] = ("student", "fake") if settings.method == "dmd2" else ("student",)
        self.networks: Networks = (
            SeparateNetworks(reasoner.transformer, roles, settings.offload)
            if train.full
            else SharedBackbone(reasoner.transformer, roles, train.rank, train.seed)
        )
        self.modules: dict[str, nn.Module] = {role: nn.ParameterList(self.networks.parameters(role)) for role in roles}
        empty = data.empty_prompt.to(reasoner.device)
        self.losses: dict[Role, Loss]
        if settings.method == "dmd2":
            method = dmd2.DMD2(reasoner, self.networks, empty, settings.dmd2, train.seed)
            if method.critic is not None:
                self.modules["fake"] = nn.ModuleList([self.modules["fake"], method.critic])
            self.losses = {"fake": method.fake_loss, "student": lambda c, real, g: method.student_loss(c, g)}
        elif settings.method == "consistency":
            follower = consistency.Consistency(reasoner, self.networks, empty, settings.consistency)
            self.losses = {"student": follower.student_loss}
        else:
            self.losses = {"student": self._few_timesteps_loss}
        rates = {"student": train.learning_rate, "fake": settings.dmd2.fake_learning_rate}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            role: torch.optim.AdamW(
                self.modules[role].parameters(), lr=rates[role], betas=(0.9, 0.99), weight_decay=train.weight_decay
            )
            for role in roles
        }

    def step(self, index: int, generator: torch.Generator) -> dict[str, float]:
        """One update of the student, after those of the fake score; the terms of the losses, means over updates."""
        seeds = torch.randint(2**62, (self.accelerator.num_processes,), generator=generator)
        generator = torch.Generator().manual_seed(int(seeds[self.accelerator.process_index]))  # each draws its own
        values: dict[str, float] = {}
        for role in self.losses:
            times = self.settings.dmd2.fake_updates if role == "fake" else 1
            rows = [self.update(role, index, generator) for _ in range(times)]
            values |= {name: sum(row[name] for row in rows) / times for name in rows[0]}
        return values

    def update(self, role: Role, index: int, generator: torch.Generator) -> dict[str, float]:
        """One update of a role over `gradient_accumulation` batches. Raises NonFiniteError before it would be made."""
        train, optimizer = self.settings.train, self.optimizers[role]
        parameters = list(self.modules[role].parameters())
        values: dict[str, float] = {}
        with self.networks.active(role):
            for _ in range(train.gradient_accumulation):
                rows = torch.randint(len(self.data), (train.batch_size,), generator=generator)
                real, condition = self.data.batch(rows.tolist())
                with self.accelerator.autocast():
                    loss, terms = self.losses[role](condition, real, generator)
                self.accelerator.backward(loss / train.gradient_accumulation)
                for name, value in terms.items():
                    values[name] = values.get(name, 0.0) + value / train.gradient_accumulation
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            norm = nn.utils.clip_grad_norm_(parameters, train.max_grad_norm).item()
            if not all(map(math.isfinite, (norm, *values.values()))):
                raise NonFiniteError(f"the {role}'s loss or gradient of step {index} is not finite")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {**values, f"{role}_grad_norm": norm}

    def _few_timesteps_loss(
        self, condition: Condition, real: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Flow matching on real latents (B, C, T, h, w) at levels of the few-step grid alone."""
        sigma, _ = consistency.grid_levels(self.reasoner.settings.sigmas, len(real), generator)
        noise, sigma = torch.randn(real.shape, generator=generator).to(real.device), sigma.to(real.device)
        with self.networks.active("student") as network:
            x = dmd2.noised(real, noise, sigma)
            velocity = self.reasoner.velocity(condition, x, sigma, transformer=network)
        loss = dmd2.flow_matching_loss(velocity, real, noise, condition.first_frame)
        return loss, {"flow": float(loss.detach())}

    @torch.no_grad()
    def validate(self, step: int, out: Path, count: int = 4) -> dict[str, float]:
        """Relative RMS between one and few steps on the first instances; their videos in ``samples/``."""
        found = []
        for index in range(min(count, len(self.data))):
            _, condition = self.data.batch([index])
            noise = self.reasoner.noise(condition, torch.Generator().manual_seed(index))
            with self.networks.active("student") as network:
                plain, self.reasoner.transformer = self.reasoner.transformer, network
                try:
                    one, few = self.reasoner.predict_clean(condition, noise), self.reasoner.sample(condition, noise)
                finally:
                    self.reasoner.transformer = plain
            found.append(relative_rms(one, few, condition.first_frame))
            frames = (self.reasoner.decode(few).permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
            (out / "samples").mkdir(parents=True, exist_ok=True)
            write_video(out / "samples" / f"step-{step:06d}-{index}.mp4", frames, self.reasoner.fps)
        return {"relative_rms": sum(found) / len(found)}


def run(settings: Settings, resume: bool = False) -> Path:
    """Distil; returns the pipeline directory that `load_reasoner` opens, ``pipeline`` in `settings.out`.

    Raises InputError for what cannot be used, NonFiniteError when the training breaks down (the last good state stays).
    """
    from accelerate import Accelerator

    train = settings.train
    accelerator = Accelerator(mixed_precision="bf16" if train.dtype == "bfloat16" else "no")
    reasoner = load_reasoner(settings.reasoner)
    reasoner.settings = replace(reasoner.settings, timesteps=settings.timesteps, shift=settings.shift)
    reasoner.to(accelerator.device)
    out = Path(settings.out)
    size = {name: getattr(reasoner, name) for name in ("num_frames", "height", "width")}
    data = LatentDataset.prepare(Path(settings.data), out / "cache", reasoner, **size)
    distillation = Distillation(settings, reasoner, data, accelerator)
    trainer = Trainer(out, distillation.modules, distillation.optimizers, settings.to_dict(), accelerator)
    if resume:
        trainer.resume()
    trainer.run(distillation.step, train.steps, lambda step: distillation.validate(step, out))
    if accelerator.is_main_process:
        write_pipeline(settings.reasoner, reasoner, distillation.networks.student_weights(), out / "pipeline")
    return out / "pipeline"


def write_pipeline(source: str, reasoner: Reasoner, weights: dict[str, Tensor], out: Path) -> None:
    """A diffusers pipeline directory: that of `source` with other `weights` and the Reasoner's settings."""
    transformer: Any = type(reasoner.transformer).from_config(reasoner.transformer.config)
    transformer.load_state_dict(weights)
    directory = Path(source)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(source, local_files_only=True))  # it was loaded from there
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(directory, partial, ignore=lambda at, names: names if Path(at).name == "transformer" else [])
    transformer.save_pretrained(partial / "transformer")
    write_json(partial / "reasoner.json", asdict(reasoner.settings))
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
