"""Runs the Triton kernels of patchify on the CPU. A process of its own, since Triton decides at import whether it
interprets, and an interpreted kernel cannot be compiled.

    TRITON_INTERPRET=1 python tests/kernels/patchify_process.py interpret
    python tests/kernels/patchify_process.py compile
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from vlmteacher.kernels import patchify as kernels
from vlmteacher.ops.patchify import patchify_backward_reference, patchify_reference

MEAN, STD = [0.5, 0.4, 0.3], [0.5, 0.6, 0.7]
SIZES = [(4, 16, 32, 4, 2, 2), (5, 16, 8, 2, 2, 2), (1, 28, 14, 14, 2, 1), (7, 12, 24, 2, 4, 3), (3, 16, 32, 8, 1, 2)]
_empty = torch.empty


def poisoned(*args: object, **kwargs: object) -> Tensor:
    return _empty(*args, **kwargs).fill_(float("nan"))  # type: ignore[call-overload]


def error(x: Tensor, truth: Tensor) -> float:
    return (x.double() - truth).abs().max().item()


def interpret() -> list[dict[str, object]]:
    """Errors of kernel and plain torch against float64, for outputs and gradients."""
    rows: list[dict[str, object]] = []
    generator = torch.Generator().manual_seed(0)
    for t, height, width, patch, temporal_patch, merge in SIZES:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            args = (patch, temporal_patch, merge)
            frames = torch.rand(t, 3, width, height, generator=generator).to(dtype).transpose(2, 3)  # strided
            exact = patchify_reference(frames.double(), *args, MEAN, STD)
            grad = torch.randn(exact.shape, generator=generator).to(dtype)
            back = (t, height, width, *args, STD)
            exact_grad = patchify_backward_reference(grad.double(), *back)
            with mock.patch.object(torch, "empty", poisoned):
                out, out_grad = kernels.patchify(frames, *args, MEAN, STD), kernels.patchify_backward(grad, *back)
            for what, ours, plain, truth in [
                ("output", out, patchify_reference(frames, *args, MEAN, STD), exact),
                ("gradient", out_grad, patchify_backward_reference(grad, *back), exact_grad),
            ]:
                assert ours.dtype == dtype and ours.shape == truth.shape
                # The interpreter truncates where a GPU rounds to nearest: one rounding more than the kernel makes.
                eps = torch.finfo(dtype).eps * truth.abs().max().item() * (1 if dtype == torch.float32 else 2)
                rows.append(
                    {"case": f"{what} {dtype} {(t, height, width, *args)}", "error": error(ours, truth),
                     "allowed": 1.5 * error(plain, truth) + eps}
                )  # fmt: skip
    return rows


def compile_ahead() -> list[dict[str, object]]:
    """Registers and spilled bytes of both kernels for Ampere and Hopper."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    constants = {"PATCH": 16, "TEMPORAL": 2, "MERGE": 2, "BLOCK": kernels.BLOCK}
    rows: list[dict[str, object]] = []
    for kernel in (kernels.patchify_kernel, kernels.patchify_backward_kernel):
        signature = {
            name: "constexpr" if name in constants else "*bf16" if name in ("frames", "out", "grad")
            else "fp32" if name.startswith(("mean", "std")) else "i32"
            for name in kernel.arg_names
        }  # fmt: skip
        for capability in (80, 90):
            source = ASTSource(kernel, signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
                cubin.write(compiled.asm["cubin"])
                cubin.flush()
                usage = subprocess.check_output([cuobjdump, "-res-usage", cubin.name], text=True)
            registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[0]) for key in ("REG", "STACK"))
            rows.append({"case": f"{kernel.__name__} sm_{capability}", "registers": registers, "stack_bytes": stack})
    return rows


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_ahead}[sys.argv[1]]()))
