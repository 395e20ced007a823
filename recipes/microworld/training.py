"""What all stages share: packaged settings, the run of a stage, and a training with `Trainer`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmteacher.distillation.trainer import FORM, STATE, Trainer, training_folder
from vlmteacher.errors import InputError
from vlmteacher.files import make_folder
from vlmteacher.ops.backends import has_avx512_bf16
from vlmteacher.state import read_state, write_state

CONFIGS = Path(__file__).parent / "configs"
EARLIER_FORM, EARLIER_STATE = "vlmteacher stage 1", "state.pt"  # form and place of the states of earlier releases
STATE_BYTES = 2**30  # the most that the state of a stage may take

Step = Callable[[int, np.random.Generator], tuple[Tensor, dict[str, float]]]


def forget_origins(folder: Path) -> None:
    """Remove from the configurations in a folder where diffusers loaded each part from: a path of one machine."""
    for config in folder.rglob("config.json"):
        content = json.loads(config.read_text())
        if content.pop("_name_or_path", None):
            config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def in_bfloat16(wanted: bool = True, device: str = "cpu") -> torch.autocast:
    """Autocast to bfloat16 where that is wanted and the processor has instructions for it; else it would be slower."""
    return torch.autocast(device, torch.bfloat16, enabled=wanted and (device != "cpu" or has_avx512_bf16()))


def load_config(stage: str) -> dict[str, Any]:
    """The packaged settings of a stage: sizes, steps, seed, learning rate."""
    return json.loads((CONFIGS / f"{stage}.json").read_text())


@dataclass(frozen=True)
class Run:
    """One run of a stage: the folders that it reads and writes, and its settings.

    Attributes:
        trained: folder that holds the results of the other runs, a folder for each.
        out: the run's own folder.
        config: settings of the stage.
        start: weights to start from; what they are, a directory or a file, depends on the stage.
        device: the device to train on.
        until: the step to stop at, before the schedule has reached its end.
        continues: folder of a run from whose last state, optimizer included, this one continues.
        instead: folders of `trained` by the name of the stage's folder that they take the place of.
        given: results that are elsewhere.
    """

    trained: Path
    out: Path
    config: dict[str, Any]
    start: Path | None = None
    device: str = "cpu"
    until: int | None = None
    continues: Path | None = None
    instead: Mapping[str, str] = field(default_factory=dict)
    given: Mapping[str, Path] = field(default_factory=dict)

    def path(self, result: str) -> Path:
        """Where the result of another run is, such as ``vae/vae``."""
        if result in self.given:
            return self.given[result]
        folder, *rest = result.split("/")
        return self.trained.joinpath(self.instead.get(folder, folder), *rest)


def train(
    modules: dict[str, nn.Module],
    step: Step,
    run: Run,
    *,
    warmup: int = 100,
    save_every: int = 250,
    log_every: int = 25,
    ema: float = 0.0,
    save_interrupted: bool = True,
) -> None:
    """Minimise the loss of ``step(index, rng)`` over the parameters of `modules` that require a gradient.

    AdamW, cosine decay to 5% of the learning rate, clipping at 1; a step with a non-finite gradient makes no update.
    `rng` is seeded by the seed and the index, so that a resumed run draws the data that an uninterrupted one would.
    With ``ema`` > 0 the modules end as the moving average of their weights. Resumes from the state in ``run.out``.

    Raises InputError: the state cannot be used or was made with other settings.
    """
    from accelerate import Accelerator

    config, seed = run.config, run.config["seed"]
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config["learning_rate"], betas=(0.9, 0.98), weight_decay=0.01)
    shared = {"batch_size": config.get("batch", 1), "gradient_accumulation": 1, "validate_every": 0, "ema": ema}
    shared |= config | {"warmup": warmup, "save_every": save_every, "log_every": log_every}
    steps = config["steps"]

    def schedule(index: int) -> float:
        return min(1.0, (index + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * index / steps)))

    def update(index: int, _: torch.Generator) -> dict[str, float]:
        loss, values = step(index, np.random.default_rng([seed, index]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not torch.isfinite(nn.utils.clip_grad_norm_(parameters, 1.0)):
            return {}
        optimizer.step()
        return {"loss": float(loss.detach()), **values}

    accelerator = Accelerator()
    make_folder(run.out)
    _take_over(run, shared)
    resume = (run.out / STATE).exists()
    with training_folder(run.out, resume, accelerator):
        trainer = Trainer(
            run.out,
            modules,
            {"adamw": optimizer},
            shared,
            accelerator,
            schedule=schedule,
            averaged=parameters,
            average_warmup=9,
        )
        if resume:
            trainer.resume()
        trainer.run(update, steps if run.until is None else run.until, save_interrupted=save_interrupted)


def _take_over(run: Run, settings: dict[str, Any]) -> None:
    """Put the state of the run that `run` continues into its folder, or convert its own from an earlier release."""
    if (run.out / STATE).exists():
        return
    earlier = run.out / EARLIER_STATE
    if earlier.exists():
        state = read_state(earlier, EARLIER_FORM, STATE_BYTES)
        state["optimizers"] = {"adamw": state.pop("optimizer")}
    elif run.continues:
        state = read_state(run.continues / STATE, FORM, STATE_BYTES)
    else:
        return
    make_folder((run.out / STATE).parent)
    write_state(run.out / STATE, FORM, state | {"form": FORM, "settings": json.dumps(settings)})
    earlier.unlink(missing_ok=True)


def adopt(model: nn.Module, known: nn.Module, tokenizer: Any = None, known_tokenizer: Any = None) -> None:
    """Copy the weights of `known` into `model`; embeddings token by token, where the tokenizers differ.

    Raises InputError: the models have other sizes.
    """
    weights = known.state_dict()
    own = model.state_dict()
    if tokenizer is not None:
        ids = known_tokenizer.get_vocab()
        pairs = [(new, ids[token]) for token, new in tokenizer.get_vocab().items() if token in ids]
        here, there = torch.tensor(pairs).T
        for name, value in own.items():
            if len(value) == len(tokenizer) and len(weights[name]) == len(known_tokenizer):
                mixed = value.clone()
                mixed[here] = weights[name][there]
                weights[name] = mixed
    wrong = [name for name, value in own.items() if name not in weights or weights[name].shape != value.shape]
    if wrong:
        raise InputError(f"the weights to start from have no fitting {wrong[0]}: train from scratch, or use its sizes")
    model.load_state_dict({name: weights[name] for name in own})
