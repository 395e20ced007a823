"""Runs that diverge go back to the best LoRA: the first time with half the learning rate, the second time for good."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Run
from tests.optimization.test_loop import without_seconds
from tests.test_pipeline import call
from tests.tiny_pair import PROMPT
from vlmteacher.errors import NonFiniteError
from vlmteacher.lora.adapter import lora_parameters, lora_state_dict
from vlmteacher.microworld.example import packaged_example
from vlmteacher.optimization.divergence import DIVERGED_RISE, DIVERGED_STEPS, FLAT_CONTRAST, diagnose
from vlmteacher.optimization.loop import Optimization
from vlmteacher.optimization.objective import Metrics
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.runs.report import STOPPED

ABSURD = 1e10  # a learning rate that saturates the tiny pair's frames, so that no gradient is left
OVERFLOW = 1e18  # a learning rate that makes its latents NaN


def lora(pipe: TeacherPipeline) -> dict[str, torch.Tensor]:
    return lora_state_dict(pipe.reasoner.transformer)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def poison(loop: Optimization) -> None:
    """Make one weight of the LoRA infinite, as an update that overflows does."""
    with torch.no_grad():
        lora_parameters(loop.reasoner.transformer)[-1].view(-1)[0] = math.inf


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("rate", [ABSURD, OVERFLOW])
def test_an_absurd_learning_rate_ends_as_diverged(
    make_loop: Any, pipe: TeacherPipeline, rate: float, keep: str
) -> None:
    loop = make_loop(learning_rate=rate, max_steps=20, keep=keep)
    start = lora(pipe)
    rows = list(loop)
    assert loop.stopped == "diverged" and len(rows) < 20
    first, second = (row for row in rows if "rolled_back" in row)
    assert first["learning_rate"] == rate / 2 and first["grad_norm"] > 0
    assert second is rows[-1] and second["grad_norm"] is None and "learning_rate" not in second
    assert all(math.isfinite(row["loss"]) for row in rows)
    best = min(row["loss"] for row in rows)
    assert second["loss"] == best  # of the LoRA that stays
    loop.finish()
    if best == rows[0]["loss"]:
        assert equal(lora(pipe), start)
    assert loss_now(loop) == best


def loss_now(loop: Optimization) -> float:
    return loop.engine.evaluate().loss


def test_after_an_overflow_the_run_continues_at_half_the_learning_rate(make_loop: Any, pipe: TeacherPipeline) -> None:
    loop = make_loop(max_steps=5)
    for _ in range(2):
        loop.step()
    best, expected = lora(pipe), loss_now(loop)
    loop.step()
    poison(loop)
    row = loop.step()
    assert row["rolled_back"] and row["loss"] == expected and row["learning_rate"] == 0.005
    later = lora(pipe)
    assert not equal(later, best) and all(value.isfinite().all() for value in later.values())
    biggest = max((later[name] - best[name]).abs().max().item() for name in best)
    assert biggest == pytest.approx(0.005, rel=0.01)  # the first step of a fresh AdamW is as long as its rate
    assert loop.step()["loss"] < expected and loop.stopped == "max_steps"


@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_a_run_with_a_roll_back_is_resumed_to_the_bit(make_loop: Any, pipe: TeacherPipeline, killed_after: int) -> None:
    settings = {"learning_rate": ABSURD, "max_steps": 6}
    whole = make_loop(**settings)
    list(whole)
    expected = lora(pipe)
    killed = make_loop(**settings)
    for _ in range(killed_after):
        killed.step()
    file = io.BytesIO()
    torch.save(killed.state_dict(), file)
    resumed = make_loop(**settings)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    list(resumed)
    assert without_seconds(resumed.history) == without_seconds(whole.history)
    assert resumed.stopped == whole.stopped and equal(lora(pipe), expected)


def test_an_interruption_while_rolling_back_changes_nothing(
    make_loop: Any, pipe: TeacherPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_loop(learning_rate=ABSURD)
    list(whole)
    expected = lora(pipe)
    loop = make_loop(learning_rate=ABSURD)
    loop.step()
    before = lora(pipe)
    interruptions, evaluate = iter([False, True]), loop.engine.evaluate

    def interrupted(step: int) -> Metrics:
        if next(interruptions):
            raise KeyboardInterrupt
        return evaluate(step)

    with monkeypatch.context() as patch:
        patch.setattr(loop.engine, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.step()
    assert equal(lora(pipe), before) and len(loop.history) == 1 and loop.optimizer.param_groups[0]["lr"] == ABSURD
    list(loop)
    assert without_seconds(loop.history) == without_seconds(whole.history) and equal(lora(pipe), expected)


def test_without_an_earlier_lora_the_error_is_raised(make_loop: Any, pipe: TeacherPipeline) -> None:
    loop = make_loop()
    poison(loop)
    with pytest.raises(NonFiniteError, match=r"step 0.*learning rate"):
        loop.step()
    assert loop.history == [] and loop.stopped is None


def test_a_prediction_without_gradient_ends_at_once(make_loop: Any, pipe: TeacherPipeline) -> None:
    """The surrogate decoder's frames all exceed 1; clamped, they have no gradient."""
    bias = pipe.decoder.decoder[-1].bias
    before = bias.detach().clone()
    try:
        bias.data.fill_(1e6)
        loop = make_loop()
        (row,) = loop
    finally:
        bias.data.copy_(before)
    assert loop.stopped == "diverged" and loop.updates == 0
    assert row["rolled_back"] == "the gradient of step 0 is exactly 0"


def test_a_loss_far_above_its_start_has_to_stay_there() -> None:
    far, near = 1.01 + DIVERGED_RISE, 0.99 + DIVERGED_RISE
    for losses, expected in (
        ([far] * (DIVERGED_STEPS - 1), False),
        ([far] * DIVERGED_STEPS, True),
        ([near] * 20, False),
        ([far] * (DIVERGED_STEPS - 1) + [near] + [far] * (DIVERGED_STEPS - 1), False),
        ([0.5] * 10 + [far] * DIVERGED_STEPS, True),
    ):
        metrics = Metrics(losses[-1], False, 0.0, 1.0, {}, 0.1, [], 1.0)
        assert (diagnose(metrics, [1.0, *losses[:-1]], threshold=1e-6, first_contrast=0.1) is not None) is expected


def test_frames_that_become_one_colour(make_loop: Any, pipe: TeacherPipeline) -> None:
    """A surrogate decoder without contrast stands for a video that has lost its picture."""
    flat = copy.deepcopy(pipe.decoder)
    flat.decoder[-1].weight.data.mul_(1e-4)
    flat._plans.clear()
    loop = make_loop()
    assert "rolled_back" not in loop.step()
    loop.objective.decoder = flat
    row = loop.step()
    assert row["rolled_back"] == "the frames have become one colour"
    assert loop.stopped == "diverged"  # going back has not helped, because the LoRA is not the cause
    loop = make_loop()  # whose first frames are flat too
    loop.objective.decoder = flat
    assert all("rolled_back" not in loop.step() for _ in range(2))


def test_nearly_blank_frames_may_stay_so(make_loop: Any) -> None:
    """A blank first frame has a contrast close to the limit, on either side of it by rounding."""
    loop = make_loop()
    for first, collapsed in ((FLAT_CONTRAST / 2, False), (1.5 * FLAT_CONTRAST, False), (40 * FLAT_CONTRAST, True)):
        loop.first_contrast = first
        assert (loop.flatness(0.9 * FLAT_CONTRAST) is not None) is collapsed


@pytest.mark.parametrize("keep", ["last", "best"])
def test_the_last_update_is_checked_by_its_video(pipe: TeacherPipeline, tmp_path: Path, keep: str) -> None:
    """No step evaluates the result of the last update, but the final video does; all results are written."""

    def break_it(pipe: TeacherPipeline, step: int, _: Any) -> None:
        if step == 1:
            assert pipe.loop is not None
            poison(pipe.loop)

    out = call(pipe, max_steps=2, keep=keep, run_dir=tmp_path, output_type="pt", callback_on_step_end=break_it)
    assert out.stopped == ("diverged" if keep == "last" else "max_steps")
    assert ("rolled_back" in out.history[-1]) == (keep == "last")
    assert out.lora == call(pipe, max_steps=1).lora == (tmp_path / "lora.safetensors").read_bytes()
    assert torch.isfinite(out.frames).all() and not torch.equal(out.frames, out.frames_before)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["stopped"] == out.stopped and record["steps"] == out.history
    assert (tmp_path / "after.mp4").stat().st_size > 0
    assert STOPPED[out.stopped] in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("rate", "diverged"), [(6e-4, False), (1e3, True)])
def test_the_packaged_pair(rate: float, diverged: bool) -> None:
    """After two updates only the final video shows the divergence; at the pair's own rate nothing is rolled back."""
    prompt, image, seed, _ = packaged_example()
    out = TeacherPipeline.from_pretrained()(
        prompt,
        image,
        generator=torch.Generator().manual_seed(seed),
        learning_rate=rate,
        max_steps=2,
        final_samples=1,
        progress=False,
    )
    assert (out.stopped == "diverged") is diverged and ("rolled_back" in out.history[-1]) is diverged
    assert (out.loss_after == out.loss_before) is diverged


def test_solve_writes_all_files_and_ends_with_status_1(
    run: Run,
    models: dict[str, str],
    queries_file: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    given = [f"--{name}={path}" for name, path in models.items()]
    command = ["solve", "--prompt", PROMPT, *given, "--queries", str(queries_file), "--teacher-frames=4", "--rank=2"]
    status, text, errors = run(*command, f"--lr={OVERFLOW}", "--max-steps=6", "--threshold=1e-6", f"--out={out}")
    assert status == 1 and "diverged" in text
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: the optimisation diverged (") and "--lr" in last and "Traceback" not in errors
    record = json.loads((out / "run.json").read_text())
    assert record["stopped"] == "diverged" and record["config"]["learning_rate"] == OVERFLOW
    assert {"lora.safetensors", "before.mp4", "after.mp4", "README.md", "report.html"} <= {
        f.name for f in out.iterdir()
    }
