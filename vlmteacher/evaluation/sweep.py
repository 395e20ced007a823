"""A sweep: a method on the instances of a benchmark, in worker processes, with its results in a folder.

The folder holds settings.json, one line of instances.jsonl per finished row, one line of poison.jsonl per instance that
failed at every attempt, and results.json at the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from vlmteacher.errors import InputError, OutputError, TaskFailed
from vlmteacher.evaluation import methods
from vlmteacher.evaluation.benchmark import Benchmark, Instance, cost_means, key_of
from vlmteacher.evaluation.methods import Method, Row, find_method
from vlmteacher.evaluation.workers import ATTEMPTS, Task, Workers
from vlmteacher.files import LOCK, append_text, claimed, read_json, read_text, remove, write_json, write_text
from vlmteacher.queries import QuerySet

if TYPE_CHECKING:
    from vlmteacher.pipeline import TeacherPipeline

LOG_LIMIT = 2**33  # bytes of instances.jsonl


def run_method(
    method: str,
    benchmark: Benchmark,
    splits: Sequence[str],
    limit: int,
    noises: int,
    out: Path,
    workers: int = 1,
    resume: bool = False,
) -> dict[str, Any]:
    """Run `method` on the first `limit` scenes of each split, each with `noises` noises; write and return results.json.

    Finished instances are kept in ``instances.jsonl``; with `resume` they are not run again.

    Raises:
        InputError: an unknown method or split; `out` not writable, or holding other results (or any, without `resume`).
        OutputError: a file cannot be written; the files in `out` stay.
        TaskFailed: some instances failed, each several times; results.json has the others.
    """
    wanted = benchmark.instances(splits, limit, noises)
    chosen = find_method(method)
    benchmark.check(chosen)
    with Folder(out, benchmark, chosen, splits, resume) as folder, start_workers(workers, benchmark) as work:
        rows = folder.complete(wanted, work, {})
    results = write_results(out, benchmark, method, rows[chosen.rows[0]])
    check_complete(out, folder.failed)
    return results


def write_results(out: Path, benchmark: Benchmark, method: str, rows: list[Row]) -> dict[str, Any]:
    """Write results.json of one method to `out`, a new folder if need be; return its content.

    Without rows nothing is written.
    """
    if not rows:
        return {}
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(out, error) from error
    results = {
        "benchmark": benchmark.name,
        "method": method,
        **benchmark.described(),
        **benchmark.summarize(rows),
        "updates_mean": fmean(row["updates"] for row in rows),
        **cost_means(rows),
        "instances": rows,
    }
    write_json(out / "results.json", results)
    return results


def check_complete(out: Path, failed: Mapping[Instance, str]) -> None:
    """Raise TaskFailed if instances failed."""
    if failed:
        first, reason = next(iter(failed.items()))
        raise TaskFailed(
            f"{len(failed)} of the instances failed {ATTEMPTS} times, {first.split} {first.index} first"
            f" ({reason}): the others are kept in {out}; the same with --resume tries again"
        )


class Folder:
    """The folder of a sweep, which keeps the rows of a method: settings.json, and one line of instances.jsonl per row.

    While it is open, no other process can open it.

    Raises InputError: not writable, or in use; holds other results, or any without `resume`.
    """

    def __init__(self, path: Path, benchmark: Benchmark, method: Method, splits: Sequence[str], resume: bool) -> None:
        self.path, self.method = path, method
        self.failed: dict[Instance, str] = {}
        what: dict[str, Any] = {"benchmark": benchmark.name, "methods": list(method.rows), "splits": list(splits)}
        what |= benchmark.described()
        settings, self.log, self.poison = path / "settings.json", path / "instances.jsonl", path / "poison.jsonl"
        with ExitStack() as held:
            held.enter_context(claimed(path))
            if settings.exists():
                if not resume:
                    raise InputError(f"{path} already holds results: give another --out, or --resume to go on")
                existing = read_json(settings, "settings")
                if existing != what:
                    raise InputError(f"{path} holds other results ({str(existing)[:300]}): give another --out")
            elif any(entry.name != LOCK for entry in path.iterdir()):
                raise InputError(f"{path} is not empty: give another --out")
            lines = self._lines()
            self.rows = {(row["method"], key_of(row)): row for row in map(self._row, lines)}
            write_json(settings, what)
            write_text(self.log, "".join(lines))
            remove(self.poison)  # its instances are tried again
            self._held = held.pop_all()

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _lines(self) -> list[str]:
        if not self.log.exists():
            return []
        lines = read_text(self.log, "results", LOG_LIMIT).splitlines(keepends=True)
        return [line for line in lines if line.endswith("}\n")]  # the last one may be cut off

    def _row(self, line: str) -> Row:
        try:
            row: Row = json.loads(line)
            if not all(map(isinstance, (row["method"], *key_of(row)), (str, str, int, int))):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{self.log}: {line[:40]!r}... is not a result: remove that line, or give another --out"
            ) from error
        return row

    def _set_aside(self, instance: Instance, reason: str) -> None:
        """Note an instance that failed at every attempt. Raises OutputError."""
        self.failed[instance] = reason
        row = {"id": instance.id, "methods": self.method.rows, **instance.entries(), "failure": reason}
        append_text(self.poison, json.dumps(row) + "\n")

    def complete(
        self, wanted: Sequence[Instance], work: Work, queries: Mapping[tuple[str, int], Queries]
    ) -> dict[str, list[Row]]:
        """Run the instances of `wanted` without rows; return the rows of all, by the names of `Method.rows`.

        Instances that fail are left out; `failed` and poison.jsonl have the reasons.
        queries: already written ones, by split and index.

        Raises OutputError when a row cannot be written; those before it are kept.
        """
        names = self.method.rows
        todo = [one for one in wanted if any((name, one.key) not in self.rows for name in names)]
        jobs = [(self.method, one, queries.get((one.split, one.index))) for one in todo]
        for task in tqdm(work(jobs), total=len(wanted), initial=len(wanted) - len(jobs), desc=self.method.name):
            if task.failure is not None:
                self._set_aside(task.given[1][1], task.failure)
                continue
            rows = task.result()
            append_text(self.log, "".join(json.dumps(row) + "\n" for row in rows))
            self.rows |= {(row["method"], key_of(row)): row for row in rows}
        return {name: [self.rows[name, one.key] for one in wanted if (name, one.key) in self.rows] for name in names}


Queries = tuple[QuerySet, float]  # and the seconds of writing them
Job = tuple[Method, Instance, Queries | None]
Work = Callable[[Iterable[Job]], Iterator[Task]]
"""Runs jobs; yields each as a task with the result of `_work(benchmark, job)`, in the order in which they finish."""


def queries_of(row: Row) -> Queries:
    return QuerySet.from_dict(row["queries"]), row["query_seconds"]


@contextmanager
def start_workers(count: int, benchmark: Benchmark) -> Iterator[Work]:
    """Run jobs in this process, or in `count` processes of one thread each. Each process loads the models once.

    Raises InputError for a count below 1.
    """
    if count < 1:
        raise InputError(f"workers must be at least 1, not {count}")
    with Workers(0 if count == 1 else count) as workers:

        def run(jobs: Iterable[Job]) -> Iterator[Task]:
            for job in jobs:
                workers.submit(_work, benchmark, job)
            return workers.finish_all()

        yield run


def _work(benchmark: Benchmark, job: Job) -> list[Row]:
    method, instance, given = job
    pipe = benchmark.load_models(method)
    prompt, image = benchmark.load(instance)
    queries, query_seconds = given or _write_queries(pipe, prompt, image)
    if benchmark.lora_blocks is not None:
        method = Method(method.name, {"lora_blocks": benchmark.lora_blocks})

    def verdict(video: Tensor) -> Row:
        return benchmark.score(instance, video).entries()

    def answers(video: Tensor, asked: QuerySet) -> list[Any] | None:
        return benchmark.answers(instance, video, asked)

    seed = benchmark.noise_seed(instance)
    rows = methods.run(method, pipe, prompt, image, seed, queries, verdict, answers, benchmark.trace)
    return [
        {
            "id": instance.id,
            "method": name,
            **instance.entries(),
            "prompt": prompt,
            **row,
            "seconds": row["seconds"] + (0.0 if method.queries else query_seconds),
            "query_seconds": query_seconds,
        }
        for name, row in rows.items()
    ]


def _write_queries(pipe: TeacherPipeline, prompt: str, image: Image.Image | None) -> Queries:
    """Return the Teacher's queries, or the generic ones if it cannot write any; the row shows them."""
    began = time.perf_counter()
    try:
        queries = pipe.write_queries(prompt, image)
    except InputError:
        queries = methods.GENERIC
    return queries, time.perf_counter() - began
