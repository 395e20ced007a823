"""Run the Triton kernels of lora_linear in the interpreter.

In a process of its own, because Triton decides at import whether it interprets:

    TRITON_INTERPRET=1 python -m tests.kernels.lora_linear_process bfloat16|float16|float32
"""

from __future__ import annotations

import json
import sys
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests import rounding
from tests.kernels.patchify_process import poisoned
from tests.kernels.test_lora_linear import draw, expected
from vlmteacher.kernels import lora_linear as kernels

SIZES = [  # m, k, (n, rank) of each layer, biased
    (1, 64, [(64, 4)], True),
    (63, 200, [(136, 16)], False),
    (130, 63, [(63, 7)], True),  # nothing is aligned
    (33, 328, [(24, 128)], True),  # more rank than output
    (600, 72, [(40, 64)], False),  # the sums over rows are in parts
    (47, 96, [(160, 16), (32, 8), (31, 4)], True),
    (1100, 80, [(150, 8)], True),  # many block rows and columns
    (0, 64, [(64, 4), (8, 4)], True),
]


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
    """A product of values: the interpreter's own multiplies bfloat16's bit patterns."""
    left, right = (
        (t.data.astype(np.uint32) << 16).view(np.float32) if t.dtype.scalar.is_bf16() else t.data for t in (a, b)
    )
    return TensorHandle(np.matmul(left.astype(np.float32), right.astype(np.float32)) + d.data, d.dtype.scalar)


def main(dtype: torch.dtype) -> None:
    rows: list[dict[str, object]] = []
    for m, k, layers, biased in SIZES:
        drawn, scaling = draw(m, k, layers, biased, dtype), [0.7, 2.0, 1.3][: len(layers)]
        x, weights, low = drawn["x"][0], drawn["weights"], (drawn["lora_a"], drawn["lora_b"], scaling)
        count = len(layers)
        with (
            mock.patch.object(torch, "empty", poisoned),
            mock.patch.object(InterpreterBuilder, "create_dot", create_dot),
        ):
            *ys, s = kernels.lora_linear(x, weights, drawn["biases"] if biased else [], *low)
            dx, *rest = kernels.lora_linear_backward(drawn["grads"], x, s, weights, *low, True, True, True)
        ours = {"y": ys, "s": [s], "dx": [dx], "da": rest[:count], "db": rest[count:]}
        units = 2 if dtype == torch.bfloat16 else 1  # the interpreter cuts off, where a GPU rounds to nearest
        rows += [
            {"case": f"{name} {dtype} {(m, k, layers)}", "part": rounding.excess(t, wanted, units)}
            for name, tensors in expected(drawn, scaling).items()
            for t, wanted in zip(ours[name], tensors, strict=True)
        ]
    print(json.dumps(rows))


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
