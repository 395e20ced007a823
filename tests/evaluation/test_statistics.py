"""Statistics with known answers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from vlmteacher.evaluation import statistics
from vlmteacher.evaluation.statistics import (
    average_noises,
    bootstrap,
    bootstrap_within,
    compare,
    permutation_test,
    sign_test,
)


def rows(successes: list[int], noise: int = 0, split: str = "id") -> list[dict[str, Any]]:
    return [
        {"split": split, "index": k, "noise": noise, "success": bool(s), "score": 0.2 + 0.5 * s}
        for k, s in enumerate(successes)
    ]


def test_sign_test() -> None:
    assert sign_test(11, 0) == pytest.approx(2 / 2**11)
    assert sign_test(0, 11) == sign_test(11, 0)
    assert sign_test(0, 0) == sign_test(4, 4) == 1
    assert sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)


def test_permutation_test() -> None:
    differences = [0.5, 0.1, -0.2, 0.7, 0.3, 0.4, -0.1]
    flips = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in SIGNS]
    exact = np.mean([flip >= abs(sum(differences)) - 1e-9 for flip in flips])
    assert permutation_test(differences) == pytest.approx(exact, abs=0.02)
    assert permutation_test([0.0] * 5) == 1
    assert permutation_test([1.0] * 40) < 1e-3


SIGNS = list(itertools.product((-1, 1), repeat=7))


def test_bootstrap() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(60):
        low, high = bootstrap(list(rng.normal(0.3, 1, 80)))
        covered += low <= 0.3 <= high
        assert high - low == pytest.approx(2 * 1.96 / math.sqrt(80), rel=0.3)
    assert 51 <= covered <= 60
    assert bootstrap([1.0] * 7) == (1.0, 1.0)


def test_compare_pairs_scenes_and_means_their_noises() -> None:
    ours = rows([1, 1, 0, 1]) + rows([1, 0, 0, 1], noise=1)
    result = compare(ours, rows([0, 1, 0, 1]))  # on the noise that both have
    assert (result["n"], result["wins"], result["losses"]) == (4, 1, 0)
    assert result["success_difference"] == 0.25 and result["score_difference"] == pytest.approx(0.125)
    result = compare(ours, rows([0, 1, 0, 1]) + rows([0, 1, 0, 1], noise=1))
    assert (result["n"], result["wins"], result["losses"]) == (8, 1, 1)
    assert result["success_difference"] == pytest.approx((1 - 0.5) / 4)
    assert result["low"] < result["success_difference"] < result["high"]


def test_bootstrap_within_groups() -> None:
    """Only the spread within groups counts; groups keep their sizes."""
    groups = ["a"] * 40 + ["b"] * 20
    terms = [10 / 60] * 40 + [-10 / 60] * 20
    assert bootstrap_within(terms, groups) == (pytest.approx(200 / 60), pytest.approx(200 / 60))
    assert bootstrap_within([], []) == (None, None)
    rng = np.random.default_rng(5)
    values = np.concatenate([rng.normal(5, 1, 40), rng.normal(-5, 2, 20)])
    low, high = bootstrap_within(list(values / 60), groups)
    assert low is not None and high is not None and low < values.mean() < high
    spread = math.sqrt(40 * values[:40].var() + 20 * values[40:].var()) / 60
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.05)
    whole = bootstrap(list(values))
    assert whole[1] is not None and whole[0] is not None and whole[1] - whole[0] > 2 * (high - low)


def test_noises_are_averaged_first() -> None:
    two = [row | {"subscores": {"a": row["score"], "b": 0.5}} for row in rows([1, 0]) + rows([0, 0], noise=1)]
    first, second = average_noises(two)
    assert first["score"] == first["subscores"]["a"] == pytest.approx(0.45) and first["subscores"]["b"] == 0.5
    assert second["score"] == pytest.approx(0.2)


def test_draws_in_parts_are_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tables need no more memory, and get the intervals of one draw."""
    values = list(np.random.default_rng(1).normal(0.02, 1, 37))
    whole = bootstrap(values), permutation_test(values), bootstrap_within(values, [k % 3 for k in range(37)])
    monkeypatch.setattr(statistics, "DRAWS", 1000)
    assert (bootstrap(values), permutation_test(values)) == whole[:2]
    assert bootstrap_within(values, [k % 3 for k in range(37)]) == whole[2]
