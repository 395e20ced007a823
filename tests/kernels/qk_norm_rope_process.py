"""Run the Triton kernels of qk_norm_rope in the interpreter.

In a process of its own, because Triton decides at import whether it interprets:

    TRITON_INTERPRET=1 python -m tests.kernels.qk_norm_rope_process
"""

from __future__ import annotations

import json
from unittest import mock

import torch

from tests.kernels.patchify_process import poisoned
from tests.kernels.test_qk_norm_rope import CASES, DTYPES
from tests.ops.test_qk_norm_rope import draw, expected
from tests.rounding import excess
from vlmteacher.kernels import qk_norm_rope as kernels


def main() -> None:
    """Print the largest error of each case as a share of the allowed one."""
    rows: list[dict[str, object]] = []
    for number, case in enumerate(CASES):
        for dtype in (DTYPES[0], DTYPES[1 + number % 2]):
            drawn = draw(case, dtype)
            args = (drawn.xs, drawn.weights, *(drawn.rope or (None, None)), drawn.heads, 1e-6)
            with mock.patch.object(torch, "empty", poisoned):
                made = [*kernels.qk_norm_rope(*args), *kernels.qk_norm_rope_backward(drawn.grads, *args)]
            units = 1 if dtype == torch.float32 else 2  # the interpreter cuts off to 16 bits
            wanted = expected(drawn)
            parts = {name: excess(t, wanted[name], units) for name, t in zip(wanted, made, strict=True)}
            rows.append({"case": f"{dtype} {case}", "part": max(parts.values()), "parts": parts})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
