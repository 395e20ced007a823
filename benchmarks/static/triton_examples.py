"""Compiles the Triton kernels that each operator launches, for one architecture, without a GPU. A process of its own.

python -m benchmarks.static.triton_examples 80|90 [OPERATOR]
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import torch


def patchify() -> None:
    """Frames as they are, and resized in every dtype; patch rows and frames from a decoder's last layer."""
    from vlmteacher.kernels import patchify as kernels

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for dtype, sizes in ((torch.bfloat16, (64, 96)), (torch.float16, (96,)), (torch.float32, (96,))):
        for size in sizes:
            # the taps of a band and of its transpose do not matter to what is compiled
            bands = 2 * [empty(size, dtype=torch.int32), empty(size, 4)] if size != 64 else []
            back = 2 * [empty(64, dtype=torch.int32), empty(64, 6)] if size != 64 else []
            frames = empty(4, 3, 64, 64, dtype=dtype)
            rows = kernels.patchify(frames, 16, 2, 2, [0.5] * 3, [0.5] * 3, dtype, bands)
            kernels.patchify_backward(rows, 4, 64, 64, 16, 2, 2, [0.5] * 3, size, size, dtype, back)
        y, slots = empty(4, 352, 640, 12, dtype=dtype), empty(4, 1, dtype=torch.int32)
        for high, wide, pair, merge in ((16, 16, 2, 2), (704, 1280, 1, 1)):
            rows = empty(4 * 704 * 1280 // (pair * high * wide), 3 * pair * high * wide, dtype=dtype)
            layout = (2, high, wide, pair, merge, [0.5] * 3, [0.5] * 3)
            inside = kernels.shuffle_to_rows(y, slots, rows, *layout)
            kernels.shuffle_to_rows_backward(rows, slots, inside, 352, 640, *layout, dtype)


def lora_linear() -> None:
    """The grouped and the single layer, large and small, and rows that are not aligned, in every dtype."""
    from vlmteacher.kernels import lora_linear as kernels

    shapes = [(4096, 3072, (3072,) * 3, 16), (4096, 3072, (3072,), 128), (257, 1001, (1003,), 5)]
    for dtype, cases in ((torch.bfloat16, shapes), (torch.float16, shapes[:1]), (torch.float32, shapes)):
        for m, k, sizes, rank in cases:

            def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                return torch.empty(shape, dtype=dtype, device="meta")

            x, weights, biases = empty(m, k), [empty(n, k) for n in sizes], [empty(n) for n in sizes]
            layers = ([empty(rank, k) for _ in sizes], [empty(n, rank) for n in sizes], [0.5] * len(sizes))
            *ys, s = kernels.lora_linear(x, weights, biases, *layers)
            kernels.lora_linear(x, weights, [], *layers)
            kernels.lora_linear_backward(ys, x, s, weights, *layers, True, True, True)


def surrogate_decoder() -> None:
    """The layers of taew2_2 that differ, in bfloat16, one of them in float32, and channels that are not aligned."""
    from vlmteacher.kernels import surrogate_decoder as kernels

    layers = [  # height, width, channels, n, taps, slope, bias, residual, upscale
        (44, 80, 48, 256, 1, 0.0, True, False, 1),
        (44, 80, 256, 256, 2, 0.0, True, True, 1),
        (44, 80, 256, 256, 1, 0.0, True, True, 1),
        (44, 80, 256, 128, 1, None, False, False, 2),
        (88, 160, 128, 128, 1, 0.0, True, True, 1),
        (176, 320, 64, 64, 1, 0.0, True, True, 1),
        (352, 640, 64, 12, 1, None, True, False, 1),
    ]
    cases = [(torch.bfloat16, *layer) for layer in layers] + [(torch.float32, *layers[2])]
    cases += [(dtype, 7, 9, 5, 12, 2, 0.2, True, False, 2) for dtype in (torch.bfloat16, torch.float32)]
    for dtype, height, width, channels, n, count, slope, bias, residual, upscale in cases:
        x = torch.empty(24, height, width, channels, dtype=dtype, device="meta")
        taps = torch.empty(24, count, dtype=torch.int32, device="meta")
        weight = torch.empty(n, 3, 3, count * channels, dtype=dtype, device="meta")
        b = torch.empty(n, dtype=dtype, device="meta") if bias else None
        banks = [None, None]  # a memory block's third convolution adds one forward, its first one backward
        if residual:
            banks[count - 1] = torch.empty(24, height, width, n, dtype=dtype, device="meta")
        y, signs = kernels.conv3x3(x, taps, weight, b, banks[0], taps, slope, upscale)
        kernels.conv3x3_backward(y, signs, taps, 24, weight, banks[1], signs, slope, upscale)


def ada_norm() -> None:
    """A Wan block's forms at 5B's width; of the widest one the other dtypes, and a width that is not aligned."""
    from vlmteacher.kernels import ada_norm as kernels

    others = [(dtype, width, "y gate weight") for dtype, width in ((torch.float32, 3072), (torch.bfloat16, 5001))]
    forms = [(torch.bfloat16, 3072, form) for form in ("weight", "y gate", "y weight", "y gate weight")]
    for dtype, width, form in forms + others:
        x = torch.empty(1, 4096, width, dtype=dtype, device="meta")
        table = torch.empty(1, 2, width, device="meta")
        gate, weight = (table if name in form else None for name in ("gate", "weight"))
        kernels.ada_norm(x, x if "y" in form else None, gate, weight, weight, 880, 1e-6)
        grads = x if "y" in form else None, None if weight is None else x
        kernels.ada_norm_backward(*grads, x, gate, weight, 880, 1e-6, True, gate is not None)


def qk_norm_rope() -> None:
    """Self- and cross-attention at 5B's width, and a width that is not aligned."""
    from vlmteacher.kernels import qk_norm_rope as kernels

    sizes = ((torch.bfloat16, 24, 128), (torch.float32, 24, 128), (torch.bfloat16, 3, 46))
    for dtype, heads, channels in sizes:
        x = torch.empty(1, 4096, heads * channels, dtype=dtype, device="meta")
        angles = torch.empty(4096, channels // 2, device="meta")
        for table in (angles, None) if dtype == torch.bfloat16 else (angles,):
            args = ([x], [x[0, 0]], table, table, heads, 1e-6)
            kernels.qk_norm_rope(*args)
            kernels.qk_norm_rope_backward([x], *args)


# Calls of each operator on tensors without data: every launch in them is compiled instead of run.
EXAMPLES: dict[str, Callable[[], None]] = {
    "patchify": patchify,
    "lora_linear": lora_linear,
    "surrogate_decoder": surrogate_decoder,
    "ada_norm": ada_norm,
    "qk_norm_rope": qk_norm_rope,
}


class Driver:
    """A GPU that is not there, as far as Triton's compiler asks for one."""

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
    """From here on launches compile; the returned list gets every new kernel, with the assembler's words about it."""
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(Driver(architecture))
    knobs.nvidia.dump_ptxas_log = True
    found: list[tuple[Any, str]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if log.getvalue():
            found.append((kernel, log.getvalue()))
        return kernel

    JITFunction.run = compile_only
    return found


def describe(kernel: Any) -> str:
    """The kernel's name with the dtype of its first pointer, its tile and its pipeline."""
    pointers = re.findall(r"!tt\.ptr<(\w+)", kernel.asm["ttir"])
    source = kernel.src
    names = source.fn.arg_names
    tile = [f"{names[i[0]].lower()}={v}" for i, v in source.constants.items() if names[i[0]].isupper() and len(i) == 1]
    return f"{kernel.metadata.name}<{pointers[0]}; {', '.join(tile)}; stages={kernel.metadata.num_stages}>"


def main() -> None:
    architecture, only = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    found = compile_instead(architecture)
    rows: dict[str, dict[str, Any]] = {}
    for operator, example in EXAMPLES.items():
        if only not in ("", operator):
            continue
        found.clear()
        example()
        for kernel, log in found:
            (registers,) = re.findall(r"Used (\d+) registers", log)
            spills = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
            name, threads = describe(kernel), 32 * kernel.metadata.num_warps
            facts = {"operator": operator, "backend": "triton", "kernel": name, "architecture": architecture}
            # of launches that differ in strides and alignment alone, the table has the worst of each
            worst = rows.setdefault(f"{operator} {name}", facts | {"threads": threads})
            for key, value in {"registers": registers, "spills": spills, "shared": kernel.metadata.shared}.items():
                worst[key] = max(int(value), worst.get(key, 0))
    print(json.dumps(list(rows.values())))


if __name__ == "__main__":
    main()
