"""Flow-GRPO: the policy's arithmetic against torch's own and by hand, its gradient, and that the reward rises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from torch.distributions import Normal

from tests.baselines.conftest import SMALL
from tests.baselines.test_shared_lora import flat, move, rows
from tests.conftest import Run
from tests.tiny_pair import QUERIES
from vlmteacher.baselines import flow_grpo
from vlmteacher.baselines.flow_grpo import FlowGRPO, FlowGRPOSettings, advantages, clipped_loss, roll_out
from vlmteacher.baselines.training_prompts import read_folder
from vlmteacher.errors import InputError
from vlmteacher.lora.adapter import remove_lora
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.queries import QuerySet


@pytest.fixture
def training(pipe: TeacherPipeline, prompts: Path, tmp_path: Path) -> Iterator[FlowGRPO]:
    """A training on the tiny pair, whose LoRA is not zero."""
    values = {"out": str(tmp_path), **SMALL, "group_size": 3, "updates": 1, "clip": 10.0}
    training = FlowGRPO(FlowGRPOSettings.from_dict(values), pipe, read_folder(prompts), Accelerator(), tmp_path)
    generator = torch.Generator().manual_seed(1)
    for parameter in training.parameters:
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    yield training
    remove_lora(pipe.reasoner.transformer)


def group(training: FlowGRPO, size: int = 3) -> list[flow_grpo.Sampled]:
    prompt = training.prompts[0]
    condition = training.encode(prompt)
    noises = training.reasoner.noise(condition, torch.Generator().manual_seed(0), size).samples()
    rolled = [roll_out(training.reasoner, condition, noise) for noise in noises]
    rewards = torch.stack([training.reward(latents, QuerySet.from_dict(QUERIES)) for latents, _ in rolled])
    pairs = zip(rolled, rewards, advantages(rewards, 1e-4), strict=True)
    return [flow_grpo.Sampled(condition, steps, reward, advantage) for (_, steps), reward, advantage in pairs]


def test_a_roll_out_is_the_sampler(training: FlowGRPO) -> None:
    reasoner = training.reasoner
    condition = training.encode(training.prompts[0])
    assert condition.first_frame is not None
    one, two = reasoner.noise(condition, torch.Generator().manual_seed(0), 2).samples()
    assert one.z1 is two.z1 and not torch.equal(one.steps[0], two.steps[0])  # a group shares the first noise
    for noise in (one, two):
        latents, steps = roll_out(reasoner, condition, noise)
        torch.testing.assert_close(latents, reasoner.sample(condition, noise), rtol=1e-6, atol=1e-6)
        assert len(steps) == len(reasoner.settings.sigmas) - 1


def test_the_log_probability_is_a_gaussians(training: FlowGRPO) -> None:
    reasoner = training.reasoner
    (video,) = group(training, 2)[:1]
    for step, following in zip(video.steps, reasoner.settings.sigmas[1:], strict=True):
        with torch.no_grad():
            clean = reasoner.predict_clean_at(video.condition, step.before, step.level).double()
        policy = Normal((1 - following) * clean, following)
        wanted = policy.log_prob(step.after.double())[:, :, 1:].mean()  # the first latent frame is given
        assert step.log_prob.item() == pytest.approx(wanted.item(), abs=1e-6)
        assert step.following == following


def test_the_ratio_is_1_before_the_first_update_and_not_after(training: FlowGRPO) -> None:
    videos = group(training)
    first = training.improve(videos, "first")
    assert first == {"ratio_first": 0.0, "clipped_first": 0.0}
    training.update(0)
    assert training.improve(videos, "last")["ratio_last"] > 1e-6


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([-1.0, -2.0, -3.0, -6.0], dtype=torch.float64)  # mean -3, variance (4 + 1 + 0 + 9) / 4
    wanted = torch.tensor([2.0, 1.0, 0.0, -3.0], dtype=torch.float64) / (3.5**0.5 + 0.5)
    torch.testing.assert_close(advantages(rewards, 0.5), wanted)
    equal = torch.full((3,), -0.75, dtype=torch.float64)
    assert advantages(equal, 1e-4).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [  # with a clip of .2: only a ratio that has gone too far in the good direction is held
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.0),
        (1.5, 2.0, -2.4, 0.0),
        (0.5, 2.0, -1.0, -2.0),
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 2.0),
        (1.3, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_loss_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    r = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    value = clipped_loss(r, torch.tensor(advantage, dtype=torch.float64), 0.2)
    value.backward()
    assert value.item() == pytest.approx(loss) and r.grad is not None and r.grad.item() == pytest.approx(slope)


def test_the_gradient_is_that_of_central_differences(training: FlowGRPO) -> None:
    videos = group(training)

    def objective() -> float:
        """The mean of -r A by torch's Gaussian, far from the clip."""
        total, count = 0.0, 0
        for video in videos:
            for step in video.steps:
                with torch.no_grad():
                    clean = training.reasoner.predict_clean_at(video.condition, step.before, step.level).double()
                mean = (1 - step.following) * clean
                log_prob = Normal(mean, step.following).log_prob(step.after.double())[:, :, 1:].mean()
                total -= float((log_prob - step.log_prob).exp() * video.advantage)
                count += 1
        return total / count

    training.improve(videos, "first")
    gradient = flat(training.parameters)
    assert gradient.norm() > 0
    direction, ends = gradient / gradient.norm(), []
    for size in (0.02, -0.02):
        move(training.parameters, size * direction)
        ends.append(objective())
        move(training.parameters, -size * direction)
    assert (ends[0] - ends[1]) / 0.04 == pytest.approx(gradient.norm().item(), rel=0.02)


def test_a_sampler_without_draws_is_refused(pipe: TeacherPipeline, prompts: Path, tmp_path: Path) -> None:
    euler = TeacherPipeline(
        pipe.reasoner.with_sampling(sampler="euler"), pipe.teacher, pipe.decoder, {"teacher_frames": 2}
    )
    settings = FlowGRPOSettings.from_dict({"out": str(tmp_path), **SMALL})
    try:
        with pytest.raises(InputError, match="of sampler 'euler' with 4 steps"):
            FlowGRPO(settings, euler, read_folder(prompts), Accelerator(), tmp_path)
    finally:
        remove_lora(pipe.reasoner.transformer)


@pytest.mark.slow
def test_the_reward_rises_on_the_microworld(run: Run, tmp_path: Path) -> None:
    """The packaged pair on one scene of the train split."""
    values = {"out": str(tmp_path / "run"), "count": 2, "held_out": 1, "batch_size": 1, "steps": 8, "log_every": 2}
    values |= {"group_size": 4, "learning_rate": 2e-3, "clip": 1e-2, "rank": 8}
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(values))
    assert run("train", "grpo", "--config", tmp_path / "grpo.yaml")[0] == 0
    log = rows(tmp_path / "run" / "log.jsonl")
    assert log[-1]["reward"] > log[0]["reward"] + 3 * log[0]["reward_std"]
    assert all(row["ratio_first"] == 0 for row in log)
