from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlmteacher.optimization.guards import GUARDS, frame_guards


def guards(frames: Tensor) -> dict[str, float]:
    return dict(zip(GUARDS, frame_guards(frames).tolist(), strict=True))


def test_guards_on_pictures_whose_values_are_known() -> None:
    grey = torch.full((3, 3, 16, 16), 0.5)
    assert guards(grey) == pytest.approx(
        {"brightness": 0.5, "dark_fraction": 0, "edge_density": 0, "colour_entropy": 0, "temporal_jump": 0}, abs=1e-6
    )
    halves = torch.zeros(2, 3, 16, 16)
    halves[..., 8:] = 1
    halves[1] = 1 - halves[1]
    assert guards(halves) == pytest.approx(
        {"brightness": 0.5, "dark_fraction": 0.5, "edge_density": 1 / 15, "colour_entropy": 1, "temporal_jump": 1},
        abs=1e-6,
    )
    assert guards(grey[:1])["temporal_jump"] == 0
    large = torch.rand(1, 3, 704, 1280, generator=torch.Generator().manual_seed(0))
    assert guards(large)["brightness"] == pytest.approx(0.5, abs=0.01)
