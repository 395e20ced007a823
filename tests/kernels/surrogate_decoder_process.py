"""Run the Triton kernels of surrogate_decoder in the interpreter.

In a process of its own, because Triton decides at import whether it interprets:

    TRITON_INTERPRET=1 python -m tests.kernels.surrogate_decoder_process bfloat16|float16|float32
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from tests.kernels.lora_linear_process import create_dot
from tests.kernels.test_surrogate_decoder import FRAMES, INTERPRETED, draw, errors, identity
from vlmteacher.kernels import surrogate_decoder as kernels

_empty = torch.empty


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _empty(shape, dtype=dtype, device=device).fill_(255 if dtype == torch.uint8 else float("nan"))


def main(dtype: torch.dtype) -> None:
    rows: list[dict[str, Any]] = []
    for case in INTERPRETED[dtype]:
        drawn = draw(case, dtype)
        how, added = (case.slope, case.upscale), (drawn["bias"], drawn["residual"], drawn["rows"])
        through = (drawn["through"], drawn["through_signs"])
        with (
            mock.patch.object(torch, "empty", poisoned),
            mock.patch.object(InterpreterBuilder, "create_dot", create_dot),
        ):
            y, signs = kernels.conv3x3(drawn["x"], drawn["taps"], drawn["weight"], *added, *how)
            dx = kernels.conv3x3_backward(
                drawn["grad"], drawn["signs"], drawn["taps"], FRAMES, drawn["weight"], *through, *how
            )
        units = 2 if dtype == torch.bfloat16 else 1  # the interpreter cuts off, where a GPU rounds to nearest
        rows.append({"case": f"{dtype} {identity(case)}", "found": errors(case, drawn, y, signs, dx, units)})
    print(json.dumps(rows))


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
