"""Agreement of one step and few, and the measurements on the microworld, on tiny and on packaged models."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from tests.tiny_pair import PROMPT
from vlmteacher.cli import main
from vlmteacher.errors import InputError
from vlmteacher.evaluation.few_step import agreement, measure
from vlmteacher.microworld import world
from vlmteacher.pipeline import PACKAGED_PAIR
from vlmteacher.queries import QuerySet
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.reasoners.many_step import ode_step, sample_many
from vlmteacher.reasoners.sampling import relative_rms
from vlmteacher.teachers import load_teacher


def test_relative_rms_leaves_the_known_frame_out():
    few = torch.ones(1, 2, 3, 4, 4)
    one = few.clone()
    one[:, :, 0], one[:, :, 1:] = 100, 1.5
    assert relative_rms(one, few, few[:, :, :1]) == pytest.approx(0.5)
    assert relative_rms(one, few, None) > 50


def test_agreement_of_a_tiny_pair(models):
    reasoner, teacher = load_reasoner(models["reasoner"]), load_teacher(models["teacher"])
    condition = reasoner.encode(PROMPT, None, 5, 32, 48)
    noise = reasoner.noise(condition, torch.Generator().manual_seed(0))
    results = agreement(reasoner, condition, noise, teacher, QuerySet("Is the ball on the square?"), teacher_frames=2)
    assert set(results) == {"relative_rms", "loss_one_step", "loss_few_step"}
    assert 0 < results["relative_rms"] < 10 and results["loss_one_step"] > 0 and results["loss_few_step"] > 0


def test_many_steps_follow_the_guided_field(models):
    """One Euler step over the whole way is z1 - v, and guidance mixes the two fields linearly."""
    reasoner = load_reasoner(models["reasoner"])
    condition, empty = reasoner.encode(PROMPT, None, 5, 32, 48), reasoner.encode("box", None, 5, 32, 48).prompt_embeds
    noise = reasoner.noise(condition, torch.Generator().manual_seed(0))
    with torch.no_grad():
        v = reasoner.velocity(condition, noise.z1, 1.0)
    one = sample_many(reasoner, condition, None, noise, steps=1, guidance=1.0)
    torch.testing.assert_close(one, noise.z1 - v)
    without = sample_many(reasoner, condition, empty, noise, steps=1, guidance=0.0)
    double = sample_many(reasoner, condition, empty, noise, steps=1, guidance=2.0)
    torch.testing.assert_close(double - without, 2 * (one - without), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        s = torch.tensor([1.0])
        halves = ode_step(reasoner, condition, None, noise.z1, s, s * 0, guidance=1.0, substeps=2)
    torch.testing.assert_close(sample_many(reasoner, condition, None, noise, steps=2, guidance=1.0), halves)
    with pytest.raises(InputError, match="needs the embeddings of the empty prompt"):
        sample_many(reasoner, condition, None, noise, steps=1, guidance=3.0)
    with pytest.raises(InputError, match="between 1 and 1000, not 0"):
        sample_many(reasoner, condition, None, noise, steps=0, guidance=1.0)


def test_measure_on_the_microworld():
    reasoner = load_reasoner(PACKAGED_PAIR / "reasoner")
    results = measure(reasoner, load_teacher(PACKAGED_PAIR / "teacher"), 2, 1)
    assert results["n"] == len(results["instances"]) == 2
    for name in ("score", "score_one_step", "relative_rms", "loss_one_step", "loss_gap", "video_distance", "seconds"):
        assert results[name] >= 0, name
    many = measure(reasoner, None, 2, 1, many_steps=2)
    assert "loss_gap" not in many and many["relative_rms"] != results["relative_rms"]
    with pytest.raises(InputError, match="at least 2 instances, not 1"):
        measure(reasoner, None, 1, 1)


def test_a_report_holds_the_numbers_and_a_picture(tmp_path, capfd):
    flags = ["microworld", "measure", "--limit", "2", "--seed", "7", "--many-steps", "2", "--guidance-scale", "1.5"]
    assert main([*flags, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["n"] == 2 and results["many_steps"] == 2 and 0 < results["loss_gap"] < 20
    assert f"loss_gap         {results['loss_gap']:.3f}" in capfd.readouterr().out
    with Image.open(tmp_path / "frames.png") as sheet:
        assert sheet.size == (2 * 2 * 5 * world.SIZE, 2 * 2 * world.SIZE)
    assert main([*flags, "--out", str(tmp_path)]) == 2
    assert "already holds results" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [("--limit", "1", "at least 2 instances"), ("--many-steps", "-1", "--many-steps must not be negative")],
)
def test_bad_flags_of_a_report_exit_with_2(tmp_path, capfd, flag, value, message):
    assert main(["microworld", "measure", flag, value, "--out", str(tmp_path / "out")]) == 2
    assert message in capfd.readouterr().err and not (tmp_path / "out").exists()
