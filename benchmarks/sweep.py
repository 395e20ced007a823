"""What a sweep costs beside its instances, and what more workers give.

    python -m benchmarks.sweep [--json] [--parts scale processes throughput overhead ray] [--instances 100000]

The parts, by default the first four:

- scale: stub instances of 10 ms through the real driver (queue, journal, progress, results.json) with `--simulated`
  workers, 1000 by default. What a worker does itself, unpickling the job and pickling the row, is taken off the
  driver's time. `driver_ms` is of the processor; in it, `results_ms` is the writing of results.json. `resume_ms`:
  reading the journal of the finished folder.
- processes, ray: the same with real workers, `--workers` of them, that sleep 10 ms. `driver_ms` is the processor time
  of the driver's thread, `all_threads_ms` that of the whole process, with the threads of Ray.
- throughput: `--pairs` times the microworld's instances by one process and by two, in alternation.
- overhead: the share of a sweep's time in this process that is not the instances' own.

Times of a busy machine say little: the JSON has the processor's name and the load before and after each part.
"""

from __future__ import annotations

import heapq
import json
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from benchmarks.step import resident
from benchmarks.timing import argument_parser, parsed
from vlmteacher.evaluation import sweep
from vlmteacher.evaluation.benchmark import Benchmark, Instance, Score
from vlmteacher.evaluation.folder import Folder, Job
from vlmteacher.evaluation.methods import Method, Row, find_method
from vlmteacher.evaluation.microworld import Bench
from vlmteacher.evaluation.processes import Processes
from vlmteacher.evaluation.workers import End, Executor, Reply, Task, answer, question
from vlmteacher.placement import describe

STUB_SECONDS = 0.01
STEPS = 16  # of a stub's history, as many as the paper's mean
STEP = {"loss": 0.4871239, "p_yes": [0.8123981] * 4, "grad_norm": 1.2348712, "learning_rate": 5e-5}
BOUNDS = {"driver_ms": 1.0, "throughput": 1.6, "overhead": 0.03}
"""At most these milliseconds an instance, at least this speedup of two workers, at most this share of the time."""


@dataclass(frozen=True, kw_only=True)
class Stub(Benchmark):
    """Instances that are never solved."""

    name: ClassVar[str] = "stub"
    splits: ClassVar[tuple[str, ...]] = ("id",)

    def instances(self, splits: Sequence[str], limit: int, noises: int) -> list[Instance]:
        return [Instance(f"stub/{index:07d}", "id", index, 0, "stub") for index in range(limit)]

    def load(self, instance: Instance) -> tuple[str, Image.Image | None]:
        raise NotImplementedError

    def score(self, instance: Instance, video: Tensor) -> Score:
        raise NotImplementedError

    def check(self, method: Method) -> None:
        pass


def stub_rows(benchmark: Benchmark, job: Job) -> list[Row]:
    """Return the rows of an instance as long as those of a real one."""
    method, instance = job[:2]
    row = {"success": True, "score": 0.75, "subscores": {"goal": 1.0, "process": 0.5}, "truths": None}
    losses = {"updates": STEPS, "loss_first": 1.5, "loss_one_step": 0.2, "loss_final": 0.3, "stopped": "threshold"}
    entries: Row = {"id": instance.id, "method": method.name, **instance.entries(), "prompt": "Move the ball. " * 10}
    queries = {"goal": "Is the ball at the goal?", "process": ["Does it keep its shape?"] * 3}
    times = {"seconds": STUB_SECONDS, "query_seconds": 0.0}
    return [{**entries, **row, **losses, **times, "steps": [dict(STEP) for _ in range(STEPS)], "queries": queries}]


def slow_stub_rows(benchmark: Benchmark, job: Job) -> list[Row]:
    time.sleep(STUB_SECONDS)
    return stub_rows(benchmark, job)


class Simulated(Executor):
    """Workers of which each is done with a task `STUB_SECONDS` after it got it, all in this process.

    theirs, theirs_cpu: seconds, and those of the processor, spent on what is the workers' own work.
    """

    def __init__(self, count: int) -> None:
        self.count, self.idle_count = count, count
        self.theirs = self.theirs_cpu = 0.0
        self._due: list[tuple[float, int, Task, bytes]] = []
        self._number = 0

    @property
    def idle(self) -> int:
        return self.idle_count

    def submit(self, task: Task) -> None:
        self.idle_count -= 1
        self._number += 1
        heapq.heappush(self._due, (time.perf_counter() + STUB_SECONDS, self._number, task, question(task)))

    def wait(self) -> End:
        due, _, task, message = heapq.heappop(self._due)
        began, cpu = time.perf_counter(), time.process_time()
        if due > began:
            time.sleep(due - began)
        reply = answer(message)
        self.theirs += time.perf_counter() - began
        self.theirs_cpu += time.process_time() - cpu
        self.idle_count += 1
        return End(task, Reply(*pickle.loads(reply)))

    def replace(self, dead: Any) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


def complete(executor: Executor, benchmark: Benchmark, method: str, limit: int, out: Path) -> list[Row]:
    """Run a sweep on workers that stay for the next one; return its rows."""
    chosen = find_method(method)
    wanted = benchmark.instances(("id",), limit, 1)
    with (
        sweep.feeding(executor, benchmark) as work,
        Folder(out, benchmark, chosen, ("id",), False) as folder,
    ):
        return folder.complete(wanted, work, {})[method]


def measure_scale(instances: int, simulated: int) -> Row:
    """Run stub instances through the driver with simulated workers, then read the finished folder again."""
    with tempfile.TemporaryDirectory() as folder, Stubbed(stub_rows):
        out, benchmark, executor = Path(folder) / "out", Stub(), Simulated(simulated)
        memory = resident("VmRSS")
        began, cpu = time.perf_counter(), time.process_time()
        rows = complete(executor, benchmark, "teacher", instances, out)
        swept_cpu, swept_memory = time.process_time(), resident("VmHWM")
        sweep.write_results(out, benchmark, "teacher", rows, ())
        written, written_cpu, written_memory = time.perf_counter(), time.process_time(), resident("VmHWM")
        with Folder(out, benchmark, find_method("teacher"), ("id",), True) as opened:
            assert len(opened.rows) == instances
        return {
            "part": "scale",
            "instances": instances,
            "workers": simulated,
            "driver_ms": 1e3 * (written_cpu - cpu - executor.theirs_cpu) / instances,
            "driver_wall_ms": 1e3 * (written - began - executor.theirs) / instances,
            "results_ms": 1e3 * (written_cpu - swept_cpu) / instances,
            "resume_ms": 1e3 * (time.process_time() - written_cpu) / instances,
            "journal_bytes": (out / "instances.jsonl").stat().st_size / instances,
            "memory_bytes": (swept_memory - memory) / instances,
            "results_memory_bytes": (written_memory - memory) / instances,
        }


def measure_workers(part: str, start: Callable[[], Executor], instances: int) -> Row:
    """Run stub instances that sleep on real workers; the driver's processor time."""
    with tempfile.TemporaryDirectory() as folder, Stubbed(slow_stub_rows), start() as executor:
        complete(executor, Stub(), "teacher", 10 * executor.count, Path(folder) / "first")  # all have started
        began, cpu, thread = time.perf_counter(), time.process_time(), time.thread_time()
        complete(executor, Stub(), "teacher", instances, Path(folder) / "out")
        seconds, cpu, thread = time.perf_counter() - began, time.process_time() - cpu, time.thread_time() - thread
    return {
        "part": part,
        "instances": instances,
        "workers": executor.count,
        "driver_ms": 1e3 * thread / instances,
        "all_threads_ms": 1e3 * cpu / instances,
        "instances_per_second": instances / seconds,
    }


def measure_throughput(method: str, instances: int, pairs: int) -> Row:
    """Compare one process and two on the microworld, in alternation, once they have loaded the models."""
    times: dict[int, list[float]] = {1: [], 2: []}
    with Processes(1) as one, Processes(2) as two:
        for turn in range(-1, pairs):  # the first one loads the models
            for executor in (one, two) if turn % 2 else (two, one):
                with tempfile.TemporaryDirectory() as folder:
                    began = time.perf_counter()
                    complete(executor, Bench(), method, instances, Path(folder) / "out")
                if turn >= 0:
                    times[executor.count].append(time.perf_counter() - began)
    ratios = [alone / together for alone, together in zip(times[1], times[2], strict=True)]
    return {"part": "throughput", "method": method, "instances": instances, "seconds": times, **spread(ratios)}


def measure_overhead(method: str, instances: int, pairs: int) -> Row:
    """Measure the share of the time of a sweep in this process that is spent outside of its instances."""
    shares, own, work = [], [0.0], sweep._work

    def timed(benchmark: Benchmark, job: Job) -> list[Row]:
        began = time.perf_counter()
        rows = work(benchmark, job)
        own[0] += time.perf_counter() - began
        return rows

    with Stubbed(timed):
        for turn in range(-1, pairs):
            own[0] = 0.0
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                sweep.run_method(method, Bench(), ["id"], instances, 1, Path(folder) / "out")
                seconds = time.perf_counter() - began
            if turn >= 0:
                shares.append(1 - own[0] / seconds)
    return {"part": "overhead", "method": method, "instances": instances, **spread(shares)}


class Stubbed:
    """Within the block a sweep runs this instead of solving an instance."""

    def __init__(self, work: Callable[[Benchmark, Job], list[Row]]) -> None:
        self._work, self._before = work, sweep._work

    def __enter__(self) -> None:
        setattr(sweep, "_work", self._work)  # noqa: B010 (mypy takes it for another type)

    def __exit__(self, *_: object) -> None:
        setattr(sweep, "_work", self._before)  # noqa: B010


def spread(values: Sequence[float]) -> Row:
    """Return the median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"value": middle, "low": low, "high": high}


def within(row: Row) -> bool | None:
    """Whether a row keeps its bound; None where it has none."""
    if row["part"] in ("throughput", "overhead"):
        bound = BOUNDS[row["part"]]
        return bool(row["value"] >= bound if row["part"] == "throughput" else row["value"] <= bound)
    return bool(row["driver_ms"] < BOUNDS["driver_ms"])


def text(row: Row) -> str:
    """Return a row as a line."""
    if "value" in row:
        unit = "x" if row["part"] == "throughput" else ""
        return f"{row['part']}: {unit}{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}], method {row['method']}"
    measured = [f"{name} {value:.3g}" for name, value in row.items() if isinstance(value, float)]
    return f"{row['part']}: {row['instances']} instances, {row['workers']} workers: {', '.join(measured)}"


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parts = ("scale", "processes", "throughput", "overhead", "ray")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts[:4])
    parser.add_argument("--instances", type=int, default=100_000, help="stub instances of scale")
    parser.add_argument("--simulated", type=int, default=1000, help="simulated workers of scale")
    parser.add_argument("--workers", type=int, default=8, help="workers of processes and ray")
    parser.add_argument("--stubs", type=int, default=5000, help="stub instances of processes and ray")
    parser.add_argument("--method", default="base", help="method of throughput and overhead")
    parser.add_argument("--limit", type=int, default=20, help="microworld instances of throughput and overhead")
    settings = parsed(parser)

    def ray() -> Executor:
        from vlmteacher.evaluation.actors import Actors

        return Actors("", settings.workers)

    measures: dict[str, Callable[[], Row]] = {
        "scale": lambda: measure_scale(settings.instances, settings.simulated),
        "processes": lambda: measure_workers("processes", lambda: Processes(settings.workers), settings.stubs),
        "ray": lambda: measure_workers("ray", ray, settings.stubs),
        "throughput": lambda: measure_throughput(settings.method, settings.limit, settings.pairs),
        "overhead": lambda: measure_overhead(settings.method, settings.limit, settings.pairs),
    }
    rows = []
    for part in settings.parts:
        before = os.getloadavg()[0]
        row = measures[part]()
        row |= {"load": [before, os.getloadavg()[0]], "kept": within(row)}
        rows.append(row)
        print(f"{text(row)}; load {before:.1f}{'' if row['kept'] else ': MISSES ITS BOUND'}", flush=True)
    if settings.json:
        device = dict.fromkeys(("reasoner", "teacher"), torch.device("cpu"))
        processor = describe(device, torch.float32)
        print(json.dumps({"benchmark": "sweep", "processor": processor, "cores": os.cpu_count(), "rows": rows}))
    sys.exit(0 if all(row["kept"] for row in rows) else 1)


if __name__ == "__main__":
    main()
