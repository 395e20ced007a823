"""Rewards beside the Teacher and instead of it, the two that are ready, and those that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from tests.conftest import Run
from tests.test_pipeline import call
from tests.tiny_models import tiny_tokenizer
from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher import InputError, QuerySet, TeacherPipeline
from vlmteacher.optimization.reward import vqa_objective
from vlmteacher.rewards import ClipSimilarity, RewardContext, Rewards, parse_reward, temporal_smoothness

CONTEXT = RewardContext(PROMPT, None, [0, 1, 3, 4], 8.0, QuerySet.from_dict(QUERIES))


def brightness(frames: Tensor, context: RewardContext) -> Tensor:
    assert context.prompt == PROMPT and context.frame_indices == [0, 1, 3, 4] and context.fps > 0
    assert frames.shape == (4, 3, 32, 48) and frames.min() >= 0 and frames.max() <= 1
    return frames.mean()


def test_a_reward_beside_the_teacher(pipe: TeacherPipeline, tmp_path: Path) -> None:
    rewards = [(brightness, 0.5), (temporal_smoothness, 2)]
    out = call(pipe, rewards=rewards, run_dir=tmp_path / "run", output_type="pt")
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (
        record["config"]["rewards"] == record["rewards"]["weights"] == {"brightness": 0.5, "temporal_smoothness": 2.0}
    )
    for row in record["steps"]:
        teacher = vqa_objective(-torch.tensor(row["p_yes"]).log()).item()
        own = row["rewards"]
        total = teacher + 0.5 * own["brightness"] + 2 * own["temporal_smoothness"]
        assert row["loss"] == pytest.approx(total, rel=1e-4)
    shown = out.frames[[0, 1, 3, 4]]
    assert record["rewards"]["after"]["brightness"] == pytest.approx(shown.mean().item(), rel=1e-5)
    expected = out.loss_after + sum(2 * v if n != "brightness" else v / 2 for n, v in out.rewards["after"].items())
    assert record["rewards"]["objective_after"] == pytest.approx(expected, rel=1e-5)
    assert out.lora != call(pipe).lora
    with pytest.raises(InputError, match="another rewards"):
        call(pipe, rewards=[(brightness, 1)], run_dir=tmp_path / "run", resume=True)


def test_a_reward_instead_of_the_teacher(pipe: TeacherPipeline) -> None:
    values: dict[str, Any] = {"max_steps": 6, "learning_rate": 0.02, "threshold": 1e-6}
    out = call(pipe, rewards=[(brightness, 1.0)], teacher_weight=0, **values)
    losses = [row["loss"] for row in out.history]
    assert losses == [row["rewards"]["brightness"] for row in out.history] and losses[-1] < losses[0]
    assert all(0 < p < 1 for row in out.history for p in row["p_yes"])


def vector(frames: Tensor, context: RewardContext) -> Tensor:
    return frames.mean((1, 2, 3))


def constant(frames: Tensor, context: RewardContext) -> Tensor:
    return torch.tensor(0.5)


def through_numpy(frames: Tensor, context: RewardContext) -> Any:
    return float(np.mean(frames.detach().numpy()))


def undefined(frames: Tensor, context: RewardContext) -> Tensor:
    return (frames.mean() * 0).log() * 0


def rooted(frames: Tensor, context: RewardContext) -> Tensor:
    return (frames - frames.detach()).square().sum().sqrt()  # 0, with a gradient that is NaN


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([(vector, 1)], r"reward vector returned a tensor \(4,\): it must return one number"),
        ([(constant, 1)], "reward constant has no gradient"),
        ([(through_numpy, 1)], "reward through_numpy returned 0"),
        ([(undefined, 1)], "reward undefined or its gradient is not finite"),
        ([(rooted, 1)], "reward rooted or its gradient is not finite"),
        ([brightness], "rewards must be a list of .function, weight."),
        (brightness, "rewards must be a list of .function, weight."),
        ([(brightness, float("nan"))], "weight of a reward must be finite"),
        ([(brightness, "1")], "weight of a reward must be a number"),
    ],
)
def test_rewards_that_are_refused(pipe: TeacherPipeline, tmp_path: Path, rewards: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(pipe, rewards=rewards, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_reward_and_no_teacher(pipe: TeacherPipeline) -> None:
    with pytest.raises(InputError, match="teacher_weight 0 leaves nothing"):
        call(pipe, teacher_weight=0.0)


def test_smoothness() -> None:
    even = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    assert temporal_smoothness(even, CONTEXT) < 1e-12 and temporal_smoothness(even[:2], CONTEXT) == 0
    assert temporal_smoothness((even > 0.4).float(), CONTEXT) > 0.1


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of the real classes, in its hub layout."""
    path = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config=size | text, vision_config=size | {"image_size": 16, "patch_size": 8}, projection_dim=8
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(path)
    return path


def test_clip_similarity(clip: Path) -> None:
    reward = ClipSimilarity.from_pretrained(clip)
    frames = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = reward(frames, CONTEXT)
    pictures = [
        Image.fromarray(f) for f in (frames.detach().permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    ]
    inputs = CLIPImageProcessor.from_pretrained(clip)(images=pictures, return_tensors="pt")
    tokens = reward.tokenizer([PROMPT], padding="max_length", max_length=32, return_tensors="pt")
    output = CLIPModel.from_pretrained(clip, dtype=torch.float32)(
        pixel_values=inputs.pixel_values, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
    )
    similarity = output.logits_per_text / output.logits_per_text.new_tensor(reward.model.logit_scale.exp().item())
    assert loss.item() == pytest.approx(1 - similarity.mean().item(), abs=2e-3)
    Rewards.of([(reward, 1)], 1.0).within(CONTEXT).check(frames)
    assert not any(p.requires_grad for p in reward.model.parameters())


def test_the_command_line_s_rewards(run: Run, solve: Any, clip: Path, tmp_path: Path) -> None:
    flags = ["--reward", "temporal_smoothness=0.5", "--reward", f"clip_similarity@{clip}=0.1"]
    status, out, _ = run(*solve(out=tmp_path / "run", max_steps=1), *flags)
    assert status == 0 and "0.5 x temporal_smoothness" in out and "0.1 x clip_similarity" in out
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["rewards"]["weights"] == {"temporal_smoothness": 0.5, "clip_similarity": 0.1}
    for text in ("smoothness=1", "temporal_smoothness", "temporal_smoothness@x=1", "temporal_smoothness=much"):
        with pytest.raises(InputError, match="is not of the form"):
            parse_reward(text)
