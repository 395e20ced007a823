"""Run the Triton kernels of patchify in the interpreter.

In a process of its own, because Triton decides at import whether it interprets:

    TRITON_INTERPRET=1 python -m tests.kernels.patchify_process PART
"""

from __future__ import annotations

import json
import sys
from unittest import mock

import torch
from torch import Tensor

from tests.kernels.test_patchify import (
    CASES,
    DTYPES,
    MEAN,
    PARTS,
    SHUFFLES,
    STD,
    draw,
    draw_shuffle,
    shuffle_errors,
)
from tests.ops.test_patchify import by_matrices
from tests.rounding import excess, expected
from vlmteacher.kernels import patchify as kernels
from vlmteacher.ops.resize import resize_bands

_empty = torch.empty


def poisoned(*args: object, **kwargs: object) -> Tensor:
    made: Tensor = _empty(*args, **kwargs)  # type: ignore[call-overload]
    return made.fill_(float("nan") if made.is_floating_point() else 0xFF)


def main(part: int) -> None:
    """Print the errors of outputs and gradients as shares of the allowed ones, of every PARTS-th case."""
    rows: list[dict[str, object]] = []
    for number, case in list(enumerate(CASES))[part::PARTS]:
        # the interpreter is slow: float32, and one of the other pairs of dtypes in turn
        for dtype, out_dtype in (DTYPES[0], DTYPES[1 + number % (len(DTYPES) - 1)]):
            frames, grad, args, size = draw(case, dtype, out_dtype)
            shape = frames.shape[2:]
            back = (len(frames), *shape, *args, STD)
            bands = [resize_bands(frames, shape, size, backward) for backward in (False, True)]
            with mock.patch.object(torch, "empty", poisoned):
                out = kernels.patchify(frames, *args, MEAN, STD, out_dtype, bands[0])
                out_grad = kernels.patchify_backward(grad, *back, *size, dtype, bands[1])
            assert (out.dtype, out_grad.dtype) == (out_dtype, dtype)
            wanted = expected(by_matrices, frames, grad, args, size, out_dtype)
            for what, ours, each in zip(("output", "gradient"), (out, out_grad), wanted, strict=True):
                units = 1 if ours.dtype == torch.float32 else 2  # the interpreter cuts off, where a GPU rounds
                off = excess(ours, each, units)
                rows.append({"case": f"{what} {dtype} {out_dtype} {case}", "error": off, "allowed": 1})
    for number, case in list(enumerate(SHUFFLES))[part::PARTS]:
        for dtype, out_dtype in (DTYPES[0], DTYPES[1 + number % (len(DTYPES) - 1)]):
            drawn = draw_shuffle(case, dtype, out_dtype)
            y, slots, grad, layout = drawn
            made = torch.full_like(grad, torch.nan)
            with mock.patch.object(torch, "empty", poisoned):
                inside = kernels.shuffle_to_rows(y, slots, made, case[3], *layout)
                dy = kernels.shuffle_to_rows_backward(grad, slots, inside, *y.shape[1:3], case[3], *layout, dtype)
            for what, off, allowed in shuffle_errors(case, drawn, made, inside, dy, 1 if dtype == out_dtype else 2):
                rows.append({"case": f"{what} {dtype} {out_dtype} {case}", "error": off, "allowed": allowed})
    print(json.dumps(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]))
