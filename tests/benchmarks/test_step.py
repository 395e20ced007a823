"""The step benchmark computes the same on both sides: real classes, random weights, tiny sizes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import step
from benchmarks.instance import measure_instance
from benchmarks.presets import Instance, build
from benchmarks.step import OurLoop, PeakMemory, SavedBytes, Side, loss_differences
from benchmarks.stock import PARTS, StockLoop, Watch
from vlmteacher.lora.adapter import add_lora, load_lora_state, lora_state_dict
from vlmteacher.queries import QuerySet

MIB = 2**20


def text_only(instance: Instance) -> Instance:
    return replace(
        instance,
        condition=replace(instance.condition, first_frame=None),
        queries=QuerySet(instance.queries.goal),
    )


def gradients(optimizer: torch.optim.Optimizer) -> list[list[Tensor]]:
    """A list to which every step of `optimizer` appends its gradients."""
    collected: list[list[Tensor]] = []

    def collect(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        collected.append([weight.grad.clone() for group in optimizer.param_groups for weight in group["params"]])

    optimizer.register_step_pre_hook(collect)
    return collected


@pytest.mark.parametrize("variant", ["checkpointed", "plain"])
@pytest.mark.parametrize("kind", ["image", "text only"])
def test_stock_and_ours_take_the_same_steps(variant: Any, kind: str) -> None:
    instance = build("smoke")
    if kind == "text only":
        instance = text_only(instance)
    stock = StockLoop(instance, variant)
    ours = OurLoop(instance)
    mine, theirs = gradients(ours.loop.optimizer), gradients(stock.optimizer)
    losses = []
    for index in range(3):
        # Adam turns gradients near 0 into updates of either sign: each step starts from equal weights.
        load_lora_state(stock.transformer, lora_state_dict(instance.reasoner.transformer))
        losses.append(ours.step())
        assert losses[index] == pytest.approx(stock.step(), rel=1e-5)
        for a, b in zip(mine[index], theirs[index], strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
        for a, b in zip(ours.loop.parameters, stock.parameters, strict=True):
            assert (a - b).norm() <= 1e-3 * b.norm()
        # B is 0 at first, so that A has a gradient from the second step on.
        zeros = sum(not gradient.any() for gradient in theirs[index])
        assert zeros == (len(stock.parameters) // 2 if index == 0 else 0)
    assert losses[2] < 0.999 * losses[0]  # the updates do something


def test_checkpointing_is_on_and_saves() -> None:
    instance = build("smoke")
    checkpointed, plain = (Side(variant, StockLoop(instance, variant), "cpu") for variant in ("checkpointed", "plain"))
    for side in (checkpointed, plain):
        side.warm_up()
    assert checkpointed.saved_bytes < 0.8 * plain.saved_bytes


def test_every_part_is_timed_and_they_make_up_the_step() -> None:
    ours = Side("ours", OurLoop(build("smoke")), "cpu")
    ours.timed_step()
    report = ours.report()
    assert set(report["parts_ms"]) == set(PARTS)
    assert sum(report["parts_ms"].values()) == pytest.approx(report["ms"])
    assert all(milliseconds > 0 for milliseconds in report["parts_ms"].values())


def test_a_part_that_never_ended_is_an_error() -> None:
    watch = Watch()
    for part in PARTS[:-1]:
        watch.mark(part)
    with pytest.raises(RuntimeError, match="one after another"):
        watch.seconds()


def test_saved_bytes_counts_a_storage_once_and_no_weights() -> None:
    layer = torch.nn.Linear(256, 256)
    x = torch.randn(1024, 256, requires_grad=True)
    saved = SavedBytes([layer])
    with saved.hooks:
        y = layer(x)
        z = y.exp() + y.sin()  # exp keeps its result, sin its argument
        saved.stop()
        z = z * z
    assert saved.total == 3 * x.nbytes
    z.sum().backward()


def test_peak_memory_counts_what_was_freed_again() -> None:
    with PeakMemory("cpu") as memory:
        block = torch.ones(64 * MIB // 4)
        del block
    if memory.bytes is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 60 * MIB < memory.bytes < 90 * MIB


def test_loss_differences() -> None:
    assert loss_differences([2.0, 1.0], [2.0, 1.25]) == [0, pytest.approx(0.2)]
    assert loss_differences([1.0] * 6, [1.0] * 5 + [2.0]) == [0] * 5  # the sixth step is not compared
    assert math.isinf(loss_differences([1.0, math.nan], [1.0, 1.0])[1])


def test_in_half_precision_float32_decides_whether_losses_agree() -> None:
    row = step.measure("smoke", build("smoke", torch.bfloat16), ["plain"], 2)
    assert bool(row["float32_losses"]) == (1e-3 < row["loss_difference"]["plain"] <= 1e-2)
    ours, stock = (Side(name, StockLoop(build("smoke", torch.bfloat16), "plain"), "cpu") for name in ("ours", "stock"))
    exact = step.Float32(build("smoke", torch.bfloat16))
    for side in (ours, stock):
        side.warm_up()
    assert step.agree(ours, stock, exact, 1e-3) and not ours.float32_losses
    stock.losses[0] *= 1.005  # as by rounding: the LoRAs are the same
    assert step.agree(ours, stock, exact, 1e-3) and not step.agree(ours, stock, None, 1e-3)
    assert ours.float32_losses == stock.float32_losses == {0: pytest.approx(ours.losses[0], rel=2e-2)}
    assert ours.float32_losses[0] != ours.losses[0]
    stock.float32_losses[0] *= 1.005  # another course
    assert not step.agree(ours, stock, exact, 1e-3)
    stock.float32_losses[0], stock.losses[0] = ours.float32_losses[0], 1.02 * ours.losses[0]
    assert not step.agree(ours, stock, exact, 1e-3)  # more than rounding does


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["step", "--preset", "smoke", "--pairs", "1", "--variants", "plain", "--device", "cpu", "--json"]
    monkeypatch.setattr("sys.argv", arguments)
    step.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = result["rows"]
    assert result["benchmark"] == "step" and result["dtype"] == "float32"
    assert row["speedup"] == pytest.approx(result["summary"]["speedup"])
    assert row["vs_best_stock"] == row["speedup"]  # there is one variant
    assert result["summary"]["vs_best_stock"] == pytest.approx(row["speedup"])
    assert row["compared_steps"] == 2 and row["same_losses"]
    assert [len(side["losses"]) for side in row["sides"].values()] == [2, 2]
    whole = row["instance"]
    for side, own in (("ours", "ours"), ("stock", "plain")):
        assert whole["parts_s"][side]["steps"] == pytest.approx(16e-3 * row["sides"][own]["cpu_ms"])
        assert whole["total_s"][side] == pytest.approx(sum(whole["parts_s"][side].values()))
    assert whole["parts_s"]["ours"]["text"] == 0 < whole["parts_s"]["ours"]["after"], "random weights have no tokenizer"

    original = StockLoop.predict_clean
    monkeypatch.setattr(StockLoop, "predict_clean", lambda loop: 1.01 * original(loop))
    with pytest.raises(SystemExit, match="the losses differ by"):
        step.main()
    assert not json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["same_losses"]


@pytest.mark.slow
def test_the_seconds_of_a_whole_instance() -> None:
    instance = build("tiny")
    loop = StockLoop(instance)
    add_lora(instance.reasoner.transformer, 2)
    row = measure_instance(instance, loop, (0.25, 0.75), "cpu", updates=4)
    ours, stock, plain = (row["parts_s"][side] for side in ("ours", "stock", "plain"))
    assert (ours["steps"], stock["steps"]) == (1.0, 3.0)
    assert ours["text"] == stock["text"] == plain["text"] > 0 and ours["queries"] == stock["queries"] > 0
    assert all(parts[name] > 0 for parts in (ours, stock, plain) for name in ("after", "writing"))
    assert row["above_sampling_s"]["ours"] == pytest.approx(sum(ours.values()) - sum(plain.values()))


def test_the_exponent_of_a_long_preset(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["step", "--preset", "smoke-long", "--pairs", "1", "--variants", "plain", "--device", "cpu", "--json"]
    monkeypatch.setattr("sys.argv", arguments)
    step.main()
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    exponent = row["exponent"]
    assert exponent["tokens"] == [5 * 2 * 3, 3 * 2 * 3]
    for side in ("ours", "plain"):
        times = [measured["sides"][side]["ms"] for measured in (row, row["shorter"])]
        assert times[1] * (5 / 3) ** exponent[side]["step"] == pytest.approx(times[0])
        parts = [measured["sides"][side]["parts_ms"] for measured in (row, row["shorter"])]
        decoded = [part["decode_forward"] + part["decode_backward"] for part in parts]
        assert decoded[1] * (5 / 3) ** exponent[side]["decode"] == pytest.approx(decoded[0])
