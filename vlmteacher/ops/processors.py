"""Which backend serves which operator on which processor: one table, with the measurements that decided.

A processor belongs to the highest class that it, and the build of the C++ operators, has all of. The environment
variable VLMTEACHER_CPU, or `limit`, takes a lower class: our operators then compute as that processor's would, and
dispatch follows. `amx` is allowed wherever AVX-512 BF16 is, for it uses no more of ours; a processor with AMX is of
that class where the system or the build has no tiles for us.
"""

from __future__ import annotations

import functools
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmteacher.errors import InputError

VARIABLE = "VLMTEACHER_CPU"
PROCESSORS = {
    "baseline": "none of the instructions below",
    "avx2": "AVX2 and FMA",
    "avx512": "AVX-512 F, BW and VL",
    "avx512_bf16": "AVX-512 BF16",
    "amx": "AMX for bfloat16, through oneDNN",
    "amx_tiles": "AMX for bfloat16, our own kernels too",
}
"""The classes, from the lowest, as csrc/processor.h has them."""
OWN, VENDOR, TORCH = "own", "vendor", "torch"
"""Backends: our kernels; our autograd function over products and convolutions of oneDNN and MKL; torch's operators."""


@dataclass(frozen=True)
class Rule:
    """The backends of one operator for some dtypes and shapes, one for each class of `PROCESSORS`.

    Attributes:
        decided: the measurement, with its processor.
    """

    operator: str
    dtypes: tuple[torch.dtype, ...]
    shapes: str
    backends: tuple[str, ...]
    decided: str

    def backend(self, processor: str) -> str:
        return self.backends[list(PROCESSORS).index(processor)]


def _rule(operator: str, dtypes: str, shapes: str, backends: str, decided: str) -> Rule:
    return Rule(operator, tuple(getattr(torch, t) for t in dtypes.split()), shapes, tuple(backends.split()), decided)


_ZEN5 = "AMD EPYC of family 26 (Zen 5)"
_XEON = "Intel Xeon with AMX (family 6, model 207)"
_WITHOUT = "Intel Xeon without BF16 and AMX (family 6, model 207)"
RULES = (
    _rule(
        "surrogate_decoder", "float32", "all", "vendor own own own own own",
        f"{_ZEN5}, tiny, one thread, of stock's speed: Winograd's method x1.92 by AVX2, x2.29 by AVX-512; direct sums"
        " by AVX-512 x1.6; the vendor's convolutions under our function x0.7 to x0.85",
    ),
    _rule(
        "surrogate_decoder", "bfloat16", "all", "vendor own own own vendor own",
        f"{_ZEN5}: AVX-512 BF16 x1.57 to x1.66 of stock at tiny, 400 to 460 GFLOP/s a core for the vendor's 210;"
        f" {_XEON}, two threads: our tiles x2.5 to x2.7 of stock at tiny and x4.6 to x6.1 at mid, the vendor's"
        " convolutions, channels last, between two passes of ours x1.6 and x5.3",
    ),
    _rule(
        "lora_linear (wide products)", "float32", "all", "vendor vendor vendor vendor vendor vendor",
        f"{_ZEN5}: MKL is at its limit (benchmarks/NEGATIVE.md)",
    ),
    _rule(
        "lora_linear (wide products)", "bfloat16", "4 rows up, even depths", "vendor vendor vendor own vendor own",
        f"{_ZEN5}: ours takes 1.05 of the frozen layers' time, the vendor's 1.17;"
        f" {_XEON}, two threads: our tiles .9 to 1.4 at mid's sizes, .9 to 1.1 at those of a Reasoner of 5 billion, the"
        " vendor's 1.2 to 1.3 and 1.1;"
        f" {_WITHOUT}: the vendor's in bfloat16 31 GFLOP/s a core, so in float32: .25 of the frozen layers' time at mid"
        " (ours, with two multiply-adds for each pair, .32), by AVX2 .08",
    ),
    _rule(
        "lora_linear (products with the rank)", "float32", "256 results and more", "vendor vendor own own own own",
        f"{_ZEN5}: the vendor's run at a third of the wide products' speed",
    ),
    _rule(
        "lora_linear (products with the rank)", "bfloat16", "all", "vendor vendor own own own own",
        f"{_ZEN5}: as in float32; {_XEON}: S and dS by our tiles, the vendor's 102 to 248 GFLOP/s a core; {_WITHOUT}:"
        " as for the wide ones",
    ),
    _rule(
        "linear", "bfloat16", "of frozen layers", "torch vendor vendor torch torch torch",
        f"{_WITHOUT}, one core: torch's 30 GFLOP/s, in float32 with both sides widened 121 to 140; baseline, which"
        " may be another architecture, was not measured",
    ),
    _rule(
        "attention", "float32", "all", "torch torch own own own own",
        f"{_ZEN5}: four times torch's flash attention in bfloat16, faster in float32 (benchmarks/attention.py)",
    ),
    _rule(
        "attention", "bfloat16", "even channels", "torch torch own own own own",
        f"{_ZEN5}: four times torch's; {_XEON}: the Teacher with our tiles x7.0 to x8.5 of stock at mid, with our"
        f" AVX-512 BF16 x4.3; {_WITHOUT}: x2.1 to x3.3",
    ),
    _rule(
        "elementwise", "float32", "all", "torch torch own own own own",
        f"{_ZEN5}: one pass for torch's five (benchmarks/elementwise.py)",
    ),
    _rule("elementwise", "bfloat16", "all", "torch torch own own own own", f"{_ZEN5}: as in float32"),
    _rule(
        "ada_norm, qk_norm_rope, patchify", "float64 float32 float16 bfloat16", "all", "own own own own own own",
        f"{_ZEN5}, and every vector width (benchmarks/glue.py, benchmarks/patchify.py, benchmarks/NEGATIVE.md)",
    ),
)  # fmt: skip

_library: Any = None  # vlmteacher._C, once it is loaded
_served: dict[str, dict[torch.dtype, str]] = {}  # operator: dtype: backend, on the class in use


@functools.cache
def processor_name() -> str:
    """This machine's processor as its maker calls it, with its family."""
    facts: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        facts = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {facts['cpu family']})" if "cpu family" in facts else name


def start(library: Any) -> None:
    """Take the loaded C++ library's class, or the one that VLMTEACHER_CPU names. Raises InputError."""
    global _library
    _library = library
    if name := os.environ.get(VARIABLE):
        limit(name, f"{VARIABLE}={name}")
    else:
        _serve(library.processor())


def limit(name: str, shown: str = "") -> None:
    """Let all operators of this process compute as on a processor of the class `name`.

    Raises InputError: an unknown class, or one that this processor or this build does not reach.
    """
    shown = shown or f"limit({name!r})"
    if name not in PROCESSORS:
        raise InputError(f"unknown processor in {shown}: choose from {', '.join(PROCESSORS)}")
    if _library is None:
        raise InputError(f"{shown} needs the C++ operators: see `vlmteacher env`")
    order, widest = list(PROCESSORS), _library.widest()
    if order.index(name) > order.index(widest) and not (name == "amx" and widest == "avx512_bf16"):
        raise InputError(f"{shown}: this processor and build reach {widest}, choose up to that")
    _library.limit(name)
    _serve(name)


def _serve(processor: str) -> None:
    for rule in RULES:
        for operator in rule.operator.split(", "):
            for dtype in rule.dtypes:
                _served.setdefault(operator, {})[dtype] = rule.backend(processor)


def in_use() -> str:
    """The class that the operators use: `baseline` without the C++ library."""
    return "baseline" if _library is None else str(_library.processor())


def serving(operator: str, dtype: torch.dtype) -> str:
    """The backend of an operator of `RULES` for CPU tensors of this dtype."""
    return _served.get(operator, {}).get(dtype, TORCH)


def is_own(operator: str, dtype: torch.dtype) -> bool:
    """Whether our own kernels serve an operator of `RULES` on CPU tensors of this dtype."""
    return serving(operator, dtype) == OWN


def table(processor: str) -> list[dict[str, str]]:
    """The rules for a class: [{"operator", "dtypes", "shapes", "backend", "decided"}], JSON-ready."""
    return [
        {
            "operator": rule.operator,
            "dtypes": ", ".join(str(dtype).removeprefix("torch.") for dtype in rule.dtypes),
            "shapes": rule.shapes,
            "backend": rule.backend(processor),
            "decided": rule.decided,
        }
        for rule in RULES
    ]
