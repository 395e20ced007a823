"""`distill decoder` on the real tiny VAE: it learns, it is taken up again, a pipeline can use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.progress_output import check_events, curves
from vlmteacher.cli import main
from vlmteacher.decoders import load_decoder
from vlmteacher.reasoners.loading import load_reasoner

VALUES = {
    "num_frames": 5, "height": 32, "width": 48, "widths": [16, 12, 8, 8], "held_out": 1, "steps": 3, "batch_size": 1,
    "learning_rate": 3e-3, "save_every": 1, "log_every": 1,
}  # fmt: skip


@pytest.fixture
def config(teacher: Path, data: Path, tmp_path: Path) -> Any:
    def config(name: str = "run", **changed: Any) -> Path:
        cache = str(tmp_path / "cache")
        values = {"vae": str(teacher), "data": str(data), "out": str(tmp_path / name), "cache": cache, **VALUES}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values | changed))
        return path

    return config


def distil(path: Path, *flags: object) -> int:
    return main(["distill", "decoder", "--config", str(path), *map(str, flags)])


def rows(out: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(row) for row in (out / f"{name}.jsonl").read_text().splitlines()]


def test_it_learns_and_fits_the_reasoner(config: Any, teacher: Path, tmp_path: Path) -> None:
    assert distil(config(steps=40, validate_every=20, save_every=40, log_every=5, ema=0.9)) == 0
    log = rows(tmp_path / "run", "log")
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert [row["step"] for row in rows(tmp_path / "run", "validation")] == [20, 40]
    reasoner = load_reasoner(teacher)
    decoder = load_decoder(tmp_path / "run" / "decoder.safetensors", reasoner)  # its strides and channels are checked
    frames = decoder.decode(torch.randn(1, reasoner.latent_channels, 2, 2, 3), [4, 0])
    assert frames.shape == (2, 3, 2 * reasoner.spatial_stride, 3 * reasoner.spatial_stride)


def test_taken_up_again_it_ends_the_same(config: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert distil(config("whole", ema=0.5, crop=1, target="video"), "--json", "--tracker", "tensorboard") == 0
    check_events(capfd.readouterr().out, "distill", "train", 3, "loss", "memory")
    assert len(curves(tmp_path / "whole" / "logs")["loss"]) == 3
    assert distil(config("cut", ema=0.5, crop=1, target="video"), "--steps", 2) == 0
    assert distil(config("cut", ema=0.5, crop=1, target="video"), "--resume") == 0
    whole, cut = (load_file(tmp_path / name / "decoder.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"widths": [8, 8]}, "widths"),
        ({"target": "pixels"}, "target must be vae or video"),
        ({"held_out": 3}, "3 of 3 instances cannot be held out"),
        ({"num_frames": 6}, "too short: 5 frames of 6"),
        ({"patch": 3}, "patch 3"),
        ({"vae": "none/there"}, "cannot be loaded"),
        ({"method": "dmd2"}, "method"),
    ],
)
def test_bad_input(config: Any, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], message: str) -> None:
    assert distil(config(**changed)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
