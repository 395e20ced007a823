"""Run the Triton kernels of ada_norm in the interpreter.

In a process of its own, because Triton decides at import whether it interprets:

    TRITON_INTERPRET=1 python -m tests.kernels.ada_norm_process
"""

from __future__ import annotations

import json
from unittest import mock

import torch

from tests.kernels.patchify_process import poisoned
from tests.kernels.test_ada_norm import CASES, DTYPES
from tests.ops.test_ada_norm import FORMS, draw, expected
from tests.rounding import excess
from vlmteacher.kernels import ada_norm as kernels


def main() -> None:
    """Print the largest error of each case as a share of the allowed one."""
    rows: list[dict[str, object]] = []
    for number, case in enumerate(CASES):
        for form in FORMS:
            for dtype in (DTYPES[0], DTYPES[1 + number % 2]):
                drawn, first = draw(case, form, dtype), case[3]
                x, y, gate, weight = (drawn[name] for name in ("x", "y", "gate", "weight"))
                with mock.patch.object(torch, "empty", poisoned):
                    made = kernels.ada_norm(x, y, gate, weight, drawn["bias"], first, 1e-6)
                    grads = drawn["grad_out"], drawn["grad_norm"]
                    kept = x if y is None else made[0]
                    made += kernels.ada_norm_backward(*grads, kept, gate, weight, first, 1e-6, True, gate is not None)
                # The interpreter cuts off to 16 bits where a GPU rounds to nearest, `out` before the norm too.
                units = 1 if dtype == torch.float32 else 3
                wanted = expected(drawn, first)
                parts = {name: excess(t, wanted[name], units) for name, t in zip(wanted, made, strict=True)}
                rows.append({"case": f"{form} {dtype} {case}", "part": max(parts.values()), "parts": parts})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
