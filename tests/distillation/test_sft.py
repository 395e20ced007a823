"""`train sft` on real tiny classes: it learns, it is taken up again, it writes what one would look at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.progress_output import curves, json_lines
from vlmteacher.cli import main
from vlmteacher.distillation.sft import FineTuning, FineTuningSettings, load_settings
from vlmteacher.distillation.training import begin
from vlmteacher.reasoners.loading import load_reasoner

VALUES = {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "rank": 2, "save_every": 1, "log_every": 1, "held_out": 1}


@pytest.fixture
def config(teacher, data, tmp_path) -> Callable[..., Path]:
    def config(name: str = "run", **changed: Any) -> Path:
        values = {"reasoner": str(teacher), "data": str(data), "out": str(tmp_path / name), "sample_steps": 2, **VALUES}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values | changed))
        return path

    return config


def tune(path: Path, *flags: object) -> int:
    return main(["train", "sft", "--config", str(path), *map(str, flags)])


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("full", "dtype", "noise_levels"), [(True, "float32", "uniform"), (False, "bfloat16", "logit-normal")]
)
def test_it_writes_a_reasoner_samples_and_a_validation_curve(config, teacher, tmp_path, full, dtype, noise_levels):
    assert tune(config(full=full, dtype=dtype, noise_levels=noise_levels, shift=3.0, ema=0.9, validate_every=2)) == 0
    reasoner = load_reasoner(tmp_path / "run" / "pipeline")
    assert reasoner.settings.shift == 3.0
    before = load_file(teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    after = weights(tmp_path / "run")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name].float()) for name in before)
    assert [path.name for path in (tmp_path / "run" / "samples").iterdir()] == ["step-000002-0.mp4"]
    curve = [json.loads(row) for row in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve] == [2] and curve[0]["flow"] > 0


def test_the_loss_on_the_training_videos_falls(config, tmp_path):
    assert tune(config(full=True, steps=40, learning_rate=3e-3, log_every=10, caption_dropout=0.0)) == 0
    rows = [json.loads(row) for row in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["flow"] < 0.8 * rows[0]["flow"]


def test_taken_up_again_it_ends_the_same(config, tmp_path, capfd):
    cache = str(tmp_path / "cache")
    assert tune(config("whole", cache=cache, validate_every=2), "--json", "--tracker", "tensorboard") == 0
    lines = json_lines(capfd.readouterr().out)
    assert [line["event"] for line in lines if line.get("work") == "encode"] == ["begin", *["step"] * 3, "end"]
    assert lines[-1] == {
        **{"event": "result", "command": "train", "what": "sft", "out": str(tmp_path / "whole")},
        "path": str(tmp_path / "whole" / "pipeline"),
    }
    read = curves(tmp_path / "whole" / "logs")
    assert [step for step, _ in read["flow"]] == [1, 2, 3] and [step for step, _ in read["validation_flow"]] == [2]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert tune(config("cut", cache=cache, validate_every=2), "--steps", 2) == 0
    assert tune(config("cut", cache=cache, validate_every=2), "--resume", "--quiet") == 0
    assert len(times) == 3 and all(path.stat().st_mtime_ns == at for path, at in times.items())
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_accumulated_batches_are_one_batch(config, tmp_path):
    """Two halves of the same draws make the update of the whole; checkpointing changes nothing."""

    def gradient(**changed: Any) -> list[torch.Tensor]:
        settings = load_settings(config(full=True, caption_dropout=0.0, **changed), {"out": str(tmp_path / "none")})
        accelerator = Accelerator()
        reasoner, data, _ = begin(
            settings.reasoner, settings.data, None, tmp_path / "none", settings.train, accelerator
        )
        tuning = FineTuning(settings, reasoner, data, accelerator)
        generator = torch.Generator().manual_seed(0)
        batch, condition = data.batch([0, 1])
        loss, _ = tuning.loss(condition, batch, generator)
        with tuning.networks.active("student"):
            accelerator.backward(loss)
        return [p.grad for p in tuning.modules["student"].parameters() if p.grad is not None]

    plain, again = gradient(), gradient(gradient_checkpointing=True)
    assert len(plain) == len(again) > 10
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


def test_noise_levels_are_drawn_as_told(config, teacher, data, tmp_path):
    def levels(**changed: Any) -> torch.Tensor:
        settings = FineTuningSettings.from_dict(yaml.safe_load(config(**changed).read_text()))
        tuning = FineTuning.__new__(FineTuning)
        tuning.settings = settings
        return tuning.draw_sigmas(20_000, torch.Generator().manual_seed(0))

    uniform, normal = levels(noise_levels="uniform"), levels(noise_levels="logit-normal", logit_mean=0.5)
    assert uniform.mean() == pytest.approx(0.5, abs=0.01) and uniform.std() == pytest.approx(12**-0.5, abs=0.01)
    logits = torch.logit(normal.double())
    assert logits.mean() == pytest.approx(0.5, abs=0.03) and logits.std() == pytest.approx(1, abs=0.03)
    t = uniform.double()
    shifted = levels(noise_levels="uniform", shift=3.0).double()
    torch.testing.assert_close(shifted, 3 * t / (1 + 2 * t), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"noise_levels": "pink"}, "noise_levels must be uniform or logit-normal"),
        ({"caption_dropout": 1.0}, "caption_dropout must lie between 0 and 1"),
        ({"held_out": 3}, "3 of 3 instances cannot be held out"),
        ({"sample_steps": 0}, "sample_steps must be a whole number of at least 1"),
        ({"colour": "red"}, "colour"),
        ({"learning_rate": "fast"}, "learning_rate must be of the type float, not 'fast'"),
    ],
)
def test_bad_settings_exit_with_2_and_one_line(config, capfd, changed, message):
    assert tune(config(**changed)) == 2
    assert message in capfd.readouterr().err.splitlines()[-1]


def test_a_break_down_keeps_the_state(config, tmp_path, capfd):
    assert tune(config(full=True, learning_rate=1e30, max_grad_norm=1e30, steps=5)) == 1
    err = capfd.readouterr().err.splitlines()[-1]
    assert "not finite" in err and "stays" in err
    assert torch.load(tmp_path / "run" / "state" / "state.pt", weights_only=True)["step"] >= 1


def test_a_pipeline_of_another_family_is_refused(config, tmp_path, capfd):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert tune(config(), "--reasoner", tmp_path / "other") == 2
    assert "StableDiffusionPipeline" in capfd.readouterr().err


@pytest.mark.slow
def test_two_processes_make_one_result(config, teacher, tmp_path):
    """Each process draws its own batches, and both make the same update.

    `accelerate launch` starts one process on a CPU unless there is MPI; torch's launcher sets what it sets elsewhere.
    """
    path = config(full=True, steps=2, validate_every=2, gradient_accumulation=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "vlmteacher", "train", "sft", "--config", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600)
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert row["samples_per_second"] * row["seconds_per_step"] == pytest.approx(2 * 2 * 2)
    before = load_file(teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    both = weights(tmp_path / "run")
    assert tune(config("alone", full=True, steps=2, gradient_accumulation=2)) == 0
    alone = weights(tmp_path / "alone")
    assert any(not torch.equal(before[name], both[name]) for name in before)
    assert any(not torch.equal(alone[name], both[name]) for name in before)
