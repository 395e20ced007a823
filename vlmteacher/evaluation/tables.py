"""The paper's Tables I and III in miniature, and a table of the remedies against reward hacking.

Every method solves the same scenes from the same noises. Intervals and tests are over scenes; several noises of one
scene are averaged first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from vlmteacher.errors import InputError
from vlmteacher.evaluation.benchmark import Benchmark, Instance, cost_means, key_of, mean
from vlmteacher.evaluation.failures import CAUSES, explain
from vlmteacher.evaluation.folder import Folder, Queries, queries_of
from vlmteacher.evaluation.methods import Row, find_method, steps
from vlmteacher.evaluation.sweep import check_complete, start_workers, write_results
from vlmteacher.files import claimed, write_json

RESAMPLES = 10_000


@dataclass(frozen=True)
class Table:
    """The methods of a table.

    Attributes:
        splits: the splits that it is computed on.
        main: methods that run with every noise.
        others: methods that run with the first noise only.
        against: the baselines that every method is compared with.
    """

    splits: tuple[str, ...]
    main: tuple[str, ...]
    others: tuple[str, ...]
    against: tuple[str, ...]


FIXED = (0, 5, 10, 16, 20, 40)  # numbers of updates in the paper's ablation
TABLES = {
    "paper": Table(
        splits=("id", "ood"),
        main=("base", "pass@5", "teacher"),
        others=(
            "final@1",
            *(f"steps@{n}" for n in FIXED),
            *("process-only", "goal-only", "generic", "many-step", "last-step", "full-step"),
            *("frames@half", "frames@double", "pe", "videotpo"),
        ),
        against=("base", "pass@5"),
    ),
    "remedies": Table(
        splits=("validation",),
        main=("base", "teacher"),
        others=(
            *("keep-best", "threshold@0.1", "threshold@0.05", "check-final", "preserve"),
            *("jitter@2", "decay@1", "decay@10", "pull@0.1", "pull@1", "final@1"),
        ),
        against=("base", "teacher"),
    ),
}


def run_table(
    table: Table, benchmark: Benchmark, limit: int, noises: int, out: Path, workers: int = 1, resume: bool = False
) -> Row:
    """Run every method of `table` on the first `limit` scenes of each of its splits; write and return table.json.

    Each method has a folder in `out` with its results.json; with `resume`, finished instances are not run again.
    noises: the number of noises per scene for the table's main methods.

    Raises as `run_method` does. If instances failed, table.json is not written: it would compare methods on
    different scenes.
    """
    if out.exists() and not resume and any(out.iterdir()):
        raise InputError(f"{out} is not empty: give another --out, or --resume to go on with its table")
    names = table.main + table.others
    wanted = {name: benchmark.instances(table.splits, limit, noises if name in table.main else 1) for name in names}
    fixed = [int(name.partition("@")[2]) for name in names if name.startswith("steps@") and name != "steps@0"]
    missing: dict[str, str] = {}
    results: dict[str, list[Row]] = {}
    queries: dict[tuple[str, int], Queries] = {}
    failed: dict[Instance, str] = {}
    with claimed(out), start_workers(workers, benchmark) as work:
        for name in names:
            if name == "steps@0":  # no update: the base video
                base = {key_of(row): row for row in results["base"]}
                results[name] = [base[one.key] | {"method": name} for one in wanted[name] if one.key in base]
            elif name not in results:
                method = steps(*fixed) if name.startswith("steps@") else find_method(name)
                try:
                    benchmark.check(method)
                except InputError as error:
                    missing[name] = str(error)
                    continue
                with Folder(out / method.name, benchmark, method, table.splits, resume) as folder:
                    results |= folder.complete(wanted[name], work, queries)
                failed |= folder.failed
                asked = [row for row in results[name] if "queries" in row]  # controls ask none
                queries = queries or {(row["split"], row["index"]): queries_of(row) for row in asked}
            write_results(out / name, benchmark, name, results[name], wanted[name])
    check_complete(out, failed)
    content = {
        **benchmark.described(),
        "splits": list(table.splits),
        "limit": limit,
        "noises": noises,
        "methods": {name: describe(name, results, table) for name in names if name in results},
        "missing": missing,
    }
    write_json(out / "table.json", content)
    return content


# ---------------------------------------------------------------- statistics


def by_scene(rows: Sequence[Row], value: str) -> dict[tuple[str, int], float]:
    """Return the mean of an entry over the noises of each scene; nothing where a row has no value."""
    if mean(rows, value) is None:
        return {}
    scenes: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        scenes.setdefault((row["split"], row["index"]), []).append(float(row[value]))
    return {scene: fmean(values) for scene, values in scenes.items()}


def bootstrap(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Return the 95% percentile interval of the mean by resampling `values`, with a fixed seed; None without values."""
    if not values:
        return None, None
    array = np.asarray(values)
    drawn = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(array[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of the sign test: wins and losses at least this uneven if both are as likely."""
    count = wins + losses
    tail = sum(math.comb(count, k) for k in range(min(wins, losses) + 1)) / 2**count
    return min(1.0, 2 * tail)


def permutation_test(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the mean difference under random signs, with a fixed seed."""
    array = np.asarray(differences)
    signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(RESAMPLES, len(array)))
    extreme = np.abs(signs @ array) >= abs(array.sum()) - 1e-9
    return float((extreme.sum() + 1) / (RESAMPLES + 1))


def compare(rows: Sequence[Row], others: Sequence[Row]) -> Row:
    """Compare two methods on the instances that both have: mean differences (`rows` minus `others`), paired tests.

    In a benchmark that only has scores, the entries of the success are None.
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


def describe(name: str, results: Mapping[str, Sequence[Row]], table: Table) -> Row:
    """Return one method's entry of table.json. results: rows by method."""
    rows = results[name]
    entry: Row = {"n": len(rows)}
    for value, low, high in (("success", "low", "high"), ("score", "score_low", "score_high")):
        entry["success_rate" if value == "success" else value] = mean(rows, value)
        entry[low], entry[high] = bootstrap(list(by_scene(rows, value).values()))
    for split in table.splits:
        here = [row for row in rows if row["split"] == split]
        entry[split] = {"success_rate": mean(here, "success"), "score": mean(here, "score")}
    noises = sorted({row["noise"] for row in rows})
    entry["by_noise"] = [mean([row for row in rows if row["noise"] == k], "success") for k in noises]
    if "oracle_success" in rows[0]:
        entry["oracle"] = {
            "success_rate": None if entry["success_rate"] is None else fmean(row["oracle_success"] for row in rows),
            "score": fmean(row["oracle_score"] for row in rows),
        }
    entry |= explain(rows)
    entry["updates_mean"] = fmean(row["updates"] for row in rows)
    entry |= cost_means(rows)
    entry["against"] = {other: compare(rows, results[other]) for other in table.against if other != name}
    return entry


# ---------------------------------------------------------------- as text


def format_table(content: Row, table: Table) -> str:
    """Format table.json as Markdown: the methods' results, then the causes of their failures."""
    columns = ["method", "success [95%]", *table.splits, "score [95%]"]
    columns += [f"against {other}: success, p; score, p" for other in table.against]
    columns += ["updates", "seconds", "n"]
    lines = [columns, ["---"] * len(columns)]
    for name, entry in content["methods"].items():
        cells = [name, _interval(entry["success_rate"], entry["low"], entry["high"])]
        cells += [_number(entry[split]["success_rate"]) for split in table.splits]
        cells += [_interval(entry["score"], entry["score_low"], entry["score_high"])]
        cells += [_against(entry["against"].get(other)) for other in table.against]
        cells += [f"{entry['updates_mean']:.1f}", f"{entry['seconds_mean']:.1f}", str(entry["n"])]
        lines.append(cells)
        if "oracle" in entry:
            rest = [""] * (len(columns) - 3 - len(table.splits))
            oracle = entry["oracle"]
            lines.append(
                [
                    f"{name}, the scorer's choice",
                    _number(oracle["success_rate"]),
                    *[""] * len(table.splits),
                    f"{oracle['score']:.3f}",
                    *rest,
                ]
            )
    causes = [name.replace("_", "-") for name in CAUSES]
    why = [["method", "failures", *causes, "judgements", "wrong answer", "wrong query"]]
    why.append(["---"] * len(why[0]))
    for name, entry in content["methods"].items():
        if "failures" in entry:
            counts = [sum(entry["failures"].values()), *entry["failures"].values(), entry["judgements"]]
            why.append([name, *map(str, counts), f"{entry['perception']:.3f}", f"{entry['wrong_query']:.3f}"])
    parts = [_markdown(lines), *([_markdown(why)] if len(why) > 2 else [])]
    parts.append("\n".join(f"Not run: {name}: {reason}" for name, reason in content["missing"].items()))
    return "\n\n".join(parts)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(value: float | None, low: float, high: float) -> str:
    return "" if value is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _against(comparison: Row | None) -> str:
    if comparison is None:
        return ""
    score = f"{comparison['score_difference']:+.3f}, {comparison['permutation_p']:.3f}"
    if comparison["success_difference"] is None:
        return score
    return f"{comparison['success_difference']:+.3f}, {comparison['sign_p']:.3f}; {score}"
