"""The operators, one entry each, from which dispatch, the kernels' tests, the compile table and the benchmark lists are
made. Imports nothing, so that scripts read it without loading torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Operator:
    """An operator: its name, after which its files are called (see `files`), and what the name does not tell.

    Attributes:
        schemas: names under which torch.library knows it, in the namespaces vlmteacher, vlmteacher_cpp and
            vlmteacher_cuda; a schema's backward is called `SCHEMA_backward`.
        backends: of "cpp" (C++ on the CPU), "cuda" (CUDA C++) and "triton", those that it has.
        avx512: its C++ backend needs a processor with AVX-512, or a part of it one with AVX-512 BF16.
        cpp_helpers: schemas that only the C++ backend registers.
        benchmark: module in benchmarks/, and in benchmarks/gpu/ for an operator that runs on GPUs; default: its name.
        compiled: the least number of kernels in the compile table, by backend and architecture.
        occupancy: the least occupancy of these kernels, from 0 to 1.
    """

    name: str
    schemas: tuple[str, ...]
    backends: tuple[str, ...] = ("cpp", "cuda", "triton")
    avx512: bool = False
    cpp_helpers: tuple[str, ...] = ()
    benchmark: str = ""
    compiled: Mapping[str, int] = field(default_factory=dict)
    occupancy: float = 0.0

    @property
    def benchmark_module(self) -> str:
        return self.benchmark or self.name

    @property
    def on_gpu(self) -> bool:
        return "cuda" in self.backends or "triton" in self.backends

    def files(self) -> list[str]:
        """The files that it has, relative to the repository's root."""
        name, benchmark = self.name, self.benchmark_module
        files = [f"vlmteacher/ops/{name}.py", f"tests/ops/test_{name}.py", f"benchmarks/{benchmark}.py"]
        if "cpp" in self.backends:
            files += [f"csrc/{name}/cpu.cpp"]
        if "cuda" in self.backends:
            files += [f"csrc/{name}/{file}" for file in ("cuda.cu", "plan.cuh", "kernels.cuh", "instances.cu")]
            files += [f"tests/kernels/simt/{name}.cpp"]
        if "triton" in self.backends:
            files += [f"kernels/{name}.py", f"tests/kernels/{name}_process.py"]
        if self.on_gpu:
            files += [f"tests/kernels/test_{name}.py", f"benchmarks/gpu/{benchmark}.py"]
        return files


OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator("ada_norm", ("ada_norm",), benchmark="glue", compiled={"cuda": 12, "triton": 6}, occupancy=0.25),
        Operator("attention", ("attention",), ("cpp",), avx512=True),
        Operator(
            "elementwise", ("rotate", "gelu"), ("cpp", "triton"), avx512=True, compiled={"triton": 4}, occupancy=0.5
        ),
        Operator("lora_linear", ("lora_linear",), compiled={"cuda": 16, "triton": 16}),
        Operator("patchify", ("patchify", "shuffle_to_rows"), compiled={"cuda": 54, "triton": 7}, occupancy=0.5),
        Operator(
            "qk_norm_rope", ("qk_norm_rope",), benchmark="glue", compiled={"cuda": 12, "triton": 5}, occupancy=0.4
        ),
        Operator(
            "rms_norm", ("rms_norm",), ("triton",), benchmark="elementwise", compiled={"triton": 8}, occupancy=0.5
        ),
        Operator(
            "surrogate_decoder",
            ("conv3x3",),
            avx512=True,
            cpp_helpers=("conv3x3_pack", "conv3x3_readers", "conv3x3_gather", "conv3x3_finish"),
            compiled={"cuda": 17, "triton": 17},
        ),
        Operator("swiglu", ("swiglu",), ("triton",), benchmark="elementwise", compiled={"triton": 4}, occupancy=0.5),
    )
}
"""Every operator, by its name."""


def benchmark_modules(on_gpu: bool = False) -> list[str]:
    """The modules of benchmarks/ (those of benchmarks/gpu/ too, with `on_gpu`) that measure operators, each once."""
    chosen = (operator for operator in OPERATORS.values() if operator.on_gpu or not on_gpu)
    return list(dict.fromkeys(operator.benchmark_module for operator in chosen))


if __name__ == "__main__":  # for benchmarks/gpu/run_all.sh
    print(*benchmark_modules(on_gpu=True))
