"""Run the Triton kernels of elementwise in the interpreter.

In a process of its own, because Triton decides at import whether it interprets:

    TRITON_INTERPRET=1 python -m tests.kernels.elementwise_process
"""

from __future__ import annotations

import json
from unittest import mock

import torch

from tests.kernels.patchify_process import poisoned
from tests.ops.test_elementwise import drawn_rotation, rotation
from tests.rounding import excess, expected
from vlmteacher.kernels import elementwise as kernels

SHAPES = [(1, 5, 3, 8), (2, 7, 4, 72), (1, 3, 1, 66), (1, 0, 2, 4)]


def main() -> None:
    """Print the largest error of each case as a share of the allowed one."""
    rows: list[dict[str, object]] = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x, grad, cos, sin = drawn_rotation(shape, dtype)
            strided = x.to(dtype).repeat_interleave(2, 2)[:, :, ::2]
            with mock.patch.object(torch, "empty", poisoned):
                made = [kernels.rotate(strided, cos, sin, False), kernels.rotate(grad.to(dtype), cos, sin, True)]
            units = 1 if dtype == torch.float32 else 2  # the interpreter cuts off to 16 bits
            wanted = expected(rotation, cos, sin, x, grad, dtype)
            part = max(excess(t, w, units) for w, t in zip(wanted, made, strict=True))
            rows.append({"case": f"{dtype} {shape}", "part": part})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
