"""Pool the microworld's tables of several seeds: ``python -m tools.pool_seeds DIR DIR ... --out DIR [--note TEXT]``.

    for seed in 402 403 405; do
        vlmteacher bench microworld --table rewards --seed $seed --limit 100 --workers 2 --out runs/rewards-$seed
    done
    python -m tools.pool_seeds runs/rewards-402 runs/rewards-403 runs/rewards-405 --out runs/pooled

The pooled table.json has the same entries as those of the runs, over all their scenes: intervals and tests resample the
scenes of all seeds. Beside them it has each method against `teacher`, and under "tasks" the scenes that `teacher` wins
and loses against `base` in every task of every split.

A split tells less the more often methods were run on it. docs/results/seeds.json counts the runs on the tests of every
seed; this command adds one to those that it pools, with the methods and the note.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmteacher.errors import InputError
from vlmteacher.evaluation.formats import write_table
from vlmteacher.evaluation.methods import Row
from vlmteacher.evaluation.microworld import Bench
from vlmteacher.evaluation.statistics import compare
from vlmteacher.evaluation.tables import Table, describe_table, find_table
from vlmteacher.files import read_json, write_json
from vlmteacher.microworld.world import FAMILIES

LOG = Path(__file__).parents[1] / "docs/results/seeds.json"
APART = 1_000_000  # from the indices of one seed's scenes to those of the next
METHOD, BASE = "teacher", "base"


def read_rows(folder: Path, content: Mapping[str, Any], place: int) -> dict[str, list[Row]]:
    """The rows of every method in the folder of a table, with the indices of the `place`-th seed."""
    rows = {}
    for method in content["methods"]:
        instances = read_json(folder / method / "results.json", "results")["instances"]
        rows[method] = [row | {"index": row["index"] + APART * place} for row in instances]
    return rows


def pooled(folders: Sequence[Path]) -> dict[str, Any]:
    """The table.json of all scenes of the tables in `folders`.

    Raises InputError: one is no table of the microworld, or of another table, pair or families than the first; two have
    the same seed.
    """
    contents = [read_json(folder / "table.json", "table") for folder in folders]
    for folder, content in zip(folders, contents, strict=True):
        if content.get("benchmark") != "microworld":
            raise InputError(f"{folder} is no table of the microworld: run bench microworld --table rewards")
        for name in {*contents[0], *content} - {"caption", "seed", "methods", "left_out", "paper"}:
            if content.get(name) != contents[0].get(name):
                raise InputError(f"{folder} differs from {folders[0]} in {name}: pool runs of one command")
        if content["methods"].keys() != contents[0]["methods"].keys():
            raise InputError(f"{folder} has other methods than {folders[0]}: complete both by --resume")
    seeds = [content["seed"] for content in contents]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"two folders have the same seed ({', '.join(map(str, seeds))}): give one of each")
    each = [read_rows(*given, place) for place, given in enumerate(zip(folders, contents, strict=True))]
    rows = {method: [row for one in each for row in one[method]] for method in each[0]}
    table = find_table(contents[0]["table"])
    table = replace(table, against=(*table.against, *{METHOD} - set(table.against)))
    benchmark = Bench(families=tuple(contents[0].get("families", FAMILIES)))
    first = {name: value for name, value in contents[0].items() if name not in ("seed", "methods")}
    described = describe_table(table, benchmark, rows, first["missing"])
    pooling = {"caption": f"The microworld, seeds {', '.join(map(str, seeds))} pooled.", "seeds": seeds}
    return {**first, "methods": described["methods"], **pooling, "tasks": tasks(table, rows)}


def tasks(table: Table, rows: Mapping[str, Sequence[Row]]) -> dict[str, Row]:
    """How `METHOD` compares with `BASE` in each task of each split: success of both, wins, losses and the sign test."""
    if METHOD not in rows or BASE not in rows:
        return {}
    parts = {}
    for split, task in sorted({(row["split"], row["task"]) for row in rows[METHOD]}):
        ours, base = (
            [row for row in rows[name] if (row["split"], row["task"]) == (split, task)] for name in (METHOD, BASE)
        )
        success = {
            name: sum(row["success"] for row in part) / len(part) for name, part in ((METHOD, ours), (BASE, base))
        }
        test = {name: compare(ours, base)[name] for name in ("wins", "losses", "sign_p")}
        parts[f"{split}/{task}"] = {"n": len(ours), **success, **test}
    return parts


def count_run(seeds: Sequence[int], methods: Sequence[str], note: str, log: Path) -> dict[str, Any]:
    """Add a run to the seeds' log; return its content."""
    content = json.loads(log.read_text())
    for seed in seeds:
        entry = content.setdefault(str(seed), {"runs": 0, "made": []})
        if entry["runs"] is not None:  # null: not counted from the start
            entry["runs"] += 1
        entry["made"].append({"methods": list(methods), "note": note})
    write_json(log, content)
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="--out of bench microworld --table")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pooled table.json, .md, .csv and .tex")
    parser.add_argument("--note", default="", help="what was run, for the seeds' log")
    arguments = parser.parse_args()
    content = pooled(arguments.folders)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_table(content, arguments.out)
    log = count_run(content["seeds"], list(content["methods"]), arguments.note, LOG)
    print((arguments.out / "table.md").read_text())
    print("\n".join(f"seed {seed}: {log[str(seed)]['runs']} runs" for seed in content["seeds"]))


if __name__ == "__main__":
    main()
