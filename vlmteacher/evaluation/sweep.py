"""A sweep: a method on the instances of a benchmark, in worker processes, with its results in a folder."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from vlmteacher.errors import InputError, TaskFailed
from vlmteacher.evaluation import methods
from vlmteacher.evaluation.actors import Actors
from vlmteacher.evaluation.benchmark import Benchmark, FileBenchmark, Instance, cost_means, key_of
from vlmteacher.evaluation.folder import Folder, Job, Queries, Work, scorer
from vlmteacher.evaluation.methods import Method, Row, find_method
from vlmteacher.evaluation.models import sized
from vlmteacher.evaluation.processes import Processes
from vlmteacher.evaluation.workers import Alone, Executor, Task, Workers
from vlmteacher.files import make_folder, write_json
from vlmteacher.media import resize, write_video
from vlmteacher.output import TeacherPipelineOutput
from vlmteacher.placement import used_memory, visible_gpus
from vlmteacher.progress import reporting
from vlmteacher.queries import QuerySet

if TYPE_CHECKING:
    from vlmteacher.pipeline import TeacherPipeline

VIDEOS = "videos"  # folder of the videos in that of a sweep


def run_method(
    method: str,
    benchmark: Benchmark,
    splits: Sequence[str],
    limit: int,
    noises: int,
    out: Path,
    workers: int | None = None,
    resume: bool = False,
    rescore: bool = False,
    keep_videos: bool = False,
    ray: str | None = None,
) -> dict[str, Any]:
    """Run `method` on the first `limit` scenes of each split, each with `noises` noises; write and return results.json.

    Finished instances are kept in ``instances.jsonl``; with `resume` they are not run again. rescore, keep_videos: see
    `Folder`; workers, ray: see `start_executor`; a method with warm starts runs in this process.

    Raises:
        InputError: an unknown method or split; `out` not writable, or holding other results (or any, without `resume`).
        OutputError: a file cannot be written; the files in `out` stay.
        TaskFailed: some instances failed, each several times; results.json has the others.
    """
    wanted = benchmark.instances(splits, limit, noises)
    chosen = find_method(method)
    benchmark.check(chosen)
    if chosen.warm:  # the order of its instances decides
        workers = ray = None
    started: AbstractContextManager[Work | None] = nullcontext() if rescore else start_workers(workers, benchmark, ray)
    with started as work, Folder(out, benchmark, chosen, splits, resume, rescore, keep_videos) as folder:
        rows = folder.judged(wanted) if work is None else folder.complete(wanted, work, {})
    results = write_results(out, benchmark, method, rows[chosen.rows[0]], wanted)
    check_complete(out, folder.failed)
    return results


def write_results(
    out: Path, benchmark: Benchmark, method: str, rows: list[Row], wanted: Sequence[Instance]
) -> dict[str, Any]:
    """Write results.json of one method to `out`, a new folder if need be; return its content.

    wanted: the instances that should have a row. Without rows nothing is written.
    """
    if not rows:
        return {}
    make_folder(out)
    existing = {key_of(row) for row in rows}
    results = {
        "benchmark": benchmark.name,
        "method": method,
        **benchmark.described(),
        **scorer(benchmark),
        **benchmark.summarize(rows, [one for one in wanted if one.key not in existing]),
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
            f"{len(failed)} of the instances failed, {first.split} {first.index} first"
            f" ({reason}): the others are kept in {out}; the same with --resume tries again"
        )


@contextmanager
def start_workers(count: int | None, benchmark: Benchmark, ray: str | None = None) -> Iterator[Work]:
    """Start the workers of a sweep (see `start_executor`), which load the models once each."""
    with start_executor(count, ray) as executor, feeding(executor, benchmark) as work:
        yield work


@contextmanager
def feeding(executor: Executor, benchmark: Benchmark) -> Iterator[Work]:
    """Run the jobs of a benchmark on an executor; each instance is a step of its method's work (see `progress`)."""
    workers, settings = Workers(executor), {"benchmark": benchmark.name, **benchmark.described()}
    memory = lru_cache(1)(lambda second: used_memory(children=True))  # it takes a millisecond: once in a second

    def run(jobs: Iterable[Job], name: str, total: int, kept: int) -> Iterator[Task]:
        about = {**settings, "method": name}
        with reporting(name, total, done=kept, unit="instance", settings=about) as advance:
            for task in workers.run(_work, ((benchmark, job) for job in jobs)):
                yield task
                failed = task.failure is not None
                row = {} if failed else measured(task.result()[-1], memory(int(time.monotonic())))
                advance(row, failed=failed)

    yield run


def measured(row: Row, memory: int) -> dict[str, Any]:
    """What the progress of a sweep says of an instance: its row, the guards of its last step, the memory in use."""
    names = ("id", "split", "index", "noise", "success", "score", "loss_first", "loss_final", "p_yes", "updates")
    values = {name: row[name] for name in (*names, "seconds") if row.get(name) is not None}
    if row.get("steps") and (guards := row["steps"][-1].get("guards")):
        values["guards"] = guards
    return values | {"memory": memory}


def start_executor(count: int | None, ray: str | None = None) -> Executor:
    """Start `count` processes; 0, 1 and None: none, the tasks run in this process.

    Processes take turns with the GPUs that this process sees. ray: address of a cluster, see `Actors`, which then has
    `count` workers.

    Raises InputError for a count that is negative, or 0 with `ray`, and as `Actors` does.
    """
    least = 0 if ray is None else 1
    if count is not None and count < least:
        raise InputError(f"workers must be at least {least}, not {count}")
    if ray is not None:
        return Actors(ray, count)
    return Processes(count, visible_gpus()) if count is not None and count > 1 else Alone()


def _work(benchmark: Benchmark, job: Job) -> list[Row]:
    method, instance, given, out = job
    from_files = isinstance(benchmark, FileBenchmark)
    pipe = None if method.control else benchmark.load_models(method)
    prompt, image = benchmark.load(instance)
    fps = benchmark.fps if pipe is None else pipe.reasoner.fps

    def verdict(video: Tensor, name: str | None = None, sample: int | None = None) -> Row:
        row = {} if from_files else benchmark.score(instance, video).entries()
        if out is not None and name is not None:
            row["video"] = f"{VIDEOS}/{folder_name(name, instance.noise, sample)}/{benchmark.path(instance)}"
            make_folder((out / row["video"]).parent)
            write_video(out / row["video"], TeacherPipelineOutput.uint8(video), fps)
        return row

    def answers(video: Tensor, asked: QuerySet) -> list[Any] | None:
        return benchmark.answers(instance, video, asked)

    if pipe is None:
        picture = image if method.control == "static" else benchmark.final_frame(instance)
        return [_row(instance, method.name, prompt, _control(method, benchmark, picture, verdict))]
    image, (height, width) = benchmark.fit(image, pipe.reasoner)
    queries, query_seconds = given or _write_queries(pipe, prompt, image)
    seed, rewriter = benchmark.noise_seed(instance), benchmark.rewriter()
    with sized(pipe.reasoner, height, width):
        rows = methods.run(method, pipe, prompt, image, seed, queries, verdict, answers, benchmark.trace, rewriter)
    return [
        {
            **_row(instance, name, prompt, row),
            "seconds": row["seconds"] + (0.0 if method.queries else query_seconds),
            "query_seconds": query_seconds,
        }
        for name, row in rows.items()
    ]


def _row(instance: Instance, method: str, prompt: str, row: Row) -> Row:
    return {"id": instance.id, "method": method, **instance.entries(), "prompt": prompt, **row}


def _control(method: Method, benchmark: Benchmark, picture: Image.Image | None, judge: methods.Judge) -> Row:
    """Return the row of a control. Raises ValueError where the benchmark has no such picture."""
    if picture is None:
        raise ValueError(f"{benchmark.name} has no {'first' if method.control == 'static' else 'final'} frame for it")
    size = benchmark.models
    height, width = size.height or picture.height, size.width or picture.width
    even = resize(picture, height - height % 2, width - width % 2)  # for the codec
    return methods.control(method, even, size.num_frames or benchmark.frames, judge)


def folder_name(method: str, noise: int = 0, sample: int | None = None) -> str:
    """Return the name of the folder of a method's videos: of the noises after the first, and of samples, their own."""
    return method + (f".noise-{noise}" if noise else "") + ("" if sample is None else f".sample-{sample}")


def _write_queries(pipe: TeacherPipeline, prompt: str, image: Image.Image | None) -> Queries:
    """Return the Teacher's queries, or the generic ones if it cannot write any; the row shows them."""
    began = time.perf_counter()
    try:
        queries = pipe.write_queries(prompt, image)
    except InputError:
        queries = methods.GENERIC
    return queries, time.perf_counter() - began
