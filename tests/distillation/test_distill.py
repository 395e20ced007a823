"""`distill reasoner` on real tiny classes: every method, killed and taken up again, and what users get wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from recipes.microworld.training import load_config
from tests.progress_output import check_events, curves
from vlmteacher.cli import main
from vlmteacher.distillation.distill import DistillSettings, load_settings, run
from vlmteacher.errors import InputError
from vlmteacher.reasoners.loading import load_reasoner

TRAIN = {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "rank": 2, "save_every": 1, "log_every": 1, "seed": 0}
DMD2 = {"fake_updates": 2, "guidance": 2.0, "gan_weight": 0.01}


@pytest.fixture
def config(teacher, data, tmp_path) -> Callable[..., Path]:
    """Write a YAML file; a keyword changes an entry, None leaves it out."""

    def config(name: str = "run", **changed: Any) -> Path:
        values = {"reasoner": str(teacher), "data": str(data), "out": str(tmp_path / name), **TRAIN, "dmd2": DMD2}
        values = {key: value for key, value in (values | changed).items() if value is not None}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return config


def distil(path: Path, *flags: object) -> int:
    return main(["distill", "reasoner", "--config", str(path), *map(str, flags)])


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("method", ["dmd2", "consistency", "few-timesteps"])
def test_each_method_writes_a_reasoner_of_few_steps(config, teacher, tmp_path, method, full, capfd):
    path = config(method=method, full=full, steps=2, timesteps=[1000, 500], shift=2.0, validate_every=2)
    assert distil(path, "--json", "--tracker", "tensorboard") == 0
    end = check_events(capfd.readouterr().out, "distill", "train", 3, "work")[-1]  # two steps and a validation
    assert end["path"] == str(tmp_path / "run" / "pipeline")
    assert len(curves(tmp_path / "run" / "logs")["student_grad_norm"]) == 2
    reasoner = load_reasoner(tmp_path / "run" / "pipeline")
    assert reasoner.settings.timesteps == (1000, 500) and reasoner.settings.shift == 2.0
    assert reasoner.settings.num_frames == 5
    before = load_file(teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    after = weights(tmp_path / "run")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    condition = reasoner.encode("move the ball", Image.new("RGB", (48, 32)), 5, 32, 48)
    assert reasoner.sample(condition, reasoner.noise(condition)).isfinite().all()
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    terms = {"dmd2": {"fake", "critic", "matching", "error"}, "consistency": {"consistency", "drift"}}
    assert terms.get(method, {"flow"}) <= rows[-1].keys()
    assert list((tmp_path / "run" / "samples").iterdir())


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one(config, tmp_path):
    assert distil(config("whole", steps=6)) == 0
    path = config("cut", steps=6)
    command = [sys.executable, "-m", "vlmteacher", "distill", "reasoner", "--config", str(path)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    log = tmp_path / "cut" / "log.jsonl"
    until = time.monotonic() + 180
    while not (log.exists() and len(log.read_text().splitlines()) >= 2):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "pipeline").exists()
    assert distil(path, "--resume") == 0
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_resume_with_other_settings_names_them(config, capfd):
    assert distil(config(steps=1)) == 0
    assert distil(config(steps=1, dmd2=DMD2 | {"guidance": 5.0}, learning_rate=0.5), "--resume") == 2
    err = capfd.readouterr().err
    assert "guidance" in err and "learning_rate" in err and "batch_size" not in err


def test_a_loss_that_is_not_finite_stops_before_the_update(config, tmp_path):
    settings = DistillSettings.from_dict(yaml.safe_load(config(learning_rate=1e30, max_grad_norm=1e30).read_text()))
    with pytest.raises(ArithmeticError, match="not finite"):
        run(settings)
    kept = torch.load(next((tmp_path / "run" / "state").rglob("*.pt")), weights_only=True)
    assert kept


RECIPE = "vlmteacher/distillation/configs/dmd2.yaml"


def test_the_configuration_for_the_microworld_can_be_read(pytestconfig):
    settings = load_settings(pytestconfig.rootpath / RECIPE, {"steps": 7, "method": "dmd2"})
    assert settings.train.steps == 7 and settings.train.full and settings.dmd2.fake_updates == 5


def test_the_stage_and_the_command_have_one_configuration(pytestconfig):
    """Whichever is used, the student is the same."""
    paths = {"reasoner": "a", "data": "b", "out": "c"}
    stage = {name: value for name, value in load_config("distil").items() if name != "videos"}
    command = load_settings(pytestconfig.rootpath / RECIPE, paths | {"cache": None})
    assert command.to_dict() == DistillSettings.from_dict(stage | paths).to_dict()


@pytest.mark.parametrize("text", ["- a list", "a: [", None])
def test_a_configuration_that_is_none_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "some.yaml").write_text(text)
    with pytest.raises(InputError, match=r"some\.yaml"):
        load_settings(tmp_path / "some.yaml", {})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"timesteps": [1000, 500, 750]}, "timesteps must fall from 1000"),
        ({"timesteps": [900, 500]}, "timesteps must fall from 1000"),
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"shift": 0}, "shift must be greater than 0"),
        ({"colour": "red"}, "colour"),
        ({"dmd2": {"warp": 9}}, "warp"),
        ({"dmd2": {"fake_updates": 0}}, "fake_updates must be a whole number of at least 1"),
        ({"reasoner": None}, "reasoner"),
        ({"reasoner": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"rank": 0}, "rank must be a whole number of at least 1"),
    ],
)
def test_bad_settings_exit_with_2_and_one_line(config, capfd, changed, message):
    assert distil(config(**changed)) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
