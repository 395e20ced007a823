"""L_VQA: how far the Teacher is from answering "Yes" to every question (arXiv 2606.02564, section on the objective)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlmteacher.errors import InputError


def vqa_objective(losses: Tensor, goal_weight: float = 0.5) -> Tensor:
    """Mix the losses of the questions: lambda * L_goal + (1 - lambda) / M * sum_m L_process_m.

    losses: (1+M,), -log P(Yes), goal first, >= 0. goal_weight: lambda in [0, 1]. Returns a scalar.
    Without process questions (M = 0) it is L_goal, whatever lambda is.
    Raises InputError when lambda lies outside [0, 1].
    """
    if not 0 <= goal_weight <= 1:
        raise InputError(f"goal_weight must lie between 0 and 1, not {goal_weight}")
    goal, process = losses[0], losses[1:]
    if process.numel() == 0:
        return goal
    return goal_weight * goal + (1 - goal_weight) * process.mean()


def pick(losses: Sequence[Tensor], goal_weight: float = 0.5) -> int:
    """Which of several videos the objective is lowest on, from the losses (1+M,) of each."""
    return min(range(len(losses)), key=lambda k: vqa_objective(losses[k], goal_weight).item())
