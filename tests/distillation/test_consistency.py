"""Consistency distillation: the grid, the target by the ODE, and who learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.tiny_models import tiny_wan_pipeline
from vlmteacher.distillation.adapters import SharedBackbone
from vlmteacher.distillation.consistency import Consistency, ConsistencySettings
from vlmteacher.distillation.flow_matching import grid_levels
from vlmteacher.errors import InputError
from vlmteacher.reasoners.condition import Condition, collate
from vlmteacher.reasoners.loading import load_reasoner

SIGMAS = (1.0, 0.75, 0.5, 0.25)


@pytest.fixture(scope="module")
def method(tmp_path_factory) -> Consistency:
    reasoner = load_reasoner(tiny_wan_pipeline(tmp_path_factory.mktemp("wan")))
    networks = SharedBackbone(reasoner.transformer, ("student",), rank=2, seed=0)
    with torch.no_grad():
        for parameter in networks.parameters("student"):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    empty = reasoner.encode("box", None, 5, 32, 48).prompt_embeds
    return Consistency(reasoner, networks, empty, ConsistencySettings(guidance=2.0, substeps=2))


def batch(method: Consistency) -> tuple[Condition, Tensor]:
    conditions = [method.reasoner.encode(p, Image.new("RGB", (48, 32), "red"), 5, 32, 48) for p in ("box", "red ball")]
    return collate(conditions), torch.randn(2, 8, 2, 4, 6, generator=torch.Generator().manual_seed(4))


def loss(method: Consistency, condition: Condition, real: Tensor, seed: int = 0) -> tuple[Tensor, dict[str, float]]:
    with method.networks.active("student"):
        return method.student_loss(condition, real, torch.Generator().manual_seed(seed))


def test_levels_are_neighbours_on_the_grid():
    sigma, until = grid_levels(SIGMAS, 200, torch.Generator().manual_seed(0))
    after = dict(zip(SIGMAS, (*SIGMAS[1:], 0.0), strict=True))
    assert set(sigma.tolist()) == set(SIGMAS) and [after[s] for s in sigma.tolist()] == until.tolist()


def test_only_the_student_learns_and_the_known_frame_counts_nowhere(method):
    condition, real = batch(method)
    value, watched = loss(method, condition, real)
    found = torch.autograd.grad(value, method.networks.parameters("student"), allow_unused=True)
    assert sum(float(g.abs().sum()) for g in found if g is not None) > 0
    assert watched["drift"] > 0
    real = real.clone()
    real[:, :, 0] += 10
    assert torch.equal(loss(method, condition, real)[0], value)


def test_at_the_last_level_the_target_is_the_end_of_the_way(method):
    """Two guided Euler steps from 0.25 to 0, written out; the student's own prediction at 0 plays no part."""
    condition, real = batch(method)
    reasoner = method.reasoner
    settings, reasoner.settings = reasoner.settings, replace(reasoner.settings, timesteps=(250,))
    try:
        value, _ = loss(method, condition, real)
    finally:
        reasoner.settings = settings
    draw = torch.Generator().manual_seed(0)
    torch.randint(1, (2,), generator=draw)
    x = start = 0.75 * real + 0.25 * torch.randn(real.shape, generator=draw)
    empty = replace(condition, prompt_embeds=method.empty.repeat(2, 1, 1))
    with torch.no_grad():
        with method.networks.active("real") as network:
            for sigma in (0.25, 0.125):
                both = [reasoner.velocity(c, x, sigma, transformer=network) for c in (empty, condition)]
                x = x - 0.125 * (both[0] + 2.0 * (both[1] - both[0]))
        with method.networks.active("student") as network:
            x0 = reasoner.predict_clean_at(condition, start, 0.25, transformer=network)
    torch.testing.assert_close(value.detach(), (x0 - x)[:, :, 1:].square().mean(), rtol=1e-4, atol=1e-6)


def test_bad_settings_are_named():
    with pytest.raises(InputError, match="substeps must be a whole number of at least 1, not 0"):
        ConsistencySettings(substeps=0)
    with pytest.raises(InputError, match="guidance must be 0 or greater, not nan"):
        ConsistencySettings(guidance=float("nan"))
