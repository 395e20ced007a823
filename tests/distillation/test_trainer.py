"""The loop by itself, on a real optimizer: the log, the average, and a disk that is full."""

from __future__ import annotations

import json
import resource
import shutil
import signal

import pytest
import torch
from torch import nn

from vlmteacher.distillation.trainer import FORM, Trainer, TrainSettings, check_out, training_folder
from vlmteacher.errors import InputError, OutputError
from vlmteacher.interruption import endings_interrupt
from vlmteacher.state import write_state


@pytest.fixture
def trainer(tmp_path):
    from accelerate import Accelerator

    def trainer(**settings):
        values = {"ema": 0.0, "save_every": 1, "log_every": 1, "validate_every": 0, "warmup": 0, "seed": 3}
        values |= {"batch_size": 2, "gradient_accumulation": 1} | settings
        model = nn.Linear(256, 256)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        return Trainer(tmp_path / "run", {"student": model}, {"student": optimizer}, values, Accelerator())

    return trainer


def stepping(trainer):
    """Every step raises each weight by the learning rate of its optimizer, so that the sum tells what happened."""

    def step(index: int, generator: torch.Generator) -> dict[str, float]:
        with torch.no_grad():
            trainer.modules["student"].weight += trainer.optimizers["student"].param_groups[0]["lr"]
        return {"drawn": float(torch.rand(1, generator=generator))}

    return step


def rows(trainer, name="log.jsonl"):
    return [json.loads(line) for line in (trainer.out / name).read_text().splitlines()]


def test_draws_depend_on_seed_and_step_alone(trainer):
    whole = trainer()
    whole.run(stepping(whole), 4)
    drawn = [row["drawn"] for row in rows(whole)]
    assert len(set(drawn)) == 4
    (whole.out / "state" / "state.pt").unlink()
    (whole.out / "log.jsonl").unlink()
    first = trainer()
    first.run(stepping(first), 2)
    second = trainer()
    second.resume()
    second.run(stepping(second), 4)
    assert [row["drawn"] for row in rows(second)] == drawn
    assert torch.equal(second.modules["student"].weight, whole.modules["student"].weight)


def test_the_learning_rate_warms_up(trainer):
    warm = trainer(warmup=4)
    warm.run(stepping(warm), 6)
    assert [row["learning_rate"] for row in rows(warm)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_run_resumed_amid_the_warmup_goes_on_with_it(trainer):
    first = trainer(warmup=4)
    first.run(stepping(first), 2)
    second = trainer(warmup=4)
    second.resume()
    second.run(stepping(second), 6)
    assert [row["learning_rate"] for row in rows(second)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_average_is_validated_and_is_the_result(trainer):
    averaging, seen = trainer(ema=0.5, validate_every=1), []
    weight = averaging.modules["student"].weight

    def validate(step: int) -> dict[str, float]:
        seen.append(float(weight.detach()[0, 0]))
        return {"value": seen[-1]}

    averaging.run(stepping(averaging), 3, validate)
    expected, mean = [], 0.0
    for k in range(1, 4):
        decay = min(0.5, k / (k + 10))
        mean = decay * mean + (1 - decay) * k
        expected.append(mean)
    assert seen == pytest.approx(expected) and float(weight.detach()[0, 0]) == pytest.approx(mean)
    assert [row["value"] for row in rows(averaging, "validation.jsonl")] == seen


def test_a_full_disk_leaves_the_state_before(trainer):
    """A limit on the size of files makes the system refuse to write, as a full disk does."""
    first = trainer()
    first.run(stepping(first), 2)
    kept = first.state_file.read_bytes()
    second = trainer()
    second.resume()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # it would end the process; what is left is EFBIG
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OutputError, match=r"state\.pt cannot be written \(File too large\)"):
            second.run(stepping(second), 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert first.state_file.read_bytes() == kept and [p.name for p in first.state_file.parent.iterdir()] == ["state.pt"]
    third = trainer()
    third.resume()
    third.run(stepping(third), 4)
    assert float(third.modules["student"].weight.detach()[0, 0]) == 4
    assert [row["step"] for row in rows(third)] == [1, 2, 3, 4]


def test_a_folder_is_resumed_only_when_it_can_be(trainer, tmp_path):
    with pytest.raises(InputError, match="holds no training to resume"):
        check_out(tmp_path / "run", resume=True)
    once = trainer()
    once.run(stepping(once), 1)
    with pytest.raises(InputError, match="already holds a training"):
        check_out(tmp_path / "run", resume=False)
    with pytest.raises(InputError, match=r"seed \(3, now 4\)"):
        trainer(seed=4).resume()


@pytest.mark.parametrize("where", ["step", "validation"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_keeps_the_last_step(trainer, number, where):
    whole = trainer(ema=0.5, save_every=100)
    whole.run(stepping(whole), 6)
    shutil.rmtree(whole.out)
    first = trainer(ema=0.5, save_every=100, validate_every=1)
    made = stepping(first)

    def step(index: int, generator: torch.Generator) -> dict[str, float]:
        if index == 3 and where == "step":
            signal.raise_signal(number)  # the step is made all the same
        return made(index, generator)

    def validate(step: int) -> dict[str, float]:
        if step == 4 and where == "validation":
            signal.raise_signal(number)
        return {}

    with pytest.raises(KeyboardInterrupt), endings_interrupt():
        first.run(step, 6, validate)
    assert first.saved == first.step == 4
    second = trainer(ema=0.5, save_every=100, validate_every=1)
    second.resume()
    assert second.step == 4
    second.run(stepping(second), 6, lambda step: {})
    assert torch.equal(second.modules["student"].weight, whole.modules["student"].weight)
    steps = [row["step"] for row in rows(second, "validation.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]  # the interrupted validation is made again


def test_a_validation_that_was_written_but_not_noted_is_written_once(trainer, monkeypatch):
    """Interrupted, taken up and killed: the state of the interruption has a step whose validation is in the file."""
    first = trainer(save_every=100, validate_every=2)

    def interrupted(step: int) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(stepping(first), 4, interrupted)
    second = trainer(save_every=100, validate_every=2)
    second.resume()
    monkeypatch.setattr(second, "_make", interrupted)
    with pytest.raises(KeyboardInterrupt):  # no state is written: as killed
        second.run(stepping(second), 4, lambda step: {}, save_interrupted=False)
    assert [row["step"] for row in rows(second, "validation.jsonl")] == [2]
    third = trainer(save_every=100, validate_every=2)
    third.resume()
    third.run(stepping(third), 4, lambda step: {})
    assert [row["step"] for row in rows(third, "validation.jsonl")] == [2, 4]


@pytest.mark.parametrize("at", [2, 3])
def test_the_log_of_a_resumed_training_has_the_same_means(trainer, at):
    def means(trainer: Trainer) -> list[dict[str, float]]:
        return [{name: row[name] for name in ("step", "loss")} for row in rows(trainer)]

    def step(index: int, generator: torch.Generator) -> dict[str, float]:
        if index == at and not resumed:
            signal.raise_signal(signal.SIGINT)
        return {"loss": float(torch.rand((), generator=generator))}

    resumed = True
    whole = trainer(save_every=100, log_every=4)
    whole.run(step, 8)
    expected = means(whole)
    shutil.rmtree(whole.out)
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        trainer(save_every=100, log_every=4).run(step, 8)
    resumed = True
    second = trainer(save_every=100, log_every=4)
    second.resume()
    second.run(step, 8)
    assert means(second) == expected and [row["step"] for row in expected] == [4, 8]


def test_a_state_that_cannot_be_gone_on_from(trainer):
    once = trainer(ema=0.5)
    once.run(stepping(once), 2)
    good = once.state_file.read_bytes()
    content = torch.load(once.state_file, weights_only=True)
    del content["form"]
    weights = content["modules"]["student"]
    broken = {
        "a shape that broadcasts": {"modules": {"student": weights | {"bias": torch.zeros(1)}}},
        "another dtype": {"modules": {"student": weights | {"weight": weights["weight"].double()}}},
        "a mean of another shape": {"average": [torch.zeros(1), torch.zeros(1)]},
        "no modules": {"modules": {}},
        "settings that are none": {"settings": "{"},
        "a step of text": {"step": "two"},
    }
    cases = {"empty": b"", "cut off": good[:-100], "foreign": b"PK" + good, "a pickle": b"\x80\x04N."}
    for what, changes in broken.items():
        write_state(once.state_file, FORM, content | changes)
        cases[what] = once.state_file.read_bytes()
    torch.save(content, once.state_file)  # of the version before this check
    cases["of an earlier version"] = once.state_file.read_bytes()
    for what, data in cases.items():
        once.state_file.write_bytes(data)
        with pytest.raises(InputError, match="delete it to start again, or give another --out") as raised:
            trainer(ema=0.5).resume()
            pytest.fail(what)
        assert str(once.state_file) in str(raised.value) and "\n" not in str(raised.value)


def test_one_training_in_a_folder(trainer, tmp_path):
    from accelerate import Accelerator

    folder = tmp_path / "run", False, Accelerator()
    with training_folder(*folder), pytest.raises(InputError, match="another process"), training_folder(*folder):
        pass
    assert not (tmp_path / "run").exists()


def test_rows_that_a_crash_cut_off_are_left_out(trainer):
    once = trainer()
    once.run(stepping(once), 2)
    log = once.out / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 3, "drawn": 0.1}\n{"step": 2, "dr\xff')
    again = trainer()
    again.resume()
    again.run(stepping(again), 4)
    assert [row["step"] for row in rows(again)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("batch_size", 1.5), ("learning_rate", 0), ("ema", 1.0), ("weight_decay", -1), ("dtype", "int8")],
)
def test_settings_that_mean_nothing_are_named(name, value):
    with pytest.raises(InputError, match=f"{name} must .* not '?{value}"):
        TrainSettings(**{name: value})
