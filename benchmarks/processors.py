"""Ours against stock on every class of processors: one machine computes as older ones would.

python -m benchmarks.processors [--json] [--write FILE] [--path NAME]... [--case NAME]... [--pairs N]

Each path sets the variables of the libraries that have one (`ISA_VARIABLES`) for both sides, and VLMTEACHER_CPU for
ours; each case is a benchmark in a process of its own, ours and stock in alternation there. On a processor with AMX
ours are by "AMX, our tiles" if nothing else is asked for; "AMX" is what there is of ours without them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.timing import ISA_VARIABLES, argument_parser

ROOT = Path(__file__).parents[1]
SETS = {  # what each of them is told; an empty value leaves it alone
    "SSE 4.1": ("SSE41", "default", "COMPATIBLE", "Nehalem", "baseline"),
    "AVX2": ("AVX2", "avx2", "AVX2", "Haswell", "avx2"),
    "AVX-512": ("AVX512_CORE", "avx512", "AVX512", "SkylakeX", "avx512"),
    "AVX-512 BF16": ("AVX512_CORE_BF16", "avx512", "AUTO", "", "avx512_bf16"),
    "AMX": ("AVX512_CORE_AMX", "avx512", "AUTO", "", "amx"),
    "AMX, our tiles": ("AVX512_CORE_AMX", "avx512", "AUTO", "", "amx_tiles"),
}
CASES = {  # the arguments of a benchmark
    "decoder, tiny, float32": ("surrogate_decoder", "--preset", "tiny", "--dtype", "float32"),
    "decoder, tiny, bfloat16": ("surrogate_decoder", "--preset", "tiny"),
    "decoder, mid, bfloat16": ("surrogate_decoder", "--preset", "mid"),
    "LoRA layers, microworld, float32": ("lora_linear", "--only", "microworld", "--dtype", "float32"),
    "LoRA layers, microworld, bfloat16": ("lora_linear", "--only", "microworld"),
    "LoRA layers, mid, bfloat16": ("lora_linear", "--only", "mid"),
    "Teacher, tiny, float32": ("teacher", "--preset", "tiny", "--no-flops", "--dtype", "float32"),
    "Teacher, tiny, bfloat16": ("teacher", "--preset", "tiny", "--no-flops"),
    "Teacher, mid, bfloat16": ("teacher", "--preset", "mid", "--no-flops"),
    "step, tiny, float32": ("step", "--preset", "tiny"),
    "step, mid, bfloat16": ("step", "--preset", "mid"),
}


def variables(path: str) -> dict[str, str]:
    """The environment variables of a path."""
    return {name: value for name, value in zip(ISA_VARIABLES, SETS[path], strict=True) if value}


def run(path: str, case: str, pairs: int | None) -> dict[str, Any]:
    """One case on one path: {"speedup", "low", "high", "load", "seconds"}, or {"why"} where it does not run."""
    name, *arguments = CASES[case]
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *arguments]
    command += ["--pairs", str(pairs)] if pairs else []
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables(path)}, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if not lines or not lines[-1].startswith("{"):
        return {"why": (done.stderr.splitlines() or ["no output"])[-1]}
    result = json.loads(lines[-1])
    rows, summary = result["rows"], result["summary"]
    return {
        "speedup": summary["speedup"],
        "low": min(row["speedup_low"] for row in rows),
        "high": max(row["speedup_high"] for row in rows),
        "load": os.getloadavg()[0],
        "seconds": time.perf_counter() - start,
    } | {key: summary[key] for key in ("vs_frozen_linear",) if key in summary}


def cell(result: Mapping[str, Any]) -> str:
    if "why" in result:
        return "not run"
    text = f"x{result['speedup']:.2f} [{result['low']:.2f}, {result['high']:.2f}]"
    return text + (f", {result['vs_frozen_linear']:.2f} of frozen" if "vs_frozen_linear" in result else "")


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--path", action="append", choices=SETS, help="of these alone (default: from AVX2 to AMX)")
    parser.add_argument("--case", action="append", choices=CASES, help="of these alone (default: all)")
    parser.add_argument("--write", type=Path, help="a Markdown file for the table")
    parser.set_defaults(pairs=None)
    settings = parser.parse_args()
    if settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    from vlmteacher.ops.processors import processor_name

    paths = settings.path or ["AVX2", "AVX-512", "AVX-512 BF16", "AMX"]
    cases = settings.case or list(CASES)
    table: dict[str, dict[str, Any]] = {case: {} for case in cases}
    for case in cases:
        for path in paths:
            table[case][path] = run(path, case, settings.pairs)
            print(f"{case:<26} {path:<14} {table[case][path]}", flush=True)
    lines = [f"| | {' | '.join(paths)} |", "|---" * (len(paths) + 1) + "|"]
    lines += [f"| {case} | {' | '.join(cell(row[path]) for path in paths)} |" for case, row in table.items()]
    print("\n".join(lines))
    if settings.write:
        settings.write.write_text(f"Measured on {processor_name()}.\n\n" + "\n".join(lines) + "\n")
    if settings.json:
        print(json.dumps({"benchmark": "processors", "processor": processor_name(), "rows": table}))


if __name__ == "__main__":
    main()
