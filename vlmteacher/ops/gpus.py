"""Which backend serves which operator on a GPU, with the measurement that decided."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CUDA, TRITON, TORCH = "cuda", "triton", "torch"
"""Backends: our CUDA C++, our Triton kernels, torch's operators."""


@dataclass(frozen=True)
class Rule:
    """The backends of some operators for some dtypes and shapes, the first that is there; of two rules the earlier.

    Attributes:
        least: multiply-adds of a call from which on the rule holds.
        recorded: whether it holds only while a CUDA graph is recorded.
        decided: the measurement, with its GPU.
    """

    operators: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    backends: tuple[str, ...]
    decided: str
    least: float = 0.0
    recorded: bool = False

    @property
    def shapes(self) -> str:
        """The shapes that the rule is for, in words."""
        if self.recorded:
            return "within a recorded step"
        return f"{self.least:.3g} multiply-adds a call and more" if self.least else "others"


_HALF, _ALL = (torch.bfloat16, torch.float16), (torch.float32, torch.float16, torch.bfloat16)
_H200 = "H200, torch 2.11"
RULES = (
    Rule(
        ("surrogate_decoder",), _HALF, (TRITON, CUDA),
        f"{_H200}, of the plain decoder's speed: x2.20 at the paper's size, where CUDA C++ has x1.02; at mid, of"
        " smaller calls, x0.73 and x0.98; the border between them is an estimate",
        least=1.5e10,
    ),
    Rule(
        ("surrogate_decoder",), _ALL, (CUDA, TRITON),
        f"{_H200}: small calls are bound by launches, and Triton's launcher is Python; float32 was not timed",
    ),
    Rule(
        ("lora_linear",), _ALL, (TORCH,),
        f"{_H200}: .086 ms for CUDA C++'s .189 at 256 tokens of width 256, where launches do not count",
        recorded=True,
    ),
    Rule(
        ("lora_linear",), _HALF, (TORCH,),
        f"{_H200}: 4.0 to 5.8 ms at 20,240 tokens of width 3,072 for CUDA C++'s 13.8 to 21.4", least=2.0**33,
    ),
    Rule(
        ("lora_linear",), (torch.float32,), (TORCH,), f"{_H200}: CUDA C++ takes 1.9 to 2.6 times as long",
        least=2.0**31,
    ),
    Rule(
        ("lora_linear",), _ALL, (CUDA, TORCH),
        f"{_H200}: small products are bound by launches, of which CUDA C++ needs the fewest; Triton won at no size",
    ),
    Rule(
        ("ada_norm", "qk_norm_rope", "patchify"), _ALL, (CUDA, TRITON),
        f"{_H200}: CUDA C++ is ahead of Triton nearly everywhere (benchmarks/NEGATIVE.md)",
    ),
    Rule(
        ("elementwise", "rms_norm", "swiglu"), _ALL, (TRITON,),
        f"not timed; {_H200}: at 20,240 tokens qk_norm_rope's Triton kernel, of the same form, has x7.4 of plain torch",
    ),
)  # fmt: skip


def order(operator: str, dtype: torch.dtype, multiply_adds: float = 0.0, recorded: bool = False) -> tuple[str, ...]:
    """The backends for a call of an operator, the preferred one first; those that it has where no rule is for it."""
    for rule in RULES:
        fits = operator in rule.operators and dtype in rule.dtypes
        if fits and multiply_adds >= rule.least and (recorded or not rule.recorded):
            return rule.backends
    return (CUDA, TRITON)


def table() -> list[dict[str, str]]:
    """The rules: [{"operator", "dtypes", "shapes", "backend", "decided"}], JSON-ready."""
    return [
        {
            "operator": ", ".join(rule.operators),
            "dtypes": ", ".join(str(dtype).removeprefix("torch.") for dtype in rule.dtypes),
            "shapes": rule.shapes,
            "backend": ", ".join(rule.backends),
            "decided": rule.decided,
        }
        for rule in RULES
    ]
