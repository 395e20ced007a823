"""The operators beside pages that may not be touched, and with arguments that do not fit: see guard_pages.py."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trust.guard_pages import FUZZ, cpp_operators
from tests.trust.report import count
from vlmteacher import ops
from vlmteacher.errors import InputError
from vlmteacher.ops import attention, elementwise, patchify, qk_norm_rope, surrogate_decoder
from vlmteacher.ops.backends import cpp_status
from vlmteacher.ops.manifest import OPERATORS

ROOT = Path(__file__).parents[2]
with_cpp = pytest.mark.skipif(not cpp_status()[0], reason="the C++ operators are not built")


def fuzz(seed: int, cases: int) -> dict[str, Any]:
    """The last line of a process that tries so many; a crash is told with the case, which is its own seed."""
    command = [sys.executable, "-P", "-m", "tests.trust.guard_pages", str(seed), str(cases)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    where = [line for line in done.stdout.splitlines() if line.startswith(("case", "  "))][-2:]
    assert done.returncode == 0, f"exit status {done.returncode} in {where}: {done.stderr[-3000:]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    count("operators on guard pages", cases, "the definition's numbers")
    count("operators called with an argument spoiled", found["seen"]["refused"] + found["seen"]["computed"], "no crash")
    return found


def environment() -> dict[str, str]:
    """This process's, in which Python finds what it finds here: the package may be another build's."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)]), "OMP_NUM_THREADS": "1"}


def test_a_few_hundred_views() -> None:
    found = fuzz(0, 360)
    assert not found["untried"], f"C++ operators that no function of guard_pages.FUZZ reaches: {found['untried']}"
    assert min(found["seen"][kind] for kind in ("dense", "strided", "transposed", "expanded", "misaligned")) > 100
    assert found["seen"]["empty"] > 20


@pytest.mark.slow
def test_thousands_of_views() -> None:
    fuzz(1000 + date.today().toordinal() * 10_000, 5000)


def test_every_operator_has_an_entry() -> None:
    """Every registered operator, C++ or not, is a schema of the manifest or its backward, for which there is a fuzz."""
    folder = Path(next(iter(ops.__path__)))
    for path in folder.glob("*.py"):
        importlib.import_module(f"vlmteacher.ops.{path.stem}")  # which registers its own
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    ours = {name.removesuffix("_backward") for library, name in names if library == "vlmteacher"}
    assert ours == set(FUZZ)
    in_cpp = [operator for operator in OPERATORS.values() if "cpp" in operator.backends]
    named = {name for operator in in_cpp for name in (*operator.schemas, *operator.cpp_helpers)}
    if cpp_status()[0]:
        assert {name.removesuffix("_backward") for name in cpp_operators()} == named


def test_strided_tables_are_read_as_they_lie() -> None:
    x, weight = torch.randn(2, 5, 24), torch.randn(24)
    cos, sin = torch.randn(2, 6, 5, 2).unbind(-1)[0].mT.unbind(0)
    assert not cos.is_contiguous()
    (found,) = qk_norm_rope.qk_norm_rope([x], [weight], (cos, sin), 2)
    (expected,) = qk_norm_rope.qk_norm_rope_reference([x], [weight], cos.contiguous(), sin.contiguous(), 2, 1e-6)
    torch.testing.assert_close(found, expected)


X = torch.zeros(2, 5, 4, 8)
TAPS = torch.zeros(2, 1, dtype=torch.int32)
FRAMES = torch.zeros(2, 3, 8, 8)
LAYOUT = patchify.Rows(4, 4, 1, 1, [0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: elementwise.rotate(X, torch.zeros(5, 1, 3), torch.zeros(5, 1, 3)),
            r"cos must be .*\(5, 1, 4\).*, 3\)",
        ),
        (lambda: elementwise.rotate(X, torch.zeros(5, 1, 4), torch.zeros(4, 1, 4)), r"sin must be .*\(5, 1, 4\)"),
        (lambda: elementwise.rotate(X, torch.zeros(5, 4), torch.zeros(5, 4)), r"cos must be"),
        (lambda: elementwise.rotate(X, torch.zeros(5, 1, 4), torch.zeros(5, 1, 4).double()), r"sin must be.*float32"),
        (lambda: elementwise.rotate(X[..., :7], torch.zeros(5, 1, 3), torch.zeros(5, 1, 3)), r"d even"),
        (lambda: elementwise.rotate(X.int(), torch.zeros(5, 1, 4), torch.zeros(5, 1, 4)), r"floating-point"),
        (lambda: elementwise.gelu(X.int()), r"floating-point"),
        (lambda: elementwise.rotate(X.to("meta"), torch.zeros(5, 1, 4), torch.zeros(5, 1, 4)), r"on meta, not.*on cpu"),
        (lambda: surrogate_decoder.conv3x3(X, TAPS.long(), X, None, None, None, 0.0, 1), r"taps must be torch.int32"),
        (
            lambda: surrogate_decoder.conv3x3(X, TAPS, torch.zeros(4, 3, 3, 7), None, None, None, 0.0, 1),
            r"weight must be .*\(4, 3, 3, 8\)",
        ),
        (
            lambda: surrogate_decoder.conv3x3(X, TAPS, torch.zeros(4, 3, 3, 8), torch.zeros(5), None, None, 0.0, 1),
            r"bias must be .*\(4\)",
        ),
        (
            lambda: surrogate_decoder.conv3x3(X, TAPS, torch.zeros(4, 3, 3, 8), None, X, None, 0.0, 1),
            r"a residual with rows",
        ),
        (
            lambda: surrogate_decoder.conv3x3_backward(
                torch.zeros(2, 5, 4, 4), TAPS, TAPS, 2, torch.zeros(4, 3, 3, 8), None, None, 0.0, 1
            ),
            r"signs must be torch.uint8",
        ),
        (
            lambda: patchify.shuffle_to_rows(torch.zeros(2, 8, 8, 3), TAPS, torch.zeros(8, 47), 1, LAYOUT),
            r"rows must be .*\(any, 48\)",
        ),
        (
            lambda: patchify.shuffle_to_rows(torch.zeros(2, 8, 8, 3), TAPS, torch.zeros(48, 8).T, 1, LAYOUT),
            r"must be contiguous",
        ),
        (
            lambda: patchify.shuffle_to_rows(torch.zeros(2, 8, 8, 3), TAPS, torch.zeros(7, 48), 1, LAYOUT),
            r"no whole frames",
        ),
        (lambda: patchify.patchify(FRAMES, 0, 1, 1, [0.5] * 3, [0.5] * 3), r"extents >= 1"),
        (lambda: patchify.patchify(FRAMES, 4, 1, 1, [0.5] * 2, [0.5] * 3), r"three values"),
        (
            lambda: qk_norm_rope.qk_norm_rope([X[0]], [torch.ones(8, dtype=torch.int32)], None, 2),
            r"a weight, torch.int32",
        ),
        (
            lambda: attention.attention(X, X, X, attention.Spans(torch.ones(5, 3, dtype=torch.int32).to("meta"), 5)),
            r"spans on meta",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(call, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


@with_cpp
@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda cpp: cpp.rotate(X, torch.zeros(5, 1, 3), torch.zeros(5, 1, 3), False),
            r"cos and sin must be" if elementwise.is_own("elementwise", torch.float32) else r"needs a processor",
        ),
        (
            lambda cpp: cpp.qk_norm_rope([X[0]], [torch.zeros(8)], torch.zeros(4, 2), torch.zeros(4, 1), 2, 1e-6),
            r"cos and sin must be Float \(4, 2\), not Float \(4, 1\)",
        ),
        (lambda cpp: cpp.qk_norm_rope([X[0]], [torch.zeros(8)], None, None, 0, 1e-6), r"make no 0 heads"),
        (lambda cpp: cpp.patchify(FRAMES, 0, 1, 1, [0.0] * 3, [1.0] * 3, torch.float32, []), r"patches of one pixel"),
        (
            lambda cpp: cpp.lora_linear(X[0, 0], [X[0, 0]], [], [X[0, 0]], [X[0, 0]], [1.0]),
            r"lora_b must be Float \(4, 4\), not Float \(4, 8\)",
        ),
    ],
)
def test_called_past_the_python_functions_too(call, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        call(torch.ops.vlmteacher_cpp)


@with_cpp
def test_an_operators_failed_allocation_says_so() -> None:
    many = torch.zeros(1, 3, 1, 1).expand(1 << 50, 3, 1, 1)  # whose rows no address space has room for
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.ops.vlmteacher_cpp.patchify(many, 1, 1, 1, [0.0] * 3, [1.0] * 3, torch.float32, [])
