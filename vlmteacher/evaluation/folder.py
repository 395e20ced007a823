"""The folder of a sweep: what is finished is kept there, and an interrupted sweep goes on from it.

It holds settings.json, one line of instances.jsonl per finished row, one line of poison.jsonl per instance that failed
at every attempt, and results.json at the end. Where the scorer reads files, the videos are under videos, the rows of
instances.jsonl have no verdict, and scores.jsonl has one line per judged video.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vlmteacher.errors import InputError
from vlmteacher.evaluation import methods
from vlmteacher.evaluation.benchmark import Benchmark, FileBenchmark, Instance, key_of
from vlmteacher.evaluation.journal import Journal
from vlmteacher.evaluation.methods import Method, Row
from vlmteacher.evaluation.workers import Task
from vlmteacher.files import LOCK, append_text, claimed, read_json, remove, remove_leftovers, write_json
from vlmteacher.progress import reporting
from vlmteacher.queries import QuerySet

Queries = tuple[QuerySet, float]  # and the seconds of writing them


class Job(NamedTuple):
    """An instance to solve by a method, with queries that are already written; `videos`: where to keep its videos."""

    method: Method
    instance: Instance
    queries: Queries | None
    videos: Path | None


class Work(Protocol):
    """Runs jobs; yields each as a task with the rows of its instance, in the order in which they finish.

    name, total, kept: of the work that the progress shows, see `progress.reporting`.
    """

    def __call__(self, jobs: Iterable[Job], name: str, total: int, kept: int) -> Iterator[Task]: ...


def queries_of(row: Row) -> Queries:
    return QuerySet.from_dict(row["queries"]), row["query_seconds"]


class Folder:
    """The folder of a sweep, which keeps the rows of a method: settings.json, and one line of instances.jsonl per row.

    While it is open, no other process can open it.

    resume: go on with the results that it holds. rescore: of a `FileBenchmark`, drop its verdicts and go on, with
    another version of the scorer too. keep_videos: keep the videos of a benchmark that does not need their files.

    Raises InputError: not writable, or in use; holds other results, or any without `resume` or `rescore`; nothing to
    judge anew.
    """

    def __init__(
        self,
        path: Path,
        benchmark: Benchmark,
        method: Method,
        splits: Sequence[str],
        resume: bool,
        rescore: bool = False,
        keep_videos: bool = False,
    ) -> None:
        if method.warm:
            store = {"warm_start": str(path.absolute() / "warm_starts"), "warm_start_from": method.warm}
            method = replace(method, settings=method.settings | store)
        self.path, self.benchmark, self.method = path, benchmark, method
        self.videos = path.absolute() if keep_videos or isinstance(benchmark, FileBenchmark) else None
        self.failed: dict[Instance, str] = {}
        what: dict[str, Any] = {"benchmark": benchmark.name, "methods": list(method.rows), "splits": list(splits)}
        what |= {**benchmark.described(), **scorer(benchmark)}
        settings, self.poison = path / "settings.json", path / "poison.jsonl"
        self.log, self.verdicts = Journal(path / "instances.jsonl"), Journal(path / "scores.jsonl")
        if rescore and not (isinstance(benchmark, FileBenchmark) and settings.exists()):
            raise InputError(f"--rescore judges the videos in {path} again, and there are none for its scorer")
        with ExitStack() as held:
            held.enter_context(claimed(path))
            if settings.exists():
                if not (resume or rescore):
                    raise InputError(f"{path} already holds results: give another --out, or --resume to go on")
                check_same(path, read_json(settings, "settings"), what, rescore)
            elif any(entry.name != LOCK for entry in path.iterdir()):
                raise InputError(f"{path} is not empty: give another --out")
            rows = self.log.read(_check_row, "remove that line, or give another --out")
            self.rows = {(row["method"], key_of(row)): row for row in rows}
            scores = () if rescore else self.verdicts.read(_check_score, "remove that line, or judge anew by --rescore")
            self.scores = {row["video"]: row for row in scores}
            write_json(settings, what)
            held.enter_context(self.log.appending())
            if isinstance(benchmark, FileBenchmark):
                held.enter_context(self.verdicts.appending())
            for folder in {(path / row["video"]).parent for row in self.rows.values() if "video" in row}:
                if folder.is_dir():
                    remove_leftovers(folder)
            remove(self.poison)  # its instances are tried again
            self._held = held.pop_all()

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

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
        todo = [one for one in wanted if not all(self._is_made(name, one) for name in self.method.rows)]
        jobs = (Job(self.method, one, queries.get((one.split, one.index)), self.videos) for one in todo)
        for task in work(jobs, self.method.name, len(wanted), len(wanted) - len(todo)):
            if task.failure is not None:
                self._set_aside(task.given[1].instance, task.failure)
                continue
            rows = task.result()
            self.log.append(rows)
            self.rows |= {(row["method"], key_of(row)): row for row in rows}
            for row in rows:  # of a video that was made again
                for video in videos_of(row):
                    self.scores.pop(video, None)
        return self.judged(wanted)

    def _is_made(self, name: str, instance: Instance) -> bool:
        row = self.rows.get((name, instance.key))
        if row is None or not isinstance(self.benchmark, FileBenchmark):
            return row is not None
        return all((self.path / video).is_file() for video in videos_of(row))

    def judged(self, wanted: Sequence[Instance]) -> dict[str, list[Row]]:
        """Return the rows of `wanted` with their verdicts, by the names of `Method.rows`; judge the files first.

        Instances without a row or a verdict are left out; `failed` and poison.jsonl have the reasons of the latter.
        """
        made = {
            name: [(one, self.rows[name, one.key]) for one in wanted if (name, one.key) in self.rows]
            for name in self.method.rows
        }
        if not isinstance(self.benchmark, FileBenchmark):
            return {name: [row for _, row in group] for name, group in made.items()}
        self._judge([pair for group in made.values() for pair in group])
        return {
            name: [self._with_verdict(row) for _, row in group if all(v in self.scores for v in videos_of(row))]
            for name, group in made.items()
        }

    def _judge(self, made: Sequence[tuple[Instance, Row]]) -> None:
        """Judge the videos without a verdict; keep each verdict in scores.jsonl. Raises OutputError."""
        assert isinstance(self.benchmark, FileBenchmark)
        folders: dict[str, dict[Instance, str]] = {}
        for one, row in made:
            for video in videos_of(row):
                if video in self.scores or one in self.failed:
                    continue
                if not (self.path / video).is_file():
                    self._set_aside(one, f"its video {video} is gone: --resume makes it again")
                    continue
                folders.setdefault(video.removesuffix(self.benchmark.path(one)), {})[one] = video
        if not folders:
            return
        total = sum(map(len, folders.values()))
        with reporting(f"{self.method.name}, scores", total, unit="video") as advance:
            for videos in folders.values():
                paths = {one: self.path / video for one, video in videos.items()}
                for one, score in self.benchmark.score_files(paths):
                    video = videos.pop(one)
                    advance(failed=score.score is None)
                    if score.score is None:
                        self._set_aside(one, score.error or "it was not judged")
                        continue
                    self.scores[video] = {"video": video, **score.entries()}
                    self.verdicts.append([self.scores[video]])
                for one in videos:
                    if one not in self.failed:
                        self._set_aside(one, "the scorer gave no verdict")

    def _with_verdict(self, row: Row) -> Row:
        verdicts = [{k: v for k, v in self.scores[video].items() if k != "video"} for video in videos_of(row)]
        if "sample_videos" not in row:
            return {**row, **verdicts[0]}
        scores = {"sample_scores": [verdict["score"] for verdict in verdicts]}
        return {**row, **verdicts[row["picked"]], **methods.oracle(verdicts), **scores}


def _check_row(row: Row) -> None:
    """Raise KeyError or TypeError for a row that does not name its instance."""
    if not all(map(isinstance, (row["method"], *key_of(row)), (str, str, int, int))):
        raise TypeError


def _check_score(row: Row) -> None:
    """Raise KeyError or TypeError for a row that is no verdict on a video."""
    if not (isinstance(row["video"], str) and isinstance(row["score"], float | int)):
        raise TypeError


def check_same(path: Path, existing: Any, what: Mapping[str, Any], rescore: bool) -> None:
    """Raise InputError unless the settings of the results in a folder are `what`; `rescore`: but for the scorer."""
    if existing == what:
        return
    if isinstance(existing, dict) and {**existing, "scorer": 0} == {**what, "scorer": 0}:
        if rescore:
            return
        raise InputError(
            f"{path} was judged by another version of the scorer: --rescore judges its videos anew, or give the old one"
        )
    raise InputError(f"{path} holds other results ({str(existing)[:300]}): give another --out")


def videos_of(row: Row) -> list[str]:
    """Return the files that are judged for a row, by their paths in the folder of its sweep: its samples, or its video.

    A row whose videos were not kept has none.
    """
    videos: list[str] = row["sample_videos"] if "sample_videos" in row else [row["video"]] if "video" in row else []
    return videos


def scorer(benchmark: Benchmark) -> dict[str, Any]:
    """Return the entry of a scorer that reads files; nothing for others."""
    return {"scorer": benchmark.scorer()} if isinstance(benchmark, FileBenchmark) else {}
