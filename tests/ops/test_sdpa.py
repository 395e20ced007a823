"""Which of torch's attentions runs: orders by device, what is refused, runs of queries without a mask, the backward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from tests.conftest import Run, Solve
from tests.ops.test_attention import MASKS, spans_of
from vlmteacher.errors import InputError
from vlmteacher.ops import sdpa
from vlmteacher.ops.attention import Spans, _sdpa_run, attention_reference
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.reasoners.attention import check_backward

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "all"])
def test_runs_need_no_mask(mask: str) -> None:
    """Equal to the definition under the mask, in float64: output and gradients."""
    queries, keys = 45, 45
    spans = spans_of(mask, queries, keys)
    assert spans is not None
    if mask == "prefix":  # the Teacher's last layer: only some queries of each question
        spans = spans.at(torch.tensor([30, 31, 33, 43, 44]))
        assert [run[:2] for run in spans.runs] == [(0, 2), (2, 3), (3, 5)]
    if mask == "causal":
        spans = Spans(spans.table, keys)
        assert spans.runs == [(place, place + 1, place + 1, place + 1, place + 1) for place in range(45)]
    if mask == "segments":
        assert len(spans.runs) == 45  # each token sees all of its segment, also what comes later
    g = torch.Generator().manual_seed(0)
    shapes = ((len(spans.table), 4), (keys, 2), (keys, 2), (len(spans.table), 4))
    *qkv, grad = (torch.randn(2, n, heads, 16, generator=g, dtype=torch.float64) for n, heads in shapes)
    qkv = [x.requires_grad_() for x in qkv]
    n = spans.causal
    want = attention_reference(*qkv, spans)[:, n:]
    got = torch.cat([_sdpa_run(*qkv, run) for run in spans.runs], 1)
    for a, b in zip(
        (got, *torch.autograd.grad(got, qkv, grad[:, n:])), (want, *torch.autograd.grad(want, qkv, grad[:, n:])),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-13)


def test_runs_keep_no_copies_of_the_prefix() -> None:
    """For the backward: the three inputs, whose storage all runs share."""
    spans = spans_of("prefix", 45, 45)
    assert spans is not None and len(spans.runs) > 1
    qkv = [torch.randn(1, 45, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = [_sdpa_run(*qkv, run) for run in spans.runs]
    torch.cat(outputs, 1).sum().backward()
    assert sum(kept.values()) <= sum(x.nbytes for x in qkv) and all(x.grad is not None for x in qkv)


def test_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert sdpa.order("auto", GPU) == ("cudnn", "flash", "efficient", "math")
    assert sdpa.order("efficient", GPU) == ("efficient", "flash", "math")
    before = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    with sdpa.chosen("auto", GPU):
        kernels = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
        assert kernels == list(sdpa.BACKENDS.values())
    assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == before
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert sdpa.order("auto", GPU) == ("flash", "efficient", "math")
    assert sdpa.order("auto", torch.device("cpu")) == ()
    with pytest.raises(
        InputError, match=r"attention fa3 cannot run .the package flash_attn_interface is not installed"
    ):
        sdpa.order("fa3", GPU)


@pytest.mark.skipif(not hasattr(torch.nn.attention, "restore_flash_attention_impl"), reason="torch is too old for it")
def test_flash_attention_3_is_taken_up_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(sdpa.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", calls.append)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: calls.append("before"))
    with sdpa.chosen("fa3", GPU):
        assert calls == ["FA3"]
        kernels = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
        assert kernels[0] == torch.nn.attention.SDPBackend.FLASH_ATTENTION
    assert calls == ["FA3", "before"]


def test_attention_on_the_command_line(run: Run, solve: Solve, tmp_path: Path) -> None:
    status, _, error = run(*solve(tmp_path / "no", attention="fa3"))
    assert (
        status == 2 and "attention fa3 needs an NVIDIA GPU" in error.splitlines()[-1] and not (tmp_path / "no").exists()
    )
    status, *_ = run(*solve(tmp_path / "run", max_steps=0))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert status == 0 and record["config"]["attention"] == "auto" and record["attention"] in ("native", "torch")
    status, out, _ = run("env", "--json")
    assert "flash_attn_interface" in json.loads(out)["attention"]["fa3"]


@pytest.mark.parametrize("broken", ["detached", "not finite"])
def test_a_backend_without_a_backward_is_refused_at_once(
    pipe: TeacherPipeline, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    transformer, name = pipe.reasoner.transformer, AttentionBackendName.NATIVE
    run = _AttentionBackendRegistry._backends[name]

    def attend(query: torch.Tensor, **given: Any) -> torch.Tensor:
        output = run(query, **given)
        return output.detach() if broken == "detached" else output * (query * 0 - 1).sqrt()

    transformer.set_attention_backend("native")
    try:
        with monkeypatch.context() as patch:
            patch.setitem(_AttentionBackendRegistry._backends, name, attend)
            with pytest.raises(InputError, match="the attention backend native has no backward"):
                check_backward(transformer)
            with pytest.raises(InputError, match=r"choose another one .--attention|use diffusers' blocks"):
                pipe("a red ball", queries=["Is it red?"], max_steps=1, teacher_frames=2, progress=False)
    finally:
        transformer.reset_attention_backend()
    assert not getattr(transformer, "peft_config", None)
    check_backward(transformer)
