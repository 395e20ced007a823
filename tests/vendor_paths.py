"""Runs the numeric tests as other processors would: by the instruction sets that torch's vendors are told to use.

    python -m tests.vendor_paths [--path NAME]... [--write FILE] [pytest's arguments]     (make test-paths)

A processor can be told to compute as an older one. What each switch is for: ONEDNN_MAX_CPU_ISA oneDNN (convolutions,
products of bfloat16), ATEN_CPU_CAPABILITY torch's own loops, MKL_CBWR MKL (products of float32 and float64),
OPENBLAS_CORETYPE numpy's, VLMTEACHER_CPU the project's own operators, OMP_NUM_THREADS how sums are split.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.processors import SETS, variables
from tests.processors import reachable
from vlmteacher.ops.processors import VARIABLE, processor_name

ROOT = Path(__file__).parents[1]
PATHS = {
    f"{name}, {threads} thread{'s' * (threads > 1)}": variables(name) | {"OMP_NUM_THREADS": str(threads)}
    for name in SETS
    if "tiles" not in name  # tests/ops/test_tiles.py has an emulation of them
    for threads in (1, 2)
}
NUMERIC = [
    "tests/test_rounding.py",
    "tests/ops",
    "tests/kernels/test_lora_linear.py",
    "tests/decoders",
    "tests/lora/test_adapter.py",
    "tests/lora/test_fused_layer.py",
    "tests/lora/test_files.py",
    "tests/lora/test_pipeline.py",
    "tests/teachers",
    "tests/reasoners",
    "tests/optimization/test_engines.py",
    "tests/optimization/test_loop.py",
    "tests/test_pipeline.py",
    "tests/optimization/test_remedies.py",
    "tests/optimization/test_memory_ladder.py",
    "tests/optimization/test_targets.py",
    "tests/distillation/test_consistency.py",
    "tests/distillation/test_dmd2.py",
    "tests/distillation/test_adapters.py",
    "tests/evaluation/test_few_step.py",
    "tests/recipes/test_attention.py",
    "tests/recipes/test_training.py",
    "tests/recipes/teacher/test_pointing.py",
    "tests/trust/test_guard_pages.py",
]
TABLE = """# The numeric tests by other processors' paths

`make test-paths` (`tests/vendor_paths.py`) makes torch's vendor libraries compute as on older processors, and writes
this table. Every test must pass on every path: its bound is derived (`tests/rounding.py`), not measured.

Measured on {cpu}, torch {torch}. Where more is requested than the processor has,
oneDNN uses what it has (AMX here means all that the processor offers), and so may MKL on processors of other makers.

| path | passed | skipped | failed |
|---|---|---|---|
{rows}
"""
ELSEWHERE = "not cuda and not triton and not compiles and not warps"  # what no vendor's product takes part in


def run(path: str, arguments: list[str]) -> tuple[int, int, list[str], float]:
    """(passed, skipped, the names of what failed, seconds)."""
    # A process a core, whatever its threads: those that wait must not hold the others' core.
    environment = {**os.environ, **PATHS[path], "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "auto", "--dist", "worksteal"]
    command += ["--slow=all", "-k", ELSEWHERE, *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(done.stdout + done.stderr)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    last = done.stdout.splitlines()[-1]
    passed, skipped = (sum(map(int, re.findall(rf"(\d+) {word}", last))) for word in ("passed", "skipped"))
    return passed, skipped, failed, time.perf_counter() - start


def processor() -> str:
    """Its name and number of cores, and whether it has AMX."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    amx = "with" if "amx_bf16" in flags else "without"
    return f"{processor_name()}, {len(os.sched_getaffinity(0))} cores, {amx} AMX"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", action="append", choices=PATHS, help="of these alone; may be given several times")
    parser.add_argument("--write", type=Path, help="a Markdown file for the table")
    settings, arguments = parser.parse_known_args()
    rows, wrong = [], False
    for path in settings.path or PATHS:
        if PATHS[path][VARIABLE] not in reachable():
            reason = f"not run: this processor does not reach {PATHS[path][VARIABLE]}"
            rows.append(f"| {path} | | | {reason} |")
            print(f"{path:<20} {reason}", flush=True)
            continue
        passed, skipped, failed, seconds = run(path, arguments or NUMERIC)
        wrong |= bool(failed)
        rows.append(f"| {path} | {passed} | {skipped} | {', '.join(failed) or 0} |")
        print(f"{path:<20} {passed} passed, {skipped} skipped, {len(failed)} failed, {seconds:.0f} s", flush=True)
        for name in failed:
            print(f"    {name}", flush=True)
    if settings.write:
        settings.write.parent.mkdir(parents=True, exist_ok=True)
        settings.write.write_text(TABLE.format(cpu=processor(), torch=torch.__version__, rows="\n".join(rows)))
    sys.exit(wrong)


if __name__ == "__main__":
    main()
