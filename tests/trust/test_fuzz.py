"""Damaged inputs are refused in one line: see `fuzz.py`. FUZZ_EXAMPLES in the environment says how many of each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.trust import fuzz
from tests.trust.report import count

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(fuzz.folder() / "cache"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", fuzz.TARGETS, ids=lambda target: target.name)
def test_every_input_is_read_or_refused(target: fuzz.Target) -> None:
    """By default few, and the same each time; `make fuzz` tries others, at least 10,000."""
    tried = 0
    many = EXAMPLES > 0

    @settings(
        max_examples=max(EXAMPLES // target.cost, 20) if many else max(60 // target.cost, 5),
        derandomize=not many,
        deadline=20_000,  # milliseconds: what takes longer hangs
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        print_blob=True,
    )
    @given(st.data())
    def trial(data: Any) -> None:
        nonlocal tried
        example = data.draw(target.inputs)
        tried += 1
        fuzz.check(target, example)

    trial()
    count(f"fuzzed: {target.name}", tried, "a value, or one line")
    print(f"{target.name}: {tried} inputs")


def test_a_device_is_no_endless_file() -> None:
    """A size limit before reading."""
    from vlmteacher.errors import InputError
    from vlmteacher.queries import QuerySet

    with pytest.raises(InputError, match="larger than"):
        QuerySet.load(Path("/dev/zero"))
