"""Compare the engines (`vlmteacher/optimization/engines.py`) from the same start, in alternation.

    python -m benchmarks.engines [--json] [--preset tiny|mid] [--engines compile cuda_graph] [--pairs N]

"stock" in the result is the eager engine. Losses of the first steps must agree (relative 1e-5 in float32, 1e-3 in half
precision), or the exit status is 1. The first steps, which compile and record, are not timed.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks.presets import PRESETS, Instance, build
from benchmarks.step import TOLERANCE, loss_differences
from benchmarks.timing import argument_parser, parsed, publish
from vlmteacher.lora.adapter import add_lora
from vlmteacher.optimization.engines import ENGINES, WARM_UP_STEPS
from vlmteacher.optimization.loop import Optimization
from vlmteacher.settings import Engine


def start(instance: Instance, engine: Engine) -> Optimization:
    """A new loop, on a copy of the Reasoner."""
    reasoner: Any = copy.copy(instance.reasoner)
    reasoner.transformer = copy.deepcopy(instance.reasoner.transformer)
    settings = replace(instance.settings, engine=engine)
    add_lora(reasoner.transformer, settings.rank, seed=instance.seed, fused=settings.fused_lora)
    return Optimization(
        reasoner, instance.decoder, instance.teacher, instance.condition, instance.noise, instance.queries, settings
    )


def measure(preset: str, instance: Instance, engine: Engine, rounds: int) -> dict[str, Any]:
    """Measure one engine against the eager one."""
    loops = {"ours": start(instance, engine), "stock": start(instance, "eager")}
    begin = time.perf_counter()
    for loop in loops.values():
        for _ in range(WARM_UP_STEPS + 1):
            loop.step()
    first = time.perf_counter() - begin
    for turn in range(rounds):
        for name in ("ours", "stock") if turn % 2 else ("stock", "ours"):
            loops[name].step()
    seconds = {name: [row["seconds"] for row in loop.history[-rounds:]] for name, loop in loops.items()}
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["stock"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
    losses = {name: [row["loss"] for row in loop.history] for name, loop in loops.items()}
    for loop in loops.values():
        loop.close()
    return {
        "case": f"{preset}, {engine}",
        "ours_ms": 1e3 * statistics.median(seconds["ours"]),
        "stock_ms": 1e3 * statistics.median(seconds["stock"]),
        "speedup": middle,
        "speedup_low": low,
        "speedup_high": high,
        "first_steps_s": first,
        "losses": losses,
        "loss_difference": max(loss_differences(losses["ours"], losses["stock"])),
    }


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument("--engines", nargs="+", choices=ENGINES[1:], help="default: those that the device can run")
    parser.set_defaults(dtype=None, pairs=5)
    settings = parsed(parser)
    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    instance = build(settings.preset, dtype, settings.device)
    settings.dtype = str(instance.reasoner.dtype).removeprefix("torch.")
    engines = settings.engines or (ENGINES[1:] if settings.device.startswith("cuda") else ("compile",))
    rows = [measure(settings.preset, instance, engine, settings.pairs) for engine in engines]
    publish("engines", settings, rows)
    for row in rows:
        if not row["loss_difference"] <= TOLERANCE[instance.reasoner.dtype]:
            sys.exit(f"{row['case']}: the losses differ by {row['loss_difference']:.1e} from the eager engine's")


if __name__ == "__main__":
    main()
