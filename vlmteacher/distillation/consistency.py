"""Consistency distillation on the few-step grid (after arXiv 2303.01469 and 2310.04378), for comparison with DMD2.

From a real video noised to a level of the student's grid, the many-step Reasoner follows its guided ODE down to the
next level, or to the clean video after the last level. The student's prediction at the first level is trained to equal
its own prediction at the second, so that it predicts the end of the ODE from every level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmteacher.distillation.adapters import Networks
from vlmteacher.distillation.flow_matching import counted, grid_levels, noised
from vlmteacher.distillation.kinds import check_kinds
from vlmteacher.errors import InputError
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.condition import Condition
from vlmteacher.reasoners.many_step import ode_step


@dataclass(frozen=True)
class ConsistencySettings:
    """Settings of consistency distillation. Raises InputError.

    Attributes:
        guidance: classifier-free guidance scale of the ODE; the student learns the guided result. 1 is none.
        substeps: Euler steps from one level of the grid to the next, at least 1.
    """

    guidance: float = 3.0
    substeps: int = 4

    def __post_init__(self) -> None:
        check_kinds(self)
        if not (isinstance(self.substeps, int) and self.substeps >= 1):
            raise InputError(f"substeps must be a whole number of at least 1, not {self.substeps}")
        if not (self.guidance >= 0 and math.isfinite(self.guidance)):
            raise InputError(f"guidance must be 0 or greater, not {self.guidance}")


class Consistency:
    """The student's loss.

    Args:
        reasoner: its `settings` define the grid: the student's timesteps and shift.
        networks: networks with the roles student and real.
        empty: (1, L, D) embeddings of the empty prompt.
        settings: settings of the method.
    """

    def __init__(self, reasoner: Reasoner, networks: Networks, empty: Tensor, settings: ConsistencySettings) -> None:
        self.reasoner, self.networks, self.empty, self.settings = reasoner, networks, empty, settings

    def student_loss(
        self, condition: Condition, real: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean squared inconsistency of the student on real latents (B, C, T, h, w), and metrics.

        Must be called inside ``networks.active("student")``. The metric `drift` is the RMS of the ODE's change.
        """
        sigma, until = (s.to(real.device) for s in grid_levels(self.reasoner.settings.sigmas, len(real), generator))
        noise = torch.randn(real.shape, generator=generator).to(real.device)
        x = noised(real, noise, sigma)
        known = condition.first_frame
        with torch.no_grad():
            with self.networks.active("real") as network:
                later = ode_step(
                    self.reasoner,
                    condition,
                    self.empty,
                    x,
                    sigma,
                    until,
                    guidance=self.settings.guidance,
                    substeps=self.settings.substeps,
                    transformer=network,
                )
            target = self._student(condition, later, until)  # at level 0 this is `later` itself
        loss = counted(self._student(condition, x, sigma) - target, known).square().mean()
        drift = counted(later - x, known).square().mean().sqrt()
        return loss, {"consistency": float(loss.detach()), "drift": float(drift)}

    def _student(self, condition: Condition, latents: Tensor, sigma: Tensor) -> Tensor:
        with self.networks.active("student") as network:
            return self.reasoner.predict_clean_at(condition, latents, sigma, transformer=network)
