"""Tables of methods: the paper's Tables I to IV, on any benchmark, and those of rewards, warm starts and remedies.

Every method solves the same scenes from the same noises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from vlmteacher.errors import InputError
from vlmteacher.evaluation.benchmark import Benchmark, Instance, cost_means, key_of, mean, means
from vlmteacher.evaluation.failures import explain
from vlmteacher.evaluation.folder import Folder, Queries, Work, queries_of
from vlmteacher.evaluation.formats import write_table
from vlmteacher.evaluation.methods import Method, Row, find_method, samples, steps
from vlmteacher.evaluation.models import Models
from vlmteacher.evaluation.paper import figures
from vlmteacher.evaluation.statistics import compare, interval, overall
from vlmteacher.evaluation.sweep import check_complete, start_workers, write_results
from vlmteacher.files import claimed


@dataclass(frozen=True, kw_only=True)
class Table:
    """The methods and the columns of a table.

    Attributes:
        name: on the command line.
        main: methods that run with every noise.
        others: methods that run with the first noise only.
        against: the baselines that every method is compared with.
        teachers, reasoners: methods that run once more with every other Teacher, or Reasoner, that is given.
        parts: what is scored apart, beside the splits.
        controls: whether it has the benchmark's controls.
        tuning: whether it is computed on the splits to choose settings on, instead of those to test on.
        noises: of the main methods, where no number is chosen.
    """

    name: str = ""
    main: tuple[str, ...]
    others: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()
    reasoners: tuple[str, ...] = ()
    parts: Literal["", "category in split", "category", "task"] = ""
    controls: bool = False
    tuning: bool = False
    noises: int = 1


FIXED = (0, 5, 10, 16, 20, 40)  # numbers of updates in the paper's ablation
TPO = "videotpo@2"  # the rounds that the paper's seconds imply
ABLATIONS = (
    *("post", "flow-grpo", "generic", "goal-only", "process-only"),
    *("many-step", "last-step", "full-step", "frames@half", "frames@double"),
    *(f"steps@{n}" for n in FIXED),
)
TABLES = {
    table.name: table
    for table in (
        Table(
            name="I",
            main=("base", "pass@2", "pass@3", "pass@4", "pass@5", TPO, "teacher"),
            others=("many-step-base",),
            against=("base", "pass@5"),
            parts="category in split",
            controls=True,
        ),
        Table(
            name="II",
            main=("base", "pass@5", "pe", TPO, "teacher"),
            others=("many-step-base",),
            against=("base", "pass@5"),
            parts="task",
            controls=True,
        ),
        Table(name="III", main=("base", "teacher"), others=ABLATIONS, against=("base", "teacher")),
        Table(
            name="IV", main=("base", "teacher"), teachers=("teacher",), reasoners=("base", "teacher"), parts="category"
        ),
        Table(
            name="paper",
            main=("base", "pass@5", "teacher"),
            others=(
                "final@1",
                *(f"steps@{n}" for n in FIXED),
                *("process-only", "goal-only", "generic", "many-step", "last-step", "full-step"),
                *("frames@half", "frames@double", "pe", "videotpo"),
            ),
            against=("base", "pass@5"),
            noises=3,
        ),
        Table(
            name="rewards",
            main=("base", "pass@5", "teacher"),
            others=("goal-only", "process-only"),
            against=("base", "pass@5", "teacher"),
        ),
        Table(name="warm", main=("base", "teacher", "warm", "warm-mean"), against=("base", "teacher")),
        Table(
            name="remedies",
            main=("base", "teacher"),
            others=(
                *("pull@0.1", "pull@1", "statistics@1", "statistics@10", "jitter@2", "decay@1", "decay@10"),
                *("keep-best", "threshold@0.1", "threshold@0.01", "check-final", "preserve", "final@1"),
            ),
            against=("base", "teacher"),
            tuning=True,
            noises=3,
        ),
    )
}


def find_table(name: str) -> Table:
    """Return the table of this name. Raises InputError."""
    if name not in TABLES:
        raise InputError(f"unknown --table {name}: choose from {', '.join(TABLES)}")
    return TABLES[name]


def splits_of(table: Table, benchmark: Benchmark) -> tuple[str, ...]:
    """Return the splits that a table is computed on. Raises InputError where a benchmark has none to tune on."""
    if not table.tuning:
        return benchmark.test_splits or benchmark.splits
    if not benchmark.tuning_splits:
        raise InputError(
            f"--table {table.name} is to choose settings by, and all of {benchmark.name} is to test on: take microworld"
        )
    return benchmark.tuning_splits


def run_table(
    table: Table,
    benchmark: Benchmark,
    limit: int,
    noises: int,
    out: Path,
    workers: int | None = None,
    resume: bool = False,
    teachers: Sequence[str] = (),
    reasoners: Sequence[str] = (),
    ray: str | None = None,
    keep_videos: bool = False,
) -> Row:
    """Run every method of `table` on the first `limit` scenes of each of its splits; write and return table.json.

    Each method has a folder in `out` with its results.json; with `resume`, finished instances are not run again. The
    table is written as Markdown, CSV and LaTeX too (see `formats`).
    noises: the number of noises per scene for the table's main methods. teachers, reasoners: ids of other models, with
    each of which the table's methods for it are run too, under the method's name, "+" and the last part of the id.
    keep_videos: see `Folder`.

    Raises as `run_method` does, TaskFailed after the table is written: scenes of which an instance failed are left out
    of all methods with the same models, so that they are compared on the same scenes.
    """
    if out.exists() and not resume and any(out.iterdir()):
        raise InputError(f"{out} is not empty: give another --out, or --resume to go on with its table")
    splits = splits_of(table, benchmark)
    run = _Run(table, splits, limit, noises, out, resume, keep_videos)
    with claimed(out):
        with start_workers(workers, benchmark, ray) as work:
            run.methods(benchmark, table.main + table.others + (benchmark.controls if table.controls else ()), work)
        for suffix, (names, other) in other_models(table, benchmark, teachers, reasoners).items():
            with start_workers(workers, other, ray) as work:
                run.methods(other, names, work, suffix)
    content = describe_table(table, benchmark, run.results, run.missing)
    content |= {"limit": limit, "noises": noises, "left_out": run.left_out}
    if run.results:
        write_table(content, out)
    check_complete(out, run.failed)
    return content


def describe_table(
    table: Table, benchmark: Benchmark, results: Mapping[str, Sequence[Row]], missing: Mapping[str, str]
) -> Row:
    """Return the content of table.json. results: rows by method; missing: methods that were not run, and why."""
    splits = splits_of(table, benchmark)
    return {
        "benchmark": benchmark.name,
        "table": table.name,
        "caption": benchmark.caption(),
        **benchmark.described(),
        "splits": list(splits),
        "scale": benchmark.scale,
        "against": [name for name in table.against if name in results],
        "methods": {name: describe(benchmark, table, splits, name, results) for name in results},
        "missing": dict(missing),
        "paper": figures(benchmark.printed_as(), table.name, [*results, *missing]),
    }


def other_models(
    table: Table, benchmark: Benchmark, teachers: Sequence[str], reasoners: Sequence[str]
) -> dict[str, tuple[tuple[str, ...], Benchmark]]:
    """Return the methods to run with each other Teacher or Reasoner, and the benchmark with it, by their suffix.

    Raises InputError for two models of one name.
    """
    models = benchmark.models
    kept = ("teacher", "quantize", "dtype", "device", "device_map", "offload", "num_frames", "settings")
    own: dict[str, Any] = {name: getattr(models, name) for name in kept}  # the rest is the other Reasoner's own
    changed = [(model, table.teachers, replace(models, teacher=model)) for model in teachers]
    changed += [(model, table.reasoners, Models(**own | {"reasoner": model})) for model in reasoners]
    others = {f"+{Path(model).name}": (names, replace(benchmark, models=other)) for model, names, other in changed}
    if len(others) < len(changed):
        raise InputError("two of --other-teacher and --other-reasoner end in the same name: rename a folder")
    return others


class _Run:
    """The methods of a table that are run so far.

    Attributes:
        results: rows by method.
        missing: methods that cannot be run, with the reasons.
        failed: instances without a result.
        left_out: numbers of scenes that are left out, by the suffix of the methods.
    """

    def __init__(
        self,
        table: Table,
        splits: Sequence[str],
        limit: int,
        noises: int,
        out: Path,
        resume: bool,
        keep_videos: bool = False,
    ) -> None:
        self.table, self.splits, self.limit, self.noises = table, splits, limit, noises
        self.out, self.resume, self.keep_videos = out, resume, keep_videos
        self.results: dict[str, list[Row]] = {}
        self.missing: dict[str, str] = {}
        self.failed: dict[Instance, str] = {}
        self.left_out: dict[str, int] = {}

    def methods(self, benchmark: Benchmark, names: Sequence[str], work: Work, suffix: str = "") -> None:
        """Run methods with the models of `benchmark`. Queries are written once for a scene."""
        shared, failed = share(names), dict[Instance, str]()
        queries: dict[tuple[str, int], Queries] = {}
        for name in names:
            noises = self.noises if name in self.table.main else 1
            wanted = benchmark.instances(self.splits, self.limit, noises)
            label = name + suffix
            if name == "steps@0":  # no update: the base video
                base = {key_of(row): row for row in self.results.get("base" + suffix, [])}
                self.results[label] = [base[one.key] | {"method": name} for one in wanted if one.key in base]
            elif label not in self.results:
                try:
                    method = shared.get(name) or find_method(name)
                    benchmark.check(method)
                except InputError as error:
                    self.missing[label] = str(error)
                    continue
                # the order of instances with warm starts decides: they run in this process
                alone = start_workers(None, benchmark) if method.warm else nullcontext(work)
                where = self.out / (method.name + suffix)
                folder = Folder(where, benchmark, method, self.splits, self.resume, keep_videos=self.keep_videos)
                with alone as own, folder:
                    rows = folder.complete(wanted, own, queries)
                self.results |= {each + suffix: rows[each] for each in rows}
                failed |= folder.failed
                asked = [row for row in self.results[label] if "queries" in row]  # controls ask none
                queries = queries or {(row["split"], row["index"]): queries_of(row) for row in asked}
            write_results(self.out / label, benchmark, name, self.results[label], wanted)
        self.failed |= failed
        self._leave_out({(one.split, one.index) for one in failed}, [name + suffix for name in names], suffix)

    def _leave_out(self, scenes: set[tuple[str, int]], labels: Sequence[str], suffix: str) -> None:
        """Leave scenes out of methods."""
        if scenes:
            self.left_out[suffix] = len(scenes)
        for label in labels:
            rows = [row for row in self.results.pop(label, []) if (row["split"], row["index"]) not in scenes]
            if rows:
                self.results[label] = rows
            elif label not in self.missing:
                self.missing[label] = "it has no scene that all methods have solved"


def share(names: Sequence[str]) -> dict[str, Method]:
    """Return the methods that run several of `names` at once, by each of these: numbers of updates, and of samples."""
    shared: dict[str, Method] = {}
    for kind, make in (("steps", steps), ("pass", samples)):
        numbers = {name: int(name.partition("@")[2]) for name in names if name.startswith(f"{kind}@")}
        numbers.pop("steps@0", None)
        if len(numbers) > 1:
            shared |= dict.fromkeys(numbers, make(*numbers.values()))
    return shared


def describe(
    benchmark: Benchmark, table: Table, splits: Sequence[str], name: str, results: Mapping[str, Sequence[Row]]
) -> Row:
    """Return one method's entry of table.json. results: rows by method."""
    rows = results[name]
    entry = scores_of(benchmark, table, splits, rows)
    noises = sorted({row["noise"] for row in rows})
    entry["by_noise"] = [mean([row for row in rows if row["noise"] == k], "success") for k in noises]
    if "oracle_success" in rows[0]:
        entry["oracle"] = scores_of(benchmark, table, splits, list(map(_oracle, rows)))
    entry |= explain(rows)
    entry["updates_mean"] = fmean(row["updates"] for row in rows)
    entry |= cost_means(rows)
    against = [other for other in table.against if other != name and other in results]
    entry["against"] = {other: compare(rows, results[other]) for other in against}
    return entry


def _oracle(row: Row) -> Row:
    """Return the row of the sample that the benchmark's own score would pick."""
    success = None if row["success"] is None else row["oracle_success"]
    return row | {"success": success, "score": row["oracle_score"], "subscores": row.get("oracle_subscores", {})}


def scores_of(benchmark: Benchmark, table: Table, splits: Sequence[str], rows: Sequence[Row]) -> Row:
    """Return mean success and score with their intervals, in all and for each split and part."""
    entry: Row = {"n": len(rows)}
    for value, low, high in (("success", "low", "high"), ("score", "score_low", "score_high")):
        entry["success_rate" if value == "success" else value] = mean(rows, value)
        entry[low], entry[high] = interval(benchmark, rows, value)
    entry["overall"] = overall(benchmark, rows)
    for split in splits:
        here = [row for row in rows if row["split"] == split]
        entry[split] = {"success_rate": mean(here, "success"), "score": mean(here, "score")}
    return entry | {"parts": parts_of(rows, table)}


def parts_of(rows: Sequence[Row], table: Table) -> dict[str, Row]:
    """Return the means of each part of a table; where rows have no category, the task stands for it."""
    if not table.parts:
        return {}

    def part(row: Row) -> str:
        group: str = row["task"] if table.parts == "task" else row.get("category") or row["task"]
        return f"{row['split']}/{group}" if table.parts == "category in split" else group

    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(part(row), []).append(row)
    return {name: means(group) for name, group in groups.items()}
