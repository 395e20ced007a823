from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from vlmteacher.errors import InputError
from vlmteacher.optimization.frames import teacher_frame_indices
from vlmteacher.optimization.guards import GUARDS, frame_contrast, frame_guards
from vlmteacher.optimization.objective import Metrics


def test_packed_metrics_are_read_under_their_names() -> None:
    frames = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    losses, latents = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, torch.nan])
    packed = Metrics.pack(torch.tensor(0.25), latents, frames, losses)
    metrics = Metrics.unpack(packed, queries=3)
    assert metrics.loss == 0.25 and metrics.latents_nan and metrics.grad_norm is None
    assert (metrics.frames_min, metrics.frames_max) == (frames.min().item(), frames.max().item())
    assert metrics.guards == dict(zip(GUARDS, frame_guards(frames).tolist(), strict=True))
    assert metrics.contrast == frame_contrast(frames).item()
    assert metrics.p_yes == losses.neg().exp().tolist()
    with_norm = Metrics.unpack(torch.cat([packed, torch.tensor([7.0])]), queries=3)
    assert with_norm.grad_norm == 7.0 and with_norm.p_yes == metrics.p_yes


def test_evaluate_and_backward_leave_what_a_step_needs(make_loop: Any) -> None:
    """The loss of the metrics is without the pull, the gradient on the parameters is clipped."""
    loop = make_loop(pull=1.0)
    objective = loop.objective
    loss, packed = objective.evaluate()
    before = objective.read(packed)
    metrics = objective.read(objective.backward(loss, packed))
    assert before.grad_norm is None and metrics.grad_norm is not None and metrics.grad_norm > 0
    assert before.loss == loss.item()  # at its anchor the pull is 0
    norms = torch.stack([parameter.grad.norm() for parameter in objective.parameters])
    assert norms.norm().item() == pytest.approx(min(1.0, metrics.grad_norm), rel=1e-4)
    objective.anchor = objective.anchor + 1
    loss, packed = objective.evaluate()
    assert loss.item() == pytest.approx(before.loss + 1, rel=1e-4) and objective.read(packed).loss == before.loss


def test_frame_indices_are_uniform_with_both_ends() -> None:
    assert teacher_frame_indices(13, 12) == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]
    assert teacher_frame_indices(9, 5) == [0, 2, 4, 6, 8]
    assert teacher_frame_indices(9, 1) == [0]
    for count in (2, 24, 88, 89):
        indices = teacher_frame_indices(89, count)
        gaps = {b - a for a, b in pairwise(indices)}
        assert indices[0] == 0 and indices[-1] == 88 and len(indices) == count and max(gaps) - min(gaps) <= 1
    with pytest.raises(InputError, match="14 frames of a video of 13"):
        teacher_frame_indices(13, 14)
