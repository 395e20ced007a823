"""Compile the GPU kernels with both compilers, and tabulate registers, spills, shared memory and occupancy."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmteacher.ops.manifest import OPERATORS

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("table.md")
ARCHITECTURES = (80, 90)
# One multiprocessor's (A100, H100) threads, registers, and bytes of shared memory for blocks.
LIMITS = {80: (2048, 65536, 164 * 1024), 90: (2048, 65536, 228 * 1024)}
RESERVED_SHARED = 1024  # bytes that the driver takes from every block


@dataclass(frozen=True)
class Row:
    """One kernel, compiled for one architecture."""

    operator: str
    backend: str
    kernel: str
    architecture: int
    registers: int
    spills: int  # bytes of registers kept in memory, stores and loads
    shared: int  # bytes a block, static and dynamic
    threads: int

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's threads that can be resident at once, from 0 to 1."""
        threads, registers, shared = LIMITS[self.architecture]
        warps = math.ceil(self.threads / 32)
        a_warp = math.ceil(self.registers * 32 / 256) * 256
        blocks = min(threads // (32 * warps), registers // (a_warp * warps), shared // (self.shared + RESERVED_SHARED))
        return 32 * warps * blocks / threads


def nvcc_rows(only: str | None = None, architectures: Sequence[int] = ARCHITECTURES) -> Iterator[Row]:
    """The rows of every kernel in the operators' instances.cu. Its lines `// launch PATTERN THREADS BYTES` state the
    threads and the dynamic shared memory of a launch of kernels whose name matches; the first match counts."""
    for operator in OPERATORS.values():
        if "cuda" not in operator.backends or only not in (None, operator.name):
            continue
        source = ROOT / f"csrc/{operator.name}/instances.cu"
        launches = re.findall(r"// launch (\S+) (\d+) (\d+)", source.read_text())
        for architecture in architectures:
            with tempfile.TemporaryDirectory() as folder:
                command = ["nvcc", "-std=c++20", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v", str(source)]
                done = subprocess.run([*command, "-o", f"{folder}/k.cubin"], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
            text = subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True, check=True).stdout
            for name, body in re.findall(
                r"Compiling entry function '(.+?)' for .*?\n(.*?)(?=Compiling|\Z)", text, re.DOTALL
            ):
                spilled = sum(map(int, re.findall(r"(\d+) bytes spill", body)))
                (registers,) = re.findall(r"Used (\d+) registers", body)
                static = re.findall(r"(\d+) bytes smem", body)
                short = _short(name)
                threads, dynamic = next(
                    ((int(t), int(s)) for pattern, t, s in launches if re.search(pattern, short)), (256, 0)
                )
                shared = dynamic + sum(map(int, static))
                yield Row(operator.name, "cuda", short, architecture, int(registers), spilled, shared, threads)


def _short(name: str) -> str:
    """A demangled kernel name without return type, arguments, namespaces and casts of enumerators."""
    name = re.sub(r"\((?:\w+::)*\w+\)(-?\d+)", r"\1", name.removeprefix("void "))
    name = name[: name.rindex("(")] if name.endswith(")") else name
    return re.sub(r"\b\w+::", "", name).replace(" ", "").replace("__nv_bfloat16", "bf16").replace("__half", "f16")


def triton_rows(only: str | None = None, architectures: Sequence[int] = ARCHITECTURES) -> Iterator[Row]:
    """The rows of every launch in the operators' `examples`. One process per architecture: Triton caches kernels."""
    for architecture in architectures:
        module = "benchmarks.static.triton_compile"
        command = [sys.executable, "-W", "ignore", "-m", module, str(architecture), only or ""]
        with tempfile.TemporaryDirectory() as cache:  # empty: ptxas prints nothing for a cached kernel
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": cache}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        yield from (Row(**row) for row in json.loads(done.stdout.splitlines()[-1]))


def rows(backends: tuple[str, ...], only: str | None = None, architectures: Sequence[int] = ARCHITECTURES) -> list[Row]:
    """The table's rows. Raises RuntimeError with the compiler's output for a kernel that does not compile."""
    compiled: list[Row] = []
    if "triton" in backends:
        compiled += triton_rows(only, architectures)
    if "cuda" in backends:
        if shutil.which("nvcc") is None:
            raise RuntimeError("nvcc was not compiled: install the CUDA toolkit, or ask for --only triton")
        compiled += nvcc_rows(only, architectures)
    return sorted(compiled, key=lambda r: (r.operator, r.backend, r.kernel, r.architecture))


def table(compiled: list[Row]) -> str:
    lines = ["| operator | backend | kernel | sm | registers | spilled bytes | shared bytes | threads | occupancy |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for r in compiled:
        cells: list[Any] = [r.operator, r.backend, f"`{r.kernel}`", r.architecture, r.registers, r.spills, r.shared]
        lines.append("| " + " | ".join(map(str, [*cells, r.threads, f"{r.occupancy:.2f}"])) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static", description=__import__(__package__ or "").__doc__
    )
    parser.add_argument("--only", choices=["triton", "cuda"])
    parser.add_argument("--operator", choices=OPERATORS, help="only this operator's kernels")
    parser.add_argument("--write", action="store_true", help=f"keep the table in {TABLE.relative_to(ROOT)}")
    settings = parser.parse_args()
    compiled = rows((settings.only,) if settings.only else ("triton", "cuda"), settings.operator)
    text = table(compiled)
    print(text)
    spilled = [r.kernel for r in compiled if r.spills]
    summary = f"{len(compiled)} kernels, {len(spilled)} of which spill registers"
    print(f"\n{summary}{': ' + ', '.join(spilled) if spilled else ''}")
    if settings.write:
        TABLE.write_text(f"# GPU kernels as compiled\n\n`python -m benchmarks.static --write`. {summary}.\n\n{text}\n")


if __name__ == "__main__":
    main()
