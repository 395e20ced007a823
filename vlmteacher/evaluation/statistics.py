"""Statistics of rows: means over scenes, bootstrap intervals and paired tests.

Several noises of one scene are averaged first: intervals and tests are over scenes. All draws have a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from statistics import fmean

import numpy as np

from vlmteacher.evaluation.benchmark import Benchmark, key_of, mean
from vlmteacher.evaluation.methods import Row

RESAMPLES = 10_000
DRAWS = 2**22  # held in memory at a time
Interval = tuple[float, float] | tuple[None, None]


def by_scene(rows: Sequence[Row], value: str) -> dict[tuple[str, int], float]:
    """Return the mean of an entry over the noises of each scene; nothing where a row has no value."""
    if mean(rows, value) is None:
        return {}
    scenes: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        scenes.setdefault((row["split"], row["index"]), []).append(float(row[value]))
    return {scene: fmean(values) for scene, values in scenes.items()}


def average_noises(rows: Sequence[Row]) -> list[Row]:
    """Return one row for each scene, whose score and subscores are the means over its noises."""
    scenes: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        scenes.setdefault((row["split"], row["index"]), []).append(row)
    return [
        group[0]
        | {"score": fmean(row["score"] for row in group)}
        | {"subscores": {name: fmean(row["subscores"][name] for row in group) for name in group[0]["subscores"]}}
        for group in scenes.values()
    ]


def bootstrap(values: Sequence[float]) -> Interval:
    """Return the 95% percentile interval of the mean by resampling `values`; None without values."""
    if not values:
        return None, None
    array, generator = np.asarray(values), np.random.default_rng(0)
    means = [array[generator.integers(len(array), size=(rows, len(array)))].mean(1) for rows in _chunks(len(array))]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def _chunks(count: int) -> Iterator[int]:
    """Yield numbers of resamples of `count` values, `RESAMPLES` in all, that fit in memory."""
    most = max(1, DRAWS // count)
    for start in range(0, RESAMPLES, most):
        yield min(most, RESAMPLES - start)


def bootstrap_within(terms: Sequence[float], groups: Sequence[Hashable]) -> Interval:
    """Return the 95% percentile interval of the sum of `terms` by resampling within each group; None without terms.

    groups: of each term; a group keeps its number of terms.
    """
    if not terms:
        return None, None
    values: dict[Hashable, list[float]] = {}
    for term, group in zip(terms, groups, strict=True):
        values.setdefault(group, []).append(term)
    generator, sums = np.random.default_rng(0), np.zeros(RESAMPLES)
    for members in values.values():
        array = np.asarray(members)
        drawn = (array[generator.integers(len(array), size=(rows, len(array)))] for rows in _chunks(len(array)))
        sums += np.concatenate([sample.sum(1) for sample in drawn])
    low, high = np.quantile(sums, (0.025, 0.975))
    return float(low), float(high)


def interval(benchmark: Benchmark, rows: Sequence[Row], value: str) -> Interval:
    """Return the interval of the mean of an entry, by resampling scenes as the benchmark asks for."""
    scenes = by_scene(rows, value)
    if not benchmark.within_tasks:
        return bootstrap(list(scenes.values()))
    tasks = {(row["split"], row["index"]): (row["split"], row["task"]) for row in rows}
    return bootstrap_within([one / len(scenes) for one in scenes.values()], [tasks[scene] for scene in scenes])


def overall(benchmark: Benchmark, rows: Sequence[Row]) -> dict[str, Row]:
    """Return the benchmark's overall scores (see `Benchmark.terms`) with their intervals, within tasks."""
    scenes = average_noises(rows)
    tasks = [(row["split"], row["task"]) for row in scenes]
    values = {}
    for name, terms in benchmark.terms(scenes).items():
        low, high = bootstrap_within(terms, tasks)
        values[name] = {"value": math.fsum(terms), "low": low, "high": high}
    return values


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of the sign test: wins and losses at least this uneven if both are as likely."""
    count = wins + losses
    tail = sum(math.comb(count, k) for k in range(min(wins, losses) + 1)) / 2**count
    return min(1.0, 2 * tail)


def permutation_test(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the mean difference under random signs."""
    array, generator = np.asarray(differences), np.random.default_rng(0)
    sums = [generator.choice((-1.0, 1.0), size=(rows, len(array))) @ array for rows in _chunks(len(array))]
    extreme = np.abs(np.concatenate(sums)) >= abs(array.sum()) - 1e-9
    return float((extreme.sum() + 1) / (RESAMPLES + 1))


def compare(rows: Sequence[Row], others: Sequence[Row]) -> Row:
    """Compare two methods on the instances that both have: mean differences (`rows` minus `others`), paired tests.

    In a benchmark that only has scores, the entries of the success are None. The interval resamples all scenes.
    """
    both = {key_of(row) for row in rows} & {key_of(row) for row in others}
    values = {}
    for entry in ("success", "score"):
        ours, theirs = (by_scene([r for r in group if key_of(r) in both], entry) for group in (rows, others))
        values[entry] = [ours[scene] - theirs[scene] for scene in ours]
    low, high = bootstrap(values["success"])
    wins, losses = (sum(sign * value > 0 for value in values["success"]) for sign in (1, -1))
    return {
        "n": len(both),
        "success_difference": fmean(values["success"]) if values["success"] else None,
        "low": low,
        "high": high,
        "wins": wins,
        "losses": losses,
        "sign_p": sign_test(wins, losses) if values["success"] else None,
        "score_difference": fmean(values["score"]),
        "permutation_p": permutation_test(values["score"]),
    }
