"""Measure the processor time of `vlmteacher demo`, summed over all threads, from the command to its end.

python -m benchmarks.demo [--json] [--runs N] [--limit SECONDS]

The README claims 60 s on two cores with the packaged pair; the exit status is 1 when the median is above `--limit`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from vlmteacher.cli import main as vlmteacher


def measure(folder: Path) -> dict[str, Any]:
    """Run `vlmteacher demo` into `folder` and return its times."""
    wall, processor = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        status = vlmteacher(["demo", "--out", str(folder)])
    seconds = {"wall_s": time.perf_counter() - wall, "processor_s": time.process_time() - processor}
    if status:
        sys.exit(f"vlmteacher demo: exit status {status}")
    record = json.loads((folder / "run.json").read_text())
    return {"case": folder.name, **seconds, "steps": len(record["steps"]), "stopped": record["stopped"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--runs", type=int, default=3, help="the first one also loads the libraries")
    parser.add_argument("--limit", type=float, default=60.0, help="largest median in seconds of processor time")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(Path(folder) / f"run-{i}") for i in range(settings.runs)]
    print(f"demo on cpu, {torch.get_num_threads()} of {os.cpu_count()} threads")
    for row in rows:
        print(
            f"  {row['case']:<10} {row['steps']:3} updates, {row['stopped']:<12} "
            f"{row['processor_s']:6.1f} s of processor time, {row['wall_s']:6.1f} s"
        )
    summary = {name: statistics.median(row[name] for row in rows) for name in ("processor_s", "wall_s")}
    print("  median: " + ", ".join(f"{name} {value:.1f}" for name, value in summary.items()))
    if settings.json:
        print(json.dumps({"benchmark": "demo", "device": "cpu", "dtype": "float32", "rows": rows, "summary": summary}))
    if summary["processor_s"] > settings.limit:
        sys.exit(f"the demo took {summary['processor_s']:.1f} s of processor time, more than {settings.limit:g}")


if __name__ == "__main__":
    main()
