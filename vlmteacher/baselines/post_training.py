"""`vlmteacher train post`: shared post-training, one LoRA for many instances by the method's differentiable objective.

The method trains a LoRA for one instance until the Teacher is content; this trains one LoRA on instance after instance,
each with a noise of its own, and is evaluated without any update at test time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmteacher.baselines.shared_lora import SharedSettings, SharedTraining, run_training
from vlmteacher.trackers import Trackers


@dataclass(frozen=True)
class PostTrainingSettings(SharedSettings):
    """Settings of a shared post-training; it has none of its own."""


class PostTraining(SharedTraining):
    """The objective of the one-step predictions, averaged over the prompts of an update."""

    def learn(self, index: int, generator: torch.Generator) -> dict[str, float]:
        count, losses, goals = self.train.batch_size, 0.0, 0.0
        for _ in range(count):
            condition, queries = self.draw(generator)
            objective = self.objective(condition, queries, self.reasoner.noise(condition, generator))
            loss, packed = objective.evaluate(index)
            (loss / count).backward()
            metrics = objective.read(packed)
            losses, goals = losses + metrics.loss / count, goals + metrics.p_yes[0] / count
        self.cost.add(predictions=count, vlm_calls=count)
        return {"loss": losses, "p_yes_goal": goals, "grad_norm": self.update(index)}


def load_settings(path: Path, overrides: dict[str, Any]) -> PostTrainingSettings:
    """Read `PostTrainingSettings` from a YAML file; `overrides` take precedence over its entries. Raises InputError."""
    return PostTrainingSettings.load(path, overrides)


def run(settings: PostTrainingSettings, resume: bool = False, tracker: Trackers = None) -> Path:
    """Train the LoRA (see `run_training`); returns its file."""
    return run_training(settings, PostTraining, resume, tracker)
