"""`train post` and `train grpo` on real tiny classes: they learn, resume to the bit, and write a LoRA that loads."""

from __future__ import annotations

import json
import os
import signal
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

from tests.baselines.conftest import SMALL
from tests.conftest import Run
from tests.progress_output import check_events, curves, tracked_settings
from tests.tiny_pair import QUERIES
from vlmteacher.baselines.post_training import PostTraining, PostTrainingSettings
from vlmteacher.baselines.shared_lora import SharedTraining
from vlmteacher.baselines.training_prompts import read_folder
from vlmteacher.lora.adapter import remove_lora
from vlmteacher.pipeline import TeacherPipeline

KINDS = ("post", "grpo")
EXTRA: dict[str, dict[str, Any]] = {"post": {}, "grpo": {"group_size": 2, "clip": 0.1}}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_it_writes_a_lora_its_cost_and_a_validation_curve(
    kind: str, config: Callable[..., Path], run: Run, models: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    path = config(validate_every=2, ema=0.5, gradient_checkpointing=True, num_frames=9, **EXTRA[kind])
    status, printed, err = run("train", kind, "--config", path)
    assert (status, printed) == (0, f"LoRA: {out / 'lora.safetensors'}\n"), err
    names = ["queries.jsonl", "log.jsonl", "samples", "validation.jsonl", "state", "cost.json", "lora.safetensors"]
    assert {entry.name for entry in out.iterdir()} == {*names}
    assert [row["step"] for row in rows(out / "log.jsonl")] == [1, 2, 3]
    (curve,) = rows(out / "validation.jsonl")
    assert curve["step"] == 2 and curve["loss_one_step"] > 0 and curve["loss_few_step"] > 0
    assert sorted(entry.name for entry in (out / "samples").iterdir()) == [
        *("step-000002-0.mp4", "step-000002.safetensors")
    ]
    cost = json.loads((out / "cost.json").read_text())
    calls = {"post": (0, 6, 6), "grpo": (12, 0, 12)}[kind]
    assert tuple(cost[name] for name in ("generator_calls", "predictions", "vlm_calls")) == calls
    assert cost["steps"] == 3 and cost["seconds"] > 0 and cost["queries_written"] == 0  # they were there
    pipe = TeacherPipeline.from_pretrained(**models)
    pipe.load_lora(out / "lora.safetensors")
    output = pipe(
        "move the red box",
        queries=QUERIES,
        max_steps=0,
        teacher_frames=4,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )
    assert output.config["rank"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_it_ends_the_same(
    kind: str, config: Callable[..., Path], run: Run, tmp_path: Path, monkeypatch: Any
) -> None:
    path = config("whole", ema=0.5, save_every=10, **EXTRA[kind])
    status, printed, _ = run("train", kind, "--config", path, "--json", "--tracker", "tensorboard")
    assert status == 0
    names = ("loss", "p_yes_goal") if kind == "post" else ("reward",)
    assert check_events(printed, "train", "train", 3, *names, "memory", "learning_rate")[-1]["what"] == kind
    assert [step for step, _ in curves(tmp_path / "whole" / "logs")[names[0]]] == [1, 2, 3]
    assert tracked_settings(tmp_path / "whole" / "logs")["rank"] == 2
    path = config("cut", ema=0.5, save_every=10, **EXTRA[kind])
    with monkeypatch.context() as patched:
        step = SharedTraining.step

        def interrupted(self: SharedTraining, index: int, generator: torch.Generator) -> dict[str, float]:
            if index == 1:
                signal.raise_signal(signal.SIGTERM)  # the step is made all the same
            return step(self, index, generator)

        patched.setattr(SharedTraining, "step", interrupted)
        status, _, err = run("train", kind, "--config", path)
    assert status == 143 and "--resume goes on" in err
    assert not (tmp_path / "cut" / "lora.safetensors").exists()
    assert run("train", kind, "--config", path)[0] == 2  # it holds a training
    assert run("train", kind, "--config", path, "--resume")[0] == 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert (whole / "lora.safetensors").read_bytes() == (cut / "lora.safetensors").read_bytes()
    costs = [json.loads((out / "cost.json").read_text()) | {"seconds": 0} for out in (whole, cut)]
    assert costs[0] == costs[1]


def test_an_update_is_the_mean_of_its_prompts_objectives(pipe: TeacherPipeline, prompts: Path, tmp_path: Path) -> None:
    """The gradient is that of the objectives, by central differences along it, and the sum of two halves."""
    settings = PostTrainingSettings.from_dict({"out": str(tmp_path), **SMALL})
    for prompt in read_folder(prompts):
        row = {"digest": prompt.digest, "queries": QUERIES}
        with (tmp_path / "queries.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    try:
        training = PostTraining(settings, pipe, read_folder(prompts), Accelerator(), tmp_path)
        gradients: list[torch.Tensor] = []
        training.update = lambda index: gradients.append(flat(training.parameters)) or 0.0  # type: ignore[method-assign, func-returns-value]
        values = training.learn(0, torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(0)
        objectives = []
        for _ in range(2):
            condition, queries = training.draw(generator)
            objectives.append(training.objective(condition, queries, training.reasoner.noise(condition, generator)))
        losses = [objective.evaluate()[0].item() for objective in objectives]
        assert values["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
        (gradient,) = gradients
        direction, ends = gradient / gradient.norm(), []
        for size in (0.05, -0.05):
            move(training.parameters, size * direction)
            ends.append(sum(objective.evaluate()[0].item() for objective in objectives) / 2)
            move(training.parameters, -size * direction)
        assert (ends[0] - ends[1]) / 0.1 == pytest.approx(gradient.norm().item(), rel=0.03)
    finally:
        remove_lora(pipe.reasoner.transformer)


def flat(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    return torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.view(-1) for p in parameters])


@torch.no_grad()
def move(parameters: list[torch.nn.Parameter], by: torch.Tensor) -> None:
    for parameter, part in zip(parameters, by.split([p.numel() for p in parameters]), strict=True):
        parameter += part.view_as(parameter)


@pytest.mark.slow(days=28)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_make_one_lora(kind: str, config: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    """Each process draws its own prompts, and both make the same update."""
    path = config(steps=2, validate_every=2, **EXTRA[kind])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "vlmteacher", "train", kind, "--config", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600)
    cost = json.loads((tmp_path / "run" / "cost.json").read_text())
    assert cost["vlm_calls"] == {"post": 8, "grpo": 16}[kind]
    assert run("train", kind, "--config", config("alone", steps=2, **EXTRA[kind]))[0] == 0
    both, alone = (load_file(tmp_path / name / "lora.safetensors") for name in ("run", "alone"))
    assert any(not torch.equal(both[name], alone[name]) for name in alone)


@pytest.mark.slow
def test_the_loss_falls_on_the_microworld(run: Run, tmp_path: Path) -> None:
    """The packaged pair on one scene of the train split, for which its Teacher writes the queries."""
    values = {"out": str(tmp_path / "run"), "count": 2, "held_out": 1, "batch_size": 1, "steps": 8, "log_every": 2}
    (tmp_path / "post.yaml").write_text(yaml.safe_dump(values | {"learning_rate": 1e-3, "rank": 8}))
    assert run("train", "post", "--config", tmp_path / "post.yaml")[0] == 0
    log = rows(tmp_path / "run" / "log.jsonl")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert json.loads((tmp_path / "run" / "cost.json").read_text())["queries_written"] == 1


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("post", {"full": True}, "full must be false: this training gives a LoRA"),
        ("post", {"gradient_accumulation": 2}, "gradient_accumulation must be 1"),
        ("post", {"count": 1}, "count must be at least 2, not 1"),
        ("post", {"held_out": 4}, "4 of 4 prompts cannot be held out"),
        ("post", {"group_size": 2}, "group_size"),
        ("post", {"data": "none"}, "data folder none does not exist"),
        ("post", {"tests": "x"}, "tests must be of the type"),
        ("post", {"tests": ["none"]}, "data folder none does not exist"),
        ("post", {"teacher_frames": 6}, "the Teacher cannot see 6 frames of a video of 5"),
        ("post", {"num_frames": 6}, "num_frames must be 4k + 1"),
        ("post", {"quantize": "16bit"}, "16bit"),
        ("post", {"fit": "stretch"}, "fit"),
        ("grpo", {"group_size": 1}, "group_size must be at least 2, not 1"),
        ("grpo", {"updates": 0}, "updates must be at least 1, not 0"),
        ("grpo", {"clip": 0.0}, "clip must be greater than 0, not 0.0"),
        ("grpo", {"advantage_eps": "small"}, "advantage_eps must be of the type float"),
        ("grpo", {"reasoner": "none"}, "none"),
    ],
)
def test_bad_settings_exit_with_2_and_one_line(
    kind: str, changed: dict[str, Any], message: str, config: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    status, _, err = run("train", kind, "--config", config(**changed))
    assert status == 2 and message in err.splitlines()[-1]
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["queries.jsonl"]


def test_first_frames_of_another_shape(config: Callable[..., Path], run: Run, prompts: Path, tmp_path: Path) -> None:
    path = config(height=48, steps=1)
    status, _, err = run("train", "post", "--config", path)
    assert status == 2 and "the first frame of " in err and str(prompts / "task") in err
    assert run("train", "post", "--config", config(height=48, steps=1, fit="pad"))[0] == 0


def test_a_training_on_a_test_is_refused(config: Callable[..., Path], run: Run, prompts: Path) -> None:
    status, _, err = run("train", "post", "--config", config(tests=[str(prompts)]))
    assert status == 2 and "4 of 4 training prompts are instances of a test" in err


def test_a_resumed_training_keeps_its_settings_and_prompts(
    config: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    assert run("train", "post", "--config", config(steps=1))[0] == 0
    for changed, name in (({"count": 3}, "prompts"), ({"rank": 3}, "rank"), ({"teacher_frames": 2}, "teacher_frames")):
        path = tmp_path / "other.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load((tmp_path / "run.yaml").read_text()) | changed))
        status, _, err = run("train", "post", "--config", path, "--resume")
        assert status == 2 and "was trained with other settings" in err and name in err


def test_a_break_down_keeps_the_state(config: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    path = config(learning_rate=1e30, max_grad_norm=1e30, steps=5)
    status, _, err = run("train", "post", "--config", path)
    assert status == 1 and "not finite" in err and "the state of step" in err
    assert not (tmp_path / "run" / "lora.safetensors").exists()


def test_a_teacher_that_writes_no_queries(config: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    path = config()
    (tmp_path / "run" / "queries.jsonl").unlink()
    status, _, err = run("train", "post", "--config", path)
    assert status == 2 and "the Teacher writes no queries for 20 prompts in a row" in err
