"""L_VQA, the loss that test-time optimisation minimises (arXiv 2606.02564, section on the objective).

It is low when the Teacher answers "Yes" to every question.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlmteacher.errors import InputError


def vqa_objective(losses: Tensor, goal_weight: float = 0.5) -> Tensor:
    """Combine the losses of the questions: lambda * L_goal + (1 - lambda) / M * sum_m L_process_m.

    losses: (1+M,), -log P(Yes) of each question, goal first, >= 0. goal_weight: lambda in [0, 1]. Returns a scalar;
    without process questions (M = 0) it is L_goal, whatever lambda is. Raises InputError: lambda outside [0, 1].
    """
    if not 0 <= goal_weight <= 1:
        raise InputError(f"goal_weight must lie between 0 and 1, not {goal_weight}")
    goal, process = losses[0], losses[1:]
    if process.numel() == 0:
        return goal
    return goal_weight * goal + (1 - goal_weight) * process.mean()


def pick(objectives: Sequence[Tensor]) -> int:
    """The index of the video with the lowest objective ()."""
    return min(range(len(objectives)), key=lambda k: objectives[k].item())
