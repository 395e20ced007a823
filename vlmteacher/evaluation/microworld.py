"""The microworld as a benchmark: held-out instances, the packaged pair, the rule scorer as judge."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from vlmteacher.errors import InputError, OutputError, TaskFailed
from vlmteacher.evaluation import methods
from vlmteacher.evaluation.failures import explain
from vlmteacher.evaluation.methods import Method, Row, find_method
from vlmteacher.evaluation.workers import ATTEMPTS, Task, Workers
from vlmteacher.files import LOCK, claimed, read_json, read_text, write_json, write_text
from vlmteacher.microworld import world
from vlmteacher.microworld.labeller import label
from vlmteacher.microworld.questions import truths
from vlmteacher.microworld.scorer import Verdict, score
from vlmteacher.queries import QuerySet
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.sampling import even_timesteps

if TYPE_CHECKING:
    from vlmteacher.pipeline import TeacherPipeline

LOG_LIMIT = 2**33  # bytes of instances.jsonl
MANY_STEPS = 30  # of a Reasoner before its few-step distillation


@dataclass(frozen=True)
class Instance:
    """One scene of a split and one noise, the same for every method, so that methods can be compared in pairs."""

    split: str
    index: int
    noise: int

    @classmethod
    def of(cls, row: Row) -> Instance:
        return cls(row["split"], row["index"], row["noise"])


def instances(splits: Sequence[str], limit: int, noises: int) -> list[Instance]:
    """Return the first `limit` scenes of each split with `noises` noises each; all scenes once before any twice."""
    return [Instance(split, index, k) for k in range(noises) for split in splits for index in range(limit)]


@dataclass(frozen=True)
class Bench:
    """What the results depend on beside method and instance.

    Attributes:
        seed: draws the splits; 1 draws the frozen ones (``microworld/splits.json``).
        families: alternate from instance to instance.
        pair: directory of a pair; None: the packaged one.
        many_step: the Reasoner before its few-step distillation: hub id, directory, or directory of its transformer
            alone, which is then sampled in `MANY_STEPS` steps; None: the one named by pair.json.
        trace: see `methods.run`.
        lora_blocks: see `Settings`.

    Raises InputError: an unknown family.
    """

    seed: int = 1
    families: tuple[str, ...] = world.FAMILIES
    pair: str | None = None
    many_step: str | None = None
    trace: bool = False
    lora_blocks: str | None = None

    def __post_init__(self) -> None:
        world.check("id", self.families)

    def check(self, method: Method) -> None:
        """Raise InputError if a method cannot be run with these settings."""
        methods.check_teacher(method, self.pair)
        if method.many_step:
            self.find_many_step()
        if self.lora_blocks is not None:
            from vlmteacher.pipeline import read_pair
            from vlmteacher.settings import parse_blocks

            if method.name != "teacher":
                raise InputError(f"lora_blocks {self.lora_blocks} is of the method teacher, not of {method.name}")
            directory, description = read_pair(self.pair)
            config = read_json(directory / description["reasoner"] / "transformer" / "config.json", "config")
            if parse_blocks(self.lora_blocks) > config["num_layers"]:
                raise InputError(f"lora_blocks {self.lora_blocks}: the transformer has {config['num_layers']} blocks")

    def find_many_step(self) -> str:
        """Return where the Reasoner before its few-step distillation is. Raises InputError if it is not given."""
        from vlmteacher.pipeline import read_pair

        directory, description = read_pair(self.pair)
        if self.many_step is None and "many_step" not in description:
            raise InputError("method 'many-step' needs --many-step ID: the pair has no Reasoner without distillation")
        return self.many_step or str(directory / description["many_step"])


def run_benchmark(
    method: str,
    limit: int,
    seed: int,
    out: Path,
    workers: int = 1,
    resume: bool = False,
    pair: str | None = None,
    lora_blocks: str | None = None,
    split: str = "id",
    chosen: Sequence[str] = world.FAMILIES,
    noises: int = 1,
    trace: bool = False,
    many_step: str | None = None,
) -> dict[str, Any]:
    """Run `method` on the first `limit` instances of a split, each with `noises` noises; write and return results.json.

    Finished instances are kept in ``instances.jsonl``; with `resume` they are not run again. Other arguments: see
    `Bench`.

    Raises:
        InputError: an unknown method, split or family; `out` not writable, or holding other results (or any, without
            `resume`).
        OutputError: a file cannot be written; the files in `out` stay.
        TaskFailed: some instances failed, each several times; results.json has the others.
    """
    bench = Bench(seed, tuple(chosen), pair, many_step, trace, lora_blocks)
    world.check(split, chosen)
    chosen_method = find_method(method)
    bench.check(chosen_method)
    todo = instances([split], limit, noises)
    with Folder(out, bench, chosen_method, [split], resume) as folder, start_workers(workers, bench) as work:
        rows = folder.complete(todo, work, {})
    results = write_results(out, bench, method, rows[chosen_method.rows[0]])
    check_complete(out, folder.failed)
    return results


def write_results(out: Path, bench: Bench, method: str, rows: list[Row]) -> dict[str, Any]:
    """Write results.json of one method to `out`, a new folder if need be; return its content.

    Without rows nothing is written.
    """
    if not rows:
        return {}
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(out, error) from error
    what = {"benchmark": "microworld", "method": method, **described(bench)}
    results = {**what, **summary(rows)}
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


def described(bench: Bench) -> dict[str, Any]:
    """Return what the results depend on as plain data for JSON."""
    given = {name: value for name, value in asdict(bench).items() if value not in (None, False)}
    return given | {"families": list(bench.families)}


def summary(rows: list[Row]) -> dict[str, Any]:
    """Return means over instances, in all and for each split and family, and the causes of failures."""

    def means(chosen: list[Row]) -> dict[str, Any]:
        return {
            "n": len(chosen),
            "success_rate": fmean(r["success"] for r in chosen) if chosen else None,
            "score": fmean(r["score"] for r in chosen) if chosen else None,
        }

    return {
        **means(rows),
        "splits": {name: means([r for r in rows if r["split"] == name]) for name in ("id", "ood", "validation")},
        "tasks": {
            name: means([r for r in rows if r["task"] == name]) for name in dict.fromkeys(r["task"] for r in rows)
        },
        **explain(rows),
        "updates_mean": fmean(r["updates"] for r in rows),
        "seconds_mean": fmean(r["seconds"] for r in rows),
        "instances": rows,
    }


class Folder:
    """The folder that keeps the rows of a method: settings.json, and one line of instances.jsonl per row.

    While it is open, no other process can open it.

    Raises InputError: not writable, or in use; holds other results, or any without `resume`.
    """

    def __init__(self, path: Path, bench: Bench, method: Method, splits: Sequence[str], resume: bool) -> None:
        self.path, self.method = path, method
        self.failed: dict[Instance, str] = {}
        what = {"benchmark": "microworld", "methods": list(method.rows), "splits": list(splits), **described(bench)}
        settings, self.log = path / "settings.json", path / "instances.jsonl"
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
            self.rows = {(row["method"], Instance.of(row)): row for row in map(self._row, lines)}
            write_json(settings, what)
            write_text(self.log, "".join(lines))
            # Unbuffered: a full disk must refuse a row when it is written, not later.
            self._file = held.enter_context(self.log.open("ab", buffering=0))
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
            if not all(map(isinstance, (row["method"], *astuple(Instance.of(row))), (str, str, int, int))):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{self.log}: {line[:40]!r}... is not a result: remove that line, or give another --out"
            ) from error
        return row

    def _keep(self, rows: Sequence[Row]) -> None:
        """Append rows to the log and wait until they are on the disk. Raises OutputError."""
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(self.log, error) from error

    def complete(
        self, wanted: Sequence[Instance], work: Work, queries: Mapping[tuple[str, int], Queries]
    ) -> dict[str, list[Row]]:
        """Run the instances of `wanted` without rows; return the rows of all, by the names of `Method.rows`.

        Instances that fail are left out; `failed` has the reasons. queries: already written ones, by split and index.

        Raises OutputError when a row cannot be written; those before it are kept.
        """
        names = self.method.rows
        todo = [one for one in wanted if any((name, one) not in self.rows for name in names)]
        jobs = [(self.method, one, queries.get((one.split, one.index))) for one in todo]
        for task in tqdm(work(jobs), total=len(wanted), initial=len(wanted) - len(jobs), desc=self.method.name):
            if task.failure is not None:
                self.failed[task.given[1][1]] = task.failure
                continue
            rows = task.result()
            self._keep(rows)
            self.rows |= {(row["method"], Instance.of(row)): row for row in rows}
        return {name: [self.rows[name, one] for one in wanted if (name, one) in self.rows] for name in names}


Queries = tuple[QuerySet, float]  # and the seconds of writing them
Job = tuple[Method, Instance, Queries | None]
Work = Callable[[Iterable[Job]], Iterator[Task]]
"""Runs jobs; yields each as a task with the result of `_work(bench, job)`, in the order in which they finish."""


def queries_of(row: Row) -> Queries:
    return QuerySet.from_dict(row["queries"]), row["query_seconds"]


@contextmanager
def start_workers(count: int, bench: Bench) -> Iterator[Work]:
    """Run jobs in this process, or in `count` processes of one thread each. Each process loads the models once.

    Raises InputError for a count below 1.
    """
    if count < 1:
        raise InputError(f"workers must be at least 1, not {count}")
    with Workers(0 if count == 1 else count) as workers:

        def run(jobs: Iterable[Job]) -> Iterator[Task]:
            for job in jobs:
                workers.submit(_work, bench, job)
            return workers.finish_all()

        yield run


@lru_cache(maxsize=2)
def _load(pair: str | None, many_step: str | None) -> TeacherPipeline:
    from vlmteacher.pipeline import TeacherPipeline, read_pair
    from vlmteacher.quiet import quiet
    from vlmteacher.settings import Settings

    quiet()
    here: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}  # the same results on any machine
    if many_step and (Path(many_step) / "config.json").exists():  # a transformer alone: the rest is the pair's
        pipe = TeacherPipeline.from_pretrained(pair=pair, transformer=many_step, **here)
        pipe.reasoner.settings = replace(
            pipe.reasoner.settings, timesteps=even_timesteps(MANY_STEPS), shift=1.0, sampler="euler"
        )
    else:
        pipe = TeacherPipeline.from_pretrained(pair=pair, reasoner=many_step, **here)
    pipe.defaults = Settings(**read_pair(pair)[1].get("defaults", {}))  # another Reasoner's folder has none
    return pipe


@lru_cache(maxsize=2)
def _check_words(pipe: TeacherPipeline, families: tuple[str, ...]) -> None:
    """Raise InputError if the Teacher was trained on the world's words alone and lacks some of the families'."""
    from vlmteacher.microworld.tokenizer import check_words
    from vlmteacher.teachers.vlm import VLMTeacher

    if pipe.teacher.style.own_wording and isinstance(pipe.teacher, VLMTeacher):
        check_words(pipe.teacher.tokenizer, families)


def judge(video: Tensor, scene: world.Scene) -> Verdict:
    """Return the rule scorer's verdict on a video (F, 3, H, W) in [0, 1]."""
    return score(_pixels(video), scene)


def _pixels(video: Tensor) -> np.ndarray:
    return video.permute(0, 2, 3, 1).float().cpu().numpy()


def noise_seed(index: int, seed: int, noise: int = 0) -> int:
    """Return the seed of the `noise`-th noise of the `index`-th instance that `seed` draws."""
    return 100_000 * seed + 100 * index + 10**9 * noise


def first_frame(scene: world.Scene) -> Image.Image:
    """Return the scene's first frame as the image that a user would give."""
    return Image.fromarray((world.render(scene)[0] * 255).round().astype("uint8"))


def right_latents(reasoner: Reasoner, scene: world.Scene) -> Tensor:
    """Encode the scene's right video with the Reasoner's VAE: latents (1, C, T, h, w)."""
    return reasoner.encode_video((world.render(scene) * 255).round().astype("uint8"))


def _work(bench: Bench, job: Job) -> list[Row]:
    method, instance, given = job
    pipe = _load(bench.pair, bench.find_many_step() if method.many_step else None)
    _check_words(pipe, bench.families)
    scene, prompt = world.instance(instance.index, bench.seed, instance.split, bench.families)
    image = first_frame(scene)
    queries, query_seconds = given or _write_queries(pipe, prompt, image)
    if bench.lora_blocks is not None:
        method = Method(method.name, {"lora_blocks": bench.lora_blocks})
    seed = noise_seed(instance.index, bench.seed, instance.noise)

    def verdict(video: Tensor) -> Row:
        return asdict(judge(video, scene))

    def answers(video: Tensor, asked: QuerySet) -> list[list[Any]]:
        return [list(truth) for truth in truths(scene, label(_pixels(video), scene), asked)]

    rows = methods.run(method, pipe, prompt, image, seed, queries, verdict, answers, bench.trace)
    return [
        {
            "id": f"{scene.family}/{bench.seed}/{instance.index:04d}",
            "method": name,
            **asdict(instance),
            "task": scene.family,
            "prompt": prompt,
            **row,
            "seconds": row["seconds"] + (0.0 if method.queries else query_seconds),
            "query_seconds": query_seconds,
        }
        for name, row in rows.items()
    ]


def _write_queries(pipe: TeacherPipeline, prompt: str, image: Image.Image) -> Queries:
    """Return the Teacher's queries, or the generic ones if it cannot write any; the row shows them."""
    began = time.perf_counter()
    try:
        queries = pipe.write_queries(prompt, image)
    except InputError:
        queries = methods.GENERIC
    return queries, time.perf_counter() - began
