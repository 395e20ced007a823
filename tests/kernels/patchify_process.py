"""Runs the Triton kernels of patchify in the interpreter. A process of its own, since Triton decides at import whether
it interprets.

    TRITON_INTERPRET=1 python -m tests.kernels.patchify_process
"""

from __future__ import annotations

import json
from unittest import mock

import torch
from torch import Tensor

from tests.kernels.test_patchify import (
    CASES,
    DTYPES,
    MEAN,
    SHUFFLES,
    STD,
    draw,
    draw_shuffle,
    shuffle_errors,
)
from vlmteacher.kernels import patchify as kernels
from vlmteacher.ops.patchify import patchify_backward_reference, patchify_reference, resize_bands

_empty = torch.empty


def poisoned(*args: object, **kwargs: object) -> Tensor:
    made: Tensor = _empty(*args, **kwargs)  # type: ignore[call-overload]
    return made.fill_(float("nan") if made.is_floating_point() else 0xFF)


def error(x: Tensor, truth: Tensor) -> float:
    return (x.double() - truth).abs().max().item()


def main() -> None:
    """Errors of kernel and plain torch against float64, for outputs and gradients."""
    rows: list[dict[str, object]] = []
    for number, case in enumerate(CASES):
        # the interpreter is slow: float32, and one of the other pairs of dtypes in turn
        for dtype, out_dtype in (DTYPES[0], DTYPES[1 + number % (len(DTYPES) - 1)]):
            frames, grad, args, size = draw(case, dtype, out_dtype)
            shape = frames.shape[2:]
            exact = patchify_reference(frames.double(), *args, MEAN, STD, size)
            back = (len(frames), *shape, *args, STD)
            exact_grad = patchify_backward_reference(grad.double(), *back, size)
            bands = [resize_bands(frames, shape, size, backward) for backward in (False, True)]
            with mock.patch.object(torch, "empty", poisoned):
                out = kernels.patchify(frames, *args, MEAN, STD, out_dtype, bands[0])
                out_grad = kernels.patchify_backward(grad, *back, *size, dtype, bands[1])
            for what, ours, plain, truth in [
                ("output", out, patchify_reference(frames, *args, MEAN, STD, size, out_dtype), exact),
                ("gradient", out_grad, patchify_backward_reference(grad, *back, size, dtype), exact_grad),
            ]:
                assert ours.dtype == plain.dtype and ours.shape == truth.shape
                # The interpreter truncates where a GPU rounds to nearest: one rounding more than the kernel makes.
                eps = torch.finfo(ours.dtype).eps * truth.abs().max().item() * (1 if ours.dtype == torch.float32 else 2)
                rows.append(
                    {"case": f"{what} {dtype} {out_dtype} {case}", "error": error(ours, truth),
                     "allowed": 1.5 * error(plain, truth) + eps}
                )  # fmt: skip
    for number, case in enumerate(SHUFFLES):
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
    main()
