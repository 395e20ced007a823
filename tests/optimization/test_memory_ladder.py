from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher.errors import OutOfMemory
from vlmteacher.lora.adapter import add_lora, lora_state_dict, remove_lora
from vlmteacher.optimization.loop import Optimization
from vlmteacher.optimization.memory_ladder import MemoryLadder
from vlmteacher.optimization.objective import Objective
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.placement import Allocator
from vlmteacher.planning.tracing import Trace
from vlmteacher.queries import QuerySet
from vlmteacher.reasoners.checkpointing import Keep, keep_activations, kept_levels
from vlmteacher.settings import Settings
from vlmteacher.teachers.shared_prefix import Keep as Kept
from vlmteacher.teachers.shared_prefix import kept_bytes

CPU = torch.device("cpu")
RUNGS = [f"activations={level}" for level in ("products", "long", "input")]
RUNGS += ["teacher_activation_bytes=0", "smaller chunks"]


class CappedAllocator(Trace):
    """Raises as a GPU's allocator does when more than `cap` bytes would be alive; records the peak."""

    def __init__(self, loop: Optimization, cap: float = float("inf")) -> None:
        super().__init__()
        self.cap, self.reserved, self.high = cap, 0, 0
        self.weights(loop.reasoner.transformer, loop.decoder, loop.teacher.model)

    def _count(self, tensor: Tensor) -> None:
        super()._count(tensor)
        if self.live > self.cap:
            raise torch.OutOfMemoryError(f"tried to hold {self.live} bytes of {self.cap:.0f}")
        self.high, self.reserved = max(self.high, self.live), max(self.reserved, self.live)

    # What torch.cuda tells: freed memory stays with the allocator, so that the device has no more of it.

    def mem_get_info(self, _: object) -> tuple[int, int]:
        return int(self.cap) - self.reserved, int(self.cap)

    def memory_reserved(self, _: object) -> int:
        return self.reserved

    def memory_allocated(self, _: object) -> int:
        return self.live

    def max_memory_allocated(self, _: object) -> int:
        return self.high

    def reset_peak_memory_stats(self, _: object) -> None:
        self.high = self.live


@pytest.fixture
def make(pipe: TeacherPipeline) -> Iterator[Any]:
    reasoner = pipe.reasoner
    condition = reasoner.encode(PROMPT, None, 17, 64, 96)
    noise = reasoner.noise(condition, torch.Generator().manual_seed(0))
    loops = []

    def make(**settings: Any) -> Optimization:
        add_lora(reasoner.transformer, 2, seed=0)
        values: dict[str, Any] = {"max_steps": 2, "threshold": 1e-6, "teacher_frames": 16, "rank": 2}
        chosen = Settings(**values | {"learning_rate": 1e-2} | settings)
        parts = (reasoner, pipe.decoder, pipe.teacher, condition, noise)
        loops.append(Optimization(*parts, QuerySet.from_dict(QUERIES), chosen))
        return loops[-1]

    yield make
    for loop in loops:
        loop.close()
    remove_lora(reasoner.transformer)


def peak(loop: Optimization, rungs: list[str]) -> int:
    loop.step()  # caches, the optimiser's state
    loop.ladder.take(rungs)
    with CappedAllocator(loop) as allocator:
        loop.step()
    loop.close()
    return allocator.peak[""]


@pytest.mark.slow
def test_a_full_memory_costs_rungs_and_no_loss(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    peaks = [peak(make(), RUNGS[:count]) for count in range(len(RUNGS) + 1)]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    free = make()
    expected = list(free)
    lora = lora_state_dict(free.reasoner.transformer)
    for count in range(1, len(RUNGS) + 1):
        loop = make()
        rows = [loop.step()]
        caplog.clear()
        with CappedAllocator(loop, peaks[count - 1] - 1):
            rows += list(loop)
        taken = RUNGS[:count]
        assert loop.ladder.taken == rows[1]["out_of_memory"] == taken
        assert "out_of_memory" not in rows[0]
        assert [record.getMessage().rpartition(" with ")[2] for record in caplog.records] == taken
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-6)
        result = lora_state_dict(loop.reasoner.transformer)
        for name, value in lora.items():
            torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-6)
            if count <= 3:  # recomputation repeats the same operations; chunks change the shapes of products
                assert torch.equal(result[name], value)
        loop.close()


Outcome = tuple[list[Kept], list[str], list[float]]


def steps_within(loop: Optimization, cap: float, budget: int | None = None) -> tuple[Outcome, int]:
    """What the Teacher keeps in four steps on a device of `cap` bytes, the rungs, the losses; and the peak."""
    teacher: Any = loop.teacher
    teacher.activation_bytes = budget
    loop.step()  # caches, the optimiser's state
    tokens = teacher.layout(teacher.clip(loop.frame_indices, loop.reasoner.fps, 32, 48), loop.queries).tokens
    levels = {size: level for level, size in kept_bytes(teacher.language.layers, tokens).items()}
    with CappedAllocator(loop, cap) as device:
        teacher.room = Allocator(CPU, device)
        loop.ladder = MemoryLadder(loop.objective)
        try:
            kept = [(loop.step(), levels[teacher.kept_bytes])[1] for _ in range(4)]
        finally:
            teacher.room = None
            loop.close()
            assert teacher.activation_bytes == budget
            teacher.activation_bytes = None
    return (kept, loop.ladder.taken, [row["loss"] for row in loop.history]), device.reserved


def test_the_teacher_keeps_what_a_step_leaves(make_loop: Any, pipe: TeacherPipeline) -> None:
    """From the second step on an allocator holds all that it ever gave out: free memory alone would say that none is
    left. The levels change no bit."""
    language: Any = pipe.teacher.language  # type: ignore[attr-defined]
    layers = language.layers
    language.layers = torch.nn.ModuleList([*layers] * 8)  # so that what they keep is most of a step

    def steps(cap: float, budget: int | None = None) -> tuple[Outcome, int]:
        return steps_within(make_loop(max_steps=6), cap, budget)

    try:
        (_, _, losses), most = steps(2**40, 2**40)
        _, least = steps(2**40, 0)
        assert steps(4 * most)[0] == ([Kept.ALL] * 4, [], losses)
        kept, rungs, same = steps(1.1 * most)[0]
        assert kept[0] > kept[-1] == Kept.ALL and kept == sorted(kept, reverse=True) and not rungs and same == losses
        assert steps(1.05 * least)[0] == ([Kept.INPUT] * 4, [], losses)
    finally:
        language.layers = layers


def test_climbing_ends_at_the_first_rung(make_loop: Any, pipe: TeacherPipeline) -> None:
    loop, teacher = make_loop(), pipe.teacher
    with CappedAllocator(loop, 2**40) as device:
        teacher.room = Allocator(CPU, device)
        loop.ladder = MemoryLadder(loop.objective)
        loop.step()
        assert teacher.activation_bytes is not None and teacher.activation_bytes > teacher.kept_bytes > 0
        assert loop.ladder.down() == "teacher_activation_bytes=start" and teacher.activation_bytes is None
        loop.step()
        assert teacher.activation_bytes is None and loop.ladder.down() == RUNGS[0]
        teacher.activation_bytes = 7  # a user's choice stays
        ladder = MemoryLadder(loop.objective)
        ladder.start(), ladder.climb()
        assert ladder.down() is not None and teacher.activation_bytes == 7
        ladder.restore()
    loop.close()
    teacher.room = teacher.activation_bytes = None


def test_without_a_rung_left_the_state_is_as_before(make: Any) -> None:
    loop = make()
    loop.step()
    before = loop.state_dict()
    with CappedAllocator(loop, 1e5), pytest.raises(OutOfMemory, match=r"step 1 does not fit.*smaller chunks.*fewer"):
        loop.step()
    after = loop.state_dict()
    assert len(after["history"]) == 1 and before["history"] == after["history"]
    assert all(torch.equal(before["lora"][name], value) for name, value in after["lora"].items())
    assert loop.step()["loss"] < before["history"][0]["loss"]  # with enough memory it continues


def test_another_error_is_raised_as_it_is(make: Any) -> None:
    loop = make()
    loop.objective.teacher = None
    with pytest.raises(AttributeError):
        loop.step()
    loop.objective.reasoner = type("Broken", (), {"predict_target": lambda *_: torch.ones(2) @ torch.ones(3)})()
    with pytest.raises(RuntimeError, match="size"):
        loop.step()
    assert not loop.ladder.taken


def test_the_update_survives_a_rung_taken_for_the_few_step_video(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    final, failures = Objective.final_loss, [torch.OutOfMemoryError("full")]

    def full(objective: Objective) -> float:
        if failures:
            raise failures.pop()
        return final(objective) + objective.settings.threshold  # never good enough

    monkeypatch.setattr(Objective, "final_loss", full)
    results = []
    for _ in range(2):
        loop = make(threshold=100.0, check_final=True, max_steps=1)
        (row,) = loop
        assert row["grad_norm"] > 0 and "final_loss" in row
        results.append((row.get("out_of_memory"), lora_state_dict(loop.reasoner.transformer)))
        loop.close()
    assert [taken for taken, _ in results] == [RUNGS[:1], None]
    assert all(torch.equal(results[0][1][name], value) for name, value in results[1][1].items())
    assert any(value.any() for name, value in results[0][1].items() if "lora_B" in name)


def test_a_resumed_run_has_the_same_rungs_and_a_closed_one_none(make: Any, pipe: TeacherPipeline) -> None:
    transformer = pipe.reasoner.transformer
    keep_activations(transformer, Keep.LONG)  # the user's choice
    try:
        whole = make()
        whole.ladder.take(RUNGS[:4])
        list(whole)
        assert whole.ladder.taken == RUNGS[2:4]  # the first two make no difference
        expected = lora_state_dict(transformer)
        whole.close()
        loop = make()
        loop.ladder.take(RUNGS[:4])
        loop.step()
        file = io.BytesIO()
        torch.save(loop.state_dict(), file)
        loop.close()
        assert kept_levels(transformer) == [Keep.LONG] * 2 and pipe.teacher.activation_bytes is None
        file.seek(0)
        resumed = make()
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert resumed.ladder.taken == RUNGS[2:4]
        assert kept_levels(transformer) == [Keep.INPUT] * 2 and pipe.teacher.activation_bytes == 0
        list(resumed)
        assert all(torch.equal(expected[name], value) for name, value in lora_state_dict(transformer).items())
        resumed.close()
    finally:
        keep_activations(transformer, Keep.ALL)


def test_a_run_folder_lists_the_rungs(pipe: TeacherPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, failures = Objective.evaluate, [torch.OutOfMemoryError("full"), MemoryError()]

    def full(objective: Objective, step: int) -> Any:
        if step == 1 and failures:
            raise failures.pop(0)
        return evaluate(objective, step)

    monkeypatch.setattr(Objective, "evaluate", full)
    how: dict[str, Any] = {"num_frames": 5, "height": 32, "width": 48, "teacher_frames": 4, "max_steps": 2}
    out = pipe(PROMPT, queries=QuerySet.from_dict(QUERIES), run_dir=tmp_path / "run", progress=False, **how)
    steps = json.loads((tmp_path / "run" / "run.json").read_text())["steps"]
    assert [step.get("out_of_memory") for step in steps] == [None, RUNGS[:2]]
    assert out.updates == 2 and kept_levels(pipe.reasoner.transformer) == [Keep.ALL] * 2


def test_the_error_of_the_cpus_own_allocator(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free = make()
    expected = [row["loss"] for row in free]
    evaluate, too_much = Objective.evaluate, [1 << 60, 1 << 61]  # bytes, more than any address space

    def full(objective: Objective, step: int) -> Any:
        if too_much:
            torch.empty(too_much.pop(), dtype=torch.uint8)
        return evaluate(objective, step)

    monkeypatch.setattr(Objective, "evaluate", full)
    loop = make()
    assert [row["loss"] for row in loop] == pytest.approx(expected, rel=1e-6)
    assert loop.ladder.taken == RUNGS[:2]
    too_much += [1 << 60] * (len(RUNGS) + 1)
    with pytest.raises(OutOfMemory, match="does not fit in memory"):
        make().step()
