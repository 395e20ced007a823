"""Which backend serves which operator on which processor, and the limit of the processor's class."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.processors import reachable, used_as
from vlmteacher.errors import InputError
from vlmteacher.ops import decoder_cpu, processors, surrogate_decoder
from vlmteacher.ops.attention import is_native
from vlmteacher.ops.backends import cpp_status
from vlmteacher.ops.processors import OWN, PROCESSORS, RULES, TORCH, VENDOR, limit

cpp = pytest.mark.skipif(not cpp_status()[0], reason="no C++ operators")


def test_every_rule_names_a_backend_for_every_class_and_its_measurement() -> None:
    for rule in RULES:
        assert len(rule.backends) == len(PROCESSORS) and set(rule.backends) <= {OWN, VENDOR, TORCH}
        assert "Zen 5" in rule.decided or "AMX" in rule.decided


@cpp
def test_the_classes_are_those_of_the_library() -> None:
    from vlmteacher import _C

    assert _C.widest() in PROCESSORS
    for name in reachable():
        with used_as(name):
            assert processors.in_use() == _C.processor() == name
    with pytest.raises(ValueError):
        _C.limit("vector")


@cpp
@pytest.mark.parametrize("name", PROCESSORS)
def test_dispatch_follows_the_table(name: str) -> None:
    if name not in reachable():
        pytest.skip(f"this processor does not reach {name}")
    with used_as(name):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.zeros(1, 1, 1, 2, dtype=dtype)
            served = {rule.operator: rule.backend(name) for rule in RULES if dtype in rule.dtypes}
            assert is_native(x) == (served.get("attention") == OWN)
            assert (surrogate_decoder._fast(x, x, 0) is decoder_cpu.Cpp) == (served.get("surrogate_decoder") == OWN)
            if not is_native(x) and dtype != torch.float16:
                with pytest.raises(RuntimeError, match="AVX-512"):
                    torch.ops.vlmteacher_cpp.attention(x, x, x, None, 1.0)


@pytest.mark.parametrize("name, words", [("sse9", "choose from baseline, avx2"), ("amx_tiles", "reach")])
def test_a_wrong_class_is_one_clear_error(name: str, words: str) -> None:
    if name in reachable():
        pytest.skip(f"this processor reaches {name}")
    with pytest.raises(InputError, match=words if cpp_status()[0] else "unknown|C.. operators"):
        limit(name)
    command = [sys.executable, "-m", "vlmteacher", "env"]
    if cpp_status()[0]:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VLMTEACHER_CPU": name})
        assert done.returncode == 2 and f"VLMTEACHER_CPU={name}" in done.stderr and done.stderr.count("\n") == 1


@cpp
def test_env_prints_the_policy_of_the_class_in_use() -> None:
    environment = {**os.environ, "VLMTEACHER_CPU": "baseline"}
    command = [sys.executable, "-m", "vlmteacher", "env", "--json"]
    processor = json.loads(subprocess.run(command, capture_output=True, text=True, env=environment).stdout)["processor"]
    assert processor["in_use"] == processor["limited_by"] == "baseline" and processor["name"]
    assert processor["policy"] == processors.table("baseline")
