"""The microworld as a benchmark: held-out instances, the packaged pair, the rule scorer as judge."""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from vlmteacher.errors import InputError
from vlmteacher.microworld import world
from vlmteacher.microworld.scorer import Verdict, score

METHODS = "base, teacher, pass@N (N from 1 to 64)"


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
    chosen: Sequence[str] = world.PACKAGED,
) -> dict[str, Any]:
    """Run `method` on the first `limit` instances of a split as `seed` draws it; write and return results.json.

    Instance k has the same scene, prompt and noise for every method, so that methods can be compared pair by pair.
    Each finished instance is kept in ``instances.jsonl``; with `resume` those that are there are not run again.
    lora_blocks: of the method "teacher", see `Settings`.

    Raises:
        InputError: an unknown method, split or family; `out` not writable, or holding other results (or any, without
            `resume`).
    """
    from vlmteacher.lora import parse_blocks
    from vlmteacher.pipeline import read_pair

    samples = _samples(method)
    world.check(split, chosen)
    what = {"benchmark": "microworld", "method": method, "seed": seed, "split": split, "families": list(chosen)}
    steps: dict[str, Any] = {"max_steps": 0} if method == "base" else {}
    if lora_blocks is not None:
        if method != "teacher":
            raise InputError(f"lora_blocks {lora_blocks} is of the method teacher, not of {method}")
        directory, description = read_pair(pair)
        config = json.loads((directory / description["reasoner"] / "transformer" / "config.json").read_text())
        if parse_blocks(lora_blocks) > config["num_layers"]:
            raise InputError(f"lora_blocks {lora_blocks}: the transformer has {config['num_layers']} blocks")
        what["lora_blocks"] = steps["lora_blocks"] = lora_blocks
    rows = {row["index"]: row for row in _open(out, what, resume)}
    todo = [index for index in range(limit) if index not in rows]
    with (out / "instances.jsonl").open("a", encoding="utf-8") as log:
        one = functools.partial(_instance, samples=samples, seed=seed, split=split, chosen=chosen, steps=steps)
        for row in tqdm(_run(todo, one, workers, pair), total=len(todo), desc=method):
            rows[row["index"]] = row
            log.write(json.dumps(row) + "\n")
            log.flush()
    results = {**what, **summary([rows[index] for index in range(limit)])}
    partial = out / "results.json.partial"
    partial.write_text(json.dumps(results, indent=1), encoding="utf-8")
    os.replace(partial, out / "results.json")
    return results


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over instances, in all and for each split and task family."""

    def means(chosen: list[dict[str, Any]]) -> dict[str, Any]:
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
        "updates_mean": fmean(r["updates"] for r in rows),
        "seconds_mean": fmean(r["seconds"] for r in rows),
        "instances": rows,
    }


def _samples(method: str) -> int | str:
    if method in ("base", "teacher"):
        return method
    found = re.fullmatch(r"pass@(\d+)", method)
    if not found or not 1 <= int(found[1]) <= 64:
        raise InputError(f"method {method!r} is not there: it can be {METHODS}")
    return int(found[1])


def _open(out: Path, what: dict[str, Any], resume: bool) -> list[dict[str, Any]]:
    """Make `out` ready; the rows that it already has."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        settings = out / "settings.json"
        if settings.exists():
            if not resume:
                raise InputError(f"{out} already holds results: give another --out, or --resume to go on")
            there = json.loads(settings.read_text(encoding="utf-8"))
            if there != what:
                raise InputError(f"{out} holds other results ({there}): give another --out")
            lines = (out / "instances.jsonl").read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines if line.endswith("}")]
        if any(out.iterdir()):
            raise InputError(f"{out} is not empty: give another --out")
        settings.write_text(json.dumps(what), encoding="utf-8")
        (out / "instances.jsonl").touch()
    except OSError as error:
        raise InputError(f"{out} cannot be written to ({error.strerror}): give another --out") from error
    return []


def _run(
    todo: list[int], one: Callable[[int], dict[str, Any]], workers: int, pair: str | None
) -> Iterator[dict[str, Any]]:
    if workers == 1:
        _load(pair)
        yield from map(one, todo)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_load, initargs=(pair, 1)) as pool:
        yield from pool.map(one, todo)


_pipe: Any = None  # each worker process loads the models once


def _load(pair: str | None, threads: int | None = None) -> None:
    global _pipe
    from vlmteacher.pipeline import TeacherPipeline
    from vlmteacher.quiet import quiet

    quiet()
    if threads:
        torch.set_num_threads(threads)
    _pipe = TeacherPipeline.from_pretrained(pair=pair)


def judge(video: Tensor, scene: world.Scene) -> Verdict:
    """The rule scorer's verdict on a video (F, 3, H, W) in [0, 1]."""
    return score(video.permute(0, 2, 3, 1).float().cpu().numpy(), scene)


def first_frame(scene: world.Scene) -> Image.Image:
    """The scene's first frame as the image that a user would give."""
    return Image.fromarray((world.render(scene)[0] * 255).round().astype("uint8"))


def _instance(
    index: int, samples: int | str, seed: int, split: str, chosen: Sequence[str], steps: dict[str, Any]
) -> dict[str, Any]:
    from vlmteacher.baselines.best_of_n import best_of_n

    scene, prompt = world.instance(index, seed, split, chosen)
    image = first_frame(scene)
    noise_seed = 100_000 * seed + 100 * index
    began = time.perf_counter()
    extra: dict[str, Any] = {}
    if isinstance(samples, int):
        found = best_of_n(_pipe, prompt, image, [noise_seed + k for k in range(samples)])
        verdicts = [judge(video, scene) for video in found.videos]
        verdict = verdicts[found.best]
        losses = {"loss_first": None, "loss_one_step": None, "loss_final": found.losses[found.best]}
        extra = {"oracle_success": any(v.success for v in verdicts), "samples": [v.success for v in verdicts]}
        updates = 0
    else:
        generator = torch.Generator().manual_seed(noise_seed)
        made = _pipe(prompt, image, generator=generator, output_type="pt", progress=False, **steps)
        verdict, updates = judge(made.frames, scene), made.updates
        history = made.history
        losses = {
            "loss_first": history[0]["loss"] if history else None,
            "loss_one_step": history[-1]["loss"] if history else None,
            "loss_final": made.loss_after,
        }
        extra = {"queries": made.queries.to_dict(), "p_yes": made.p_yes_after}
    return {
        "id": f"{scene.family}/{seed}/{index:04d}",
        "index": index,
        "task": scene.family,
        "split": split,
        "prompt": prompt,
        "success": verdict.success,
        "score": verdict.score,
        "subscores": verdict.subscores,
        "seconds": time.perf_counter() - began,
        "updates": updates,
        **losses,
        **extra,
    }
