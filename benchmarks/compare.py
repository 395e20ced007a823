"""Compare two results of the same benchmark, before and after a change: ratios of time, case by case.

    python -m benchmarks.compare OLD.json NEW.json [--json]

A file is pytest-benchmark's (`pytest benchmarks/suite --benchmark-json FILE`; its medians are compared), or the output
of `python -m benchmarks.NAME --json`, whose last line is the result. A ratio above 1 means that NEW is faster. Seconds
of two runs are only comparable on an idle machine; so for our own benchmarks the speed-ups over stock, measured in
alternation within each run, are compared too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from vlmteacher.errors import InputError


def read(path: str) -> dict[str, dict[str, float]]:
    """The results of a file by case: "ms", and for our own benchmarks "speedup".

    Raises InputError: the file cannot be read, or is not a result.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error})") from error
    for candidate in (text, (text.strip().splitlines() or [""])[-1]):
        try:
            result = json.loads(candidate)
            if "benchmarks" in result:
                return {row["fullname"]: {"ms": 1e3 * row["stats"]["median"]} for row in result["benchmarks"]}
            name, where = result["benchmark"], f"{result['device']}, {result['dtype']}"
            return {
                f"{name}: {row['case']} ({where})": {"ms": row["ours_ms"], "speedup": row["speedup"]}
                for row in result["rows"]
            }
        except (ValueError, KeyError, TypeError):
            continue
    raise InputError(f"{path} is not a result: give pytest-benchmark's JSON, or what a benchmark printed with --json")


def compare(old: dict[str, dict[str, float]], new: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Compare the cases of two results: {"rows": one per case, "summary": geometric means, "only_old", "only_new"}.

    Raises InputError: no case in common.
    """
    rows: list[dict[str, Any]] = []
    for case in old.keys() & new.keys():
        before, after = old[case], new[case]
        row: dict[str, Any] = {
            "case": case,
            "old_ms": before["ms"],
            "new_ms": after["ms"],
            "ratio": before["ms"] / after["ms"],
        }
        if "speedup" in before and "speedup" in after:
            row["speedup_ratio"] = after["speedup"] / before["speedup"]
        rows.append(row)
    if not rows:
        raise InputError("the two results have no case in common: compare runs of the same benchmark and device")
    rows.sort(key=lambda row: list(old).index(row["case"]))
    summary = {
        name: statistics.geometric_mean(row[name] for row in rows if name in row)
        for name in ("ratio", "speedup_ratio")
        if any(name in row for row in rows)
    }
    only_old, only_new = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
    return {"rows": rows, "summary": summary, "only_old": only_old, "only_new": only_new}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    try:
        comparison = compare(read(arguments.old), read(arguments.new))
    except InputError as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    for row in comparison["rows"]:
        more = f"  x{row['speedup_ratio']:.2f} against stock" if "speedup_ratio" in row else ""
        print(f"{row['case']:<72} {row['old_ms']:10.3f} -> {row['new_ms']:10.3f} ms  x{row['ratio']:.2f}{more}")
    for name in ("old", "new"):
        for case in comparison[f"only_{name}"]:
            print(f"{case:<72} only in {name}")
    print("mean: " + ", ".join(f"{name} {value:.2f}" for name, value in comparison["summary"].items()))
    if arguments.json:
        print(json.dumps(comparison))


if __name__ == "__main__":
    main()
