"""The table of backends for GPUs, and the dispatch that follows it, without a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlmteacher.ops import backends, gpus
from vlmteacher.ops.manifest import OPERATORS
from vlmteacher.ops.surrogate_decoder import _rows

BF16, F32 = torch.bfloat16, torch.float32


def test_the_decoder_by_the_size_of_a_call() -> None:
    assert gpus.order("surrogate_decoder", BF16, 1.6e10) == ("triton", "cuda")
    assert gpus.order("surrogate_decoder", BF16, 1.4e10) == gpus.order("surrogate_decoder", F32, 1e12)
    assert gpus.order("surrogate_decoder", BF16, 1.4e10) == ("cuda", "triton")
    assert _rows(900, 1) == 900 and _rows(900, 2) == pytest.approx(400)  # four of nine taps


def test_the_lora_products_by_size_and_in_a_recorded_step() -> None:
    assert gpus.order("lora_linear", BF16, 2**33) == gpus.order("lora_linear", F32, 2**31) == ("torch",)
    assert gpus.order("lora_linear", BF16, 2**33 - 1) == gpus.order("lora_linear", F32, 2**31 - 1) == ("cuda", "torch")
    assert gpus.order("lora_linear", BF16, 0, recorded=True) == ("torch",)
    assert gpus.order("surrogate_decoder", BF16, 0, recorded=True) == ("cuda", "triton")


def test_every_operator_of_gpus_has_a_rule_and_every_rule_its_measurement() -> None:
    for operator in OPERATORS.values():
        rules = [rule for rule in gpus.RULES if operator.name in rule.operators]
        assert bool(rules) is operator.on_gpu
        for dtype in (F32, BF16, torch.float16) if rules else ():
            assert any(dtype in rule.dtypes for rule in rules)
            assert {*gpus.order(operator.name, dtype)} <= {*operator.backends, "torch"}
    names = {name for row in gpus.table() for name in row["backend"].split(", ")}
    assert names == {"cuda", "triton", "torch"} and all("H200" in row["decided"] for row in gpus.table())


def test_dispatch_follows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "cuda_status", lambda: (True, ""))
    monkeypatch.setattr(backends, "triton_status", lambda: (True, ""))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x: Any = SimpleNamespace(device=torch.device("cuda"), dtype=BF16)
    weight = torch.empty(64, 3, 3, 64, device="meta")
    from vlmteacher.kernels import surrogate_decoder as kernels

    def decoder(rows: float) -> Any:
        return backends.backend(x, "surrogate_decoder", [weight], rows)

    assert decoder(1e5) is torch.ops.vlmteacher_cuda and decoder(1e6) is kernels
    assert backends.backend(x, "patchify") is torch.ops.vlmteacher_cuda
    assert backends.backend(x, "lora_linear", [weight], 10) is torch.ops.vlmteacher_cuda
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backends.backend(x, "lora_linear", [weight], 10) is None
    assert decoder(1e5) is torch.ops.vlmteacher_cuda
    monkeypatch.setattr(backends, "triton_status", lambda: (False, "no"))
    assert decoder(1e6) is torch.ops.vlmteacher_cuda
    monkeypatch.setattr(backends, "cuda_status", lambda: (False, "no"))
    assert decoder(1e6) is None and decoder(1e5) is None


def test_the_measurements_are_those_of_the_negative_results() -> None:
    text = (Path(__file__).parents[2] / "benchmarks" / "NEGATIVE.md").read_text()
    assert all(number in text for number in ("x2.20", "x1.02", "x0.73", "x0.98", ".086 ms", ".189", "13.8 to 21.4"))
