"""The parts of every training of a Reasoner: settings, networks, optimizers, updates, samples, the result."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from vlmteacher.checkpoints.hub import fetch
from vlmteacher.distillation.adapters import Networks, Role, SeparateNetworks, SharedBackbone
from vlmteacher.distillation.dataset import LatentDataset
from vlmteacher.distillation.trainer import Trainer, TrainSettings
from vlmteacher.errors import InputError, NonFiniteError
from vlmteacher.files import make_folder, read_yaml, replacing, write_json
from vlmteacher.media import write_video
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.condition import Condition
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.state import fingerprint

if TYPE_CHECKING:
    from accelerate import Accelerator

Loss = Callable[[Condition, Tensor, torch.Generator], tuple[Tensor, dict[str, float]]]
T = TypeVar("T")
SAMPLES = Path(__file__).parent / "configs"
PACKAGED = str(Path(__file__).parent.parent / "microworld" / "models" / "reasoner")
MODELS = ("reasoner", "vae")  # entries that name a model

# ---------------------------------------------------------------- settings


def read_settings(path: Path, overrides: dict[str, Any], build: Callable[[dict[str, Any]], T]) -> T:
    """Call `build` with the entries of a YAML file, over which `overrides` take precedence.

    path: a file, or the name of a sample in the package (`SAMPLES`). The model `packaged` is the packaged Reasoner.
    Raises InputError.
    """
    sample = SAMPLES / f"{path}.yaml"
    values = read_yaml(
        sample if not path.exists() and len(path.parts) == 1 and sample.exists() else path, "configuration"
    )
    if not isinstance(values, dict):
        raise InputError(f"configuration {path} must be a mapping of `name: value`")
    values |= overrides
    return build_settings(values | {name: PACKAGED for name in MODELS if values.get(name) == "packaged"}, build)


def build_settings(values: dict[str, Any], build: Callable[[dict[str, Any]], T]) -> T:
    """Call `build` with `values`, from which the entries of `TrainSettings` are gathered as ``train``.

    Raises InputError: an entry is unknown, missing or of the wrong type.
    """
    values = dict(values)
    train = {f.name: values.pop(f.name) for f in fields(TrainSettings) if f.name in values}
    try:
        return build({**values, "train": TrainSettings(**train)})
    except TypeError as error:  # it names the unknown or missing entry
        raise InputError(f"the configuration cannot be used: {str(error).split('__init__() ')[-1]}") from error


# ---------------------------------------------------------------- training


class Training:
    """A training on encoded videos; `Trainer` calls `step`.

    A subclass fills `losses`, and `times` where a role has several updates per step, and calls `add_optimizers`. All
    state that changes during the training is in `modules` and `optimizers`.
    """

    def __init__(
        self,
        reasoner: Reasoner,
        data: LatentDataset,
        accelerator: Accelerator,
        train: TrainSettings,
        roles: Sequence[Role] = ("student",),
        offload: bool = False,
    ) -> None:
        self.reasoner, self.data, self.accelerator, self.train = reasoner, data, accelerator, train
        if train.gradient_checkpointing:
            transformer: Any = reasoner.transformer
            transformer.enable_gradient_checkpointing()
        self.networks: Networks = (
            SeparateNetworks(reasoner.transformer, roles, offload)
            if train.full
            else SharedBackbone(reasoner.transformer, roles, train.rank, train.seed)
        )
        self.modules: dict[str, nn.Module] = {role: nn.ParameterList(self.networks.parameters(role)) for role in roles}
        self.losses: dict[Role, Loss] = {}
        self.times: dict[Role, int] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def add_optimizers(self, rates: dict[Role, float]) -> None:
        """Add an AdamW for each role, with the role's learning rate."""
        for role, rate in rates.items():
            parameters = self.modules[role].parameters()
            self.optimizers[role] = torch.optim.AdamW(
                parameters, lr=rate, betas=(0.9, 0.99), weight_decay=self.train.weight_decay
            )

    def step(self, index: int, generator: torch.Generator) -> dict[str, float]:
        """Update every role in turn; returns the metrics, means over the updates of a role."""
        seeds = torch.randint(2**62, (self.accelerator.num_processes,), generator=generator)
        generator = torch.Generator().manual_seed(
            int(seeds[self.accelerator.process_index])
        )  # its own data in every process
        values: dict[str, float] = {}
        for role in self.losses:
            times = self.times.get(role, 1)
            rows = [self.update(role, index, generator) for _ in range(times)]
            values |= {name: sum(row[name] for row in rows) / times for name in rows[0]}
        return values

    def update(self, role: Role, index: int, generator: torch.Generator) -> dict[str, float]:
        """Update a role on `gradient_accumulation` batches; returns metrics. Raises NonFiniteError without updating."""
        train, optimizer = self.train, self.optimizers[role]
        parameters = list(self.modules[role].parameters())
        values: dict[str, float] = {}
        with self.networks.active(role):
            for _ in range(train.gradient_accumulation):
                rows = torch.randint(len(self.data), (train.batch_size,), generator=generator)
                real, condition = self.data.batch(rows.tolist())
                with self.autocast():
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

    def autocast(self) -> torch.autocast:
        """Autocast to bfloat16 where the settings ask for it; bfloat16 needs no scaling of the loss."""
        low = self.train.dtype == "bfloat16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=low)

    @contextmanager
    def student(self) -> Iterator[nn.Module]:
        """Replace the Reasoner's transformer by the student inside the block."""
        plain = self.reasoner.transformer
        with self.networks.active("student") as network:
            self.reasoner.transformer = network
            try:
                yield network
            finally:
                self.reasoner.transformer = plain

    def write_sample(self, path: Path, latents: Tensor) -> None:
        """Decode latents (1, C, T, h, w) and write the video."""
        frames = (self.reasoner.decode(latents).permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
        make_folder(path.parent)
        write_video(path, frames, self.reasoner.fps)


def begin(
    reasoner: str, data: str, cache: str | None, out: Path, train: TrainSettings, accelerator: Accelerator
) -> tuple[Reasoner, LatentDataset, dict[str, str]]:
    """Load the Reasoner and the data of a training; returns them and fingerprints that a resumed run must share.

    The instances in `data` are encoded in the Reasoner's video size, into `cache`, by default ``out/cache``. The
    Reasoner is loaded in float32, or in bfloat16 where that is the training's dtype and its weights are frozen.
    Raises InputError.
    """
    frozen_low = train.dtype == "bfloat16" and not train.full
    model = load_reasoner(reasoner, torch.bfloat16 if frozen_low else torch.float32)
    model.to(accelerator.device)
    size = model.num_frames, model.height, model.width
    dataset = LatentDataset.prepare(Path(data), Path(cache or out / "cache"), model, *size)
    given = {"transformer": fingerprint({"transformer": model.transformer}), "videos": dataset.fingerprint()}
    return model, dataset, given


def finish(
    training: Training,
    settings: dict[str, Any],
    source: str,
    out: Path,
    resume: bool,
    validate: Callable[[int], dict[str, float]],
) -> Path:
    """Run `training` to its end in `out` and write the result; returns the pipeline directory, ``out/pipeline``.

    settings: settings and fingerprints that a resumed run must share. source: directory or hub id of the Reasoner.
    """
    trainer = Trainer(out, training.modules, training.optimizers, settings, training.accelerator)
    if resume:
        trainer.resume()
    trainer.run(training.step, training.train.steps, validate)
    if training.accelerator.is_main_process:
        write_pipeline(source, training.reasoner, training.networks.student_weights(), out / "pipeline")
    return out / "pipeline"


def write_pipeline(source: str, reasoner: Reasoner, weights: dict[str, Tensor], out: Path) -> None:
    """Write the diffusers pipeline of `source` with other transformer `weights` and the Reasoner's settings.

    Raises OutputError.
    """
    transformer: Any = type(reasoner.transformer).from_config(reasoner.transformer.config)
    transformer.load_state_dict(weights, assign=True)  # every weight keeps its precision
    directory = Path(source)
    if not directory.is_dir():
        directory = fetch(source, "", local_files_only=True)  # the Reasoner was loaded from this cache
    with replacing(out) as temporary:
        shutil.copytree(directory, temporary, ignore=lambda at, names: names if Path(at).name == "transformer" else [])
        transformer.save_pretrained(temporary / "transformer")
        write_json(temporary / "reasoner.json", asdict(reasoner.settings))
