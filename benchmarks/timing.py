"""Time ours against stock, in one process and in alternation, so that a busy machine slows both alike."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_CBWR", "OPENBLAS_CORETYPE", "VLMTEACHER_CPU")


def _seconds(function: Callable[[], object], synchronize: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def compare(
    case: str, ours: Callable[[], object], stock: Callable[[], object], pairs: int = 15, device: str = "cpu"
) -> dict[str, Any]:
    """Time two functions: medians in ms, and the speedup stock/ours as the median over pairs, with its quartiles."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    for function in (ours, stock, ours, stock):  # caches, allocator, compilation
        _seconds(function, synchronize)
    times = []
    for pair in range(pairs):
        first, second = (ours, stock) if pair % 2 == 0 else (stock, ours)
        a, b = _seconds(first, synchronize), _seconds(second, synchronize)
        times.append((a, b) if pair % 2 == 0 else (b, a))
    ratios = [b / a for a, b in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "case": case,
        "ours_ms": 1e3 * statistics.median(a for a, _ in times),
        "stock_ms": 1e3 * statistics.median(b for _, b in times),
        "speedup": middle,
        "speedup_low": low,
        "speedup_high": high,
    }


def argument_parser(description: str, dtype: str = "float32") -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share, for `parsed`. dtype: the default of --dtype."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=dtype, choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--pairs", type=int, default=15, help="alternating measurements per case")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own)")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line and set the number of threads."""
    settings = parser.parse_args()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return settings


def arguments(description: str, dtype: str = "float32") -> argparse.Namespace:
    """The shared options alone, parsed."""
    return parsed(argument_parser(description, dtype))


def machine() -> dict[str, Any]:
    """What a result depends on beside the code: the processor, the class that our operators use (`path`), the variables
    that tell libraries to compute as on an older one, threads, and the load of the machine now."""
    from vlmteacher.ops.backends import cpp_status
    from vlmteacher.ops.processors import in_use, processor_name

    cpp_status()
    told = {name: os.environ[name] for name in ISA_VARIABLES if name in os.environ}
    threads = torch.get_num_threads()
    return {
        "processor": processor_name(), "path": in_use(), "isa": told, "threads": threads, "load": os.getloadavg()[0],
    }  # fmt: skip


def publish(name: str, settings: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """Print the table of `rows` and, with --json, one JSON object as the last line."""
    summary = {"speedup": math.exp(statistics.fmean(math.log(row["speedup"]) for row in rows))}
    if all(row.get("memory_ratio") is not None for row in rows):
        summary["memory_ratio"] = statistics.fmean(row["memory_ratio"] for row in rows)
    for ratio in ("vs_frozen_linear", "ceiling", "vs_best_stock"):
        if all(ratio in row for row in rows):
            summary[ratio] = statistics.geometric_mean(row[ratio] for row in rows)
    print(f"{name} on {settings.device}, {settings.dtype}, {torch.get_num_threads()} of {os.cpu_count()} threads")
    for row in rows:
        print(
            f"  {row['case']:<44} ours {row['ours_ms']:9.3f} ms  stock {row['stock_ms']:9.3f} ms  "
            f"x{row['speedup']:.2f} [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"
        )
    print("  mean: " + ", ".join(f"{name} {value:.2f}" for name, value in summary.items()))
    if settings.json:
        result = {"benchmark": name, "device": settings.device, "dtype": settings.dtype} | machine()
        print(json.dumps(result | {"rows": list(rows), "summary": summary}))
