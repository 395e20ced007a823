"""Compile every Triton kernel that the operators' `examples` launch, for one architecture and without a GPU.

python -m benchmarks.static.triton_compile 80|90 [OPERATOR]
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import sys
from typing import Any

from vlmteacher.ops.manifest import OPERATORS


class Driver:
    """What Triton's compiler asks a driver, answered without a GPU."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead(architecture: int) -> list[tuple[Any, str]]:
    """Make launches compile instead of run; each new kernel is appended to the returned list, with ptxas's output."""
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(Driver(architecture))
    knobs.nvidia.dump_ptxas_log = True
    kernels: list[tuple[Any, str]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if log.getvalue():
            kernels.append((kernel, log.getvalue()))
        return kernel

    JITFunction.run = compile_only
    return kernels


def describe(kernel: Any) -> str:
    """The kernel's name with the dtype of its first pointer, its tile and its pipeline."""
    pointers = re.findall(r"!tt\.ptr<(\w+)", kernel.asm["ttir"])
    source = kernel.src
    names = source.fn.arg_names
    tile = [f"{names[i[0]].lower()}={v}" for i, v in source.constants.items() if names[i[0]].isupper() and len(i) == 1]
    return f"{kernel.metadata.name}<{pointers[0]}; {', '.join(tile)}; stages={kernel.metadata.num_stages}>"


def main() -> None:
    architecture, only = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    compiled = compile_instead(architecture)
    rows: dict[str, dict[str, Any]] = {}
    for operator in OPERATORS.values():
        if "triton" not in operator.backends or only not in ("", operator.name):
            continue
        compiled.clear()
        importlib.import_module(f"vlmteacher.kernels.{operator.name}").examples()
        for kernel, log in compiled:
            (registers,) = re.findall(r"Used (\d+) registers", log)
            spills = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
            name, threads = describe(kernel), 32 * kernel.metadata.num_warps
            columns = {"operator": operator.name, "backend": "triton", "kernel": name, "architecture": architecture}
            # of launches that differ in strides and alignment alone, the table has the worst of each
            worst = rows.setdefault(f"{operator.name} {name}", columns | {"threads": threads})
            for key, value in {"registers": registers, "spills": spills, "shared": kernel.metadata.shared}.items():
                worst[key] = max(int(value), worst.get(key, 0))
    print(json.dumps(list(rows.values())))


if __name__ == "__main__":
    main()
