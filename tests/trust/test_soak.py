"""A short form of `soak.py`: it looks for what stays after every instance, not for a percent."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trust.soak import growth, soak


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_memory_stays(tmp_path: Path) -> None:
    found = soak(48, tmp_path)
    assert (found.refused, found.broken) == (6, 6)
    assert found.objects < 0.01, found  # an instance that left its activations behind would leave more
    assert found.memory < 0.1, found


def test_growth() -> None:
    assert growth([0, *[100] * 19]) == 0
    assert growth([100 + n for n in range(20)]) == pytest.approx((118.5 - 102.5) / 102.5)
