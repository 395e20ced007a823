"""Run the Triton kernels of rms_norm in the interpreter.

In a process of its own, because Triton decides at import whether it interprets:

    TRITON_INTERPRET=1 python -m tests.kernels.rms_norm_process
"""

from __future__ import annotations

import json
from unittest import mock

import torch

from tests.kernels.patchify_process import poisoned
from tests.ops.test_rms_norm import CASES, DTYPES, draw, expected
from tests.rounding import excess
from vlmteacher.kernels import rms_norm as kernels


def main() -> None:
    """Print the largest error of each case as a share of the allowed one."""
    rows: list[dict[str, object]] = []
    for number, case in enumerate(CASES):
        for dtype in (DTYPES[0], DTYPES[1 + number % 2]):
            x, weight, grad, added = drawn = draw(case, dtype)
            with mock.patch.object(torch, "empty", poisoned):
                made = [
                    kernels.rms_norm(x, weight, 1e-6),
                    *(kernels.rms_norm_backward(grad, x, weight, 1e-6, more) for more in (None, added)),
                ]
            units = 1 if dtype == torch.float32 else 2  # the interpreter cuts off to 16 bits
            parts = {name: excess(t, w, units) for (name, w), t in zip(expected(drawn).items(), made, strict=True)}
            rows.append({"case": f"{dtype} {case}", "part": max(parts.values()), "parts": parts})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
