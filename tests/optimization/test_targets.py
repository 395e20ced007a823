"""Targets of the objective: the one-step prediction, or the few-step video with a gradient through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.reasoners.tiny_checkpoints import wan22_t2v_a14b
from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher.errors import InputError
from vlmteacher.lora.adapter import add_lora, lora_parameters, lora_state_dict, remove_lora
from vlmteacher.optimization.loop import Optimization
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.queries import QuerySet
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.checkpointing import Keep, keep_activations
from vlmteacher.reasoners.condition import Condition, Noise, with_first_frame
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.settings import Settings


@pytest.fixture
def reasoner(pipe: TeacherPipeline) -> Any:
    """The tiny Reasoner with a LoRA whose weights are not zero."""
    add_lora(pipe.reasoner.transformer, 2, seed=0)
    generator = torch.Generator().manual_seed(5)
    for parameter in lora_parameters(pipe.reasoner.transformer):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    yield pipe.reasoner
    remove_lora(pipe.reasoner.transformer)


def instance(reasoner: Reasoner, image: bool = True) -> tuple[Condition, Noise]:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    condition = reasoner.encode(PROMPT, Image.fromarray(pixels) if image else None, 5, 32, 48)
    return condition, reasoner.noise(condition, torch.Generator().manual_seed(0))


def by_hand(reasoner: Reasoner, condition: Condition, noise: Noise, only_last: bool) -> Tensor:
    """The sampler written out, with plain autograd."""
    sigmas = reasoner.settings.sigmas
    x = noise.z1
    for k, sigma in enumerate(sigmas):
        x = x.detach() if only_last else x
        if reasoner.settings.sampler == "renoise":
            clean = reasoner.predict_clean_at(condition, x, sigma)
            if k + 1 < len(sigmas):
                x = (1 - sigmas[k + 1]) * clean + sigmas[k + 1] * noise.steps[k]
        else:
            following = sigmas[k + 1] if k + 1 < len(sigmas) else 0.0
            x = x + (following - sigma) * reasoner.guided_velocity(condition, x, sigma)
    return clean if reasoner.settings.sampler == "renoise" else with_first_frame(x, condition.first_frame)


@pytest.mark.parametrize("level", [Keep.ALL, Keep.INPUT])
@pytest.mark.parametrize("sampler", ["renoise", "euler"])
@pytest.mark.parametrize("image", [True, False])
def test_values_and_gradients_are_those_of_the_sampler(
    reasoner: Reasoner, sampler: str, image: bool, level: Keep
) -> None:
    reasoner = reasoner.with_sampling(sampler=sampler)
    condition, noise = instance(reasoner, image)
    parameters = list(lora_parameters(reasoner.transformer))
    weight = torch.randn(noise.z1.shape, generator=torch.Generator().manual_seed(1))
    sampled = reasoner.sample(condition, noise)
    gradients = {}
    keep_activations(reasoner.transformer, level)
    try:
        for target in ("last_step", "full"):
            expected = by_hand(reasoner, condition, noise, target == "last_step")
            latents = reasoner.predict_target(condition, noise, target)
            assert torch.equal(latents, sampled) and torch.equal(expected, sampled)
            ours, theirs = (torch.autograd.grad((x * weight).sum(), parameters) for x in (latents, expected))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            gradients[target] = torch.cat([gradient.flatten() for gradient in ours])
        first, clean = reasoner.predict_target(condition, noise, "first_step"), reasoner.predict_clean(condition, noise)
        assert torch.equal(first, clean)
        ours, theirs = (torch.autograd.grad((x * weight).sum(), parameters) for x in (first, clean))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        gradients["first_step"] = torch.cat([gradient.flatten() for gradient in ours])
    finally:
        keep_activations(reasoner.transformer, Keep.ALL)
    for one, two in (("last_step", "full"), ("first_step", "full"), ("first_step", "last_step")):
        assert not torch.allclose(gradients[one], gradients[two], rtol=1e-3)


def test_saved_bytes_and_recomputed_forwards(reasoner: Reasoner) -> None:
    condition, noise = instance(reasoner)
    forwards = []
    hook = reasoner.transformer.register_forward_pre_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    kept = {}
    try:
        for target in ("first_step", "last_step", "full"):
            forwards.clear()
            sizes: dict[int, int] = {}

            def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                latents = reasoner.predict_target(condition, noise, target)  # type: ignore[arg-type]
            kept[target] = sum(sizes.values())
            steps = [True] if target == "first_step" else [target == "full"] * 3 + [True]
            assert forwards == steps
            latents.sum().backward()
            assert len(forwards) == {"first_step": 1, "last_step": 4, "full": 7}[target]
    finally:
        hook.remove()
        reasoner.transformer.zero_grad()
    assert kept["last_step"] < 1.1 * kept["first_step"] and kept["full"] < 1.5 * kept["first_step"]


@pytest.mark.parametrize("settings", [{}, {"lora_blocks": "last:1"}, {"pull": 1.0}, {"frame_jitter": 2}])
@pytest.mark.parametrize("target", ["last_step", "full"])
def test_the_loop_lowers_the_loss_and_resumes(pipe: TeacherPipeline, target: str, settings: dict[str, Any]) -> None:
    condition, noise = instance(pipe.reasoner)

    def loop() -> Optimization:
        values: dict[str, Any] = {"max_steps": 4, "threshold": 1e-6, "teacher_frames": 4, "rank": 2}
        chosen = Settings(**values | {"learning_rate": 0.03, "target": target} | settings)
        add_lora(pipe.reasoner.transformer, 2, seed=0, blocks=chosen.lora_blocks)
        parts = (pipe.reasoner, pipe.decoder, pipe.teacher, condition, noise)
        return Optimization(*parts, QuerySet.from_dict(QUERIES), chosen)

    try:
        whole = loop()
        losses = [whole.step()["loss"] for _ in range(2)]
        state = whole.state_dict()
        losses += [row["loss"] for row in whole]
        if "frame_jitter" not in settings:  # which shifts the frames differently at every step
            assert losses[-1] < losses[0] - 1e-4
        expected = lora_state_dict(pipe.reasoner.transformer)
        again = loop()
        again.load_state_dict(state)
        assert [row["loss"] for row in again] == losses[2:]
        result = lora_state_dict(pipe.reasoner.transformer)
        assert all(torch.equal(result[name], value) for name, value in expected.items())
    finally:
        remove_lora(pipe.reasoner.transformer)


def test_a_call_stops_by_the_few_step_video(pipe: TeacherPipeline) -> None:
    values: dict[str, Any] = {"queries": QuerySet.from_dict(QUERIES), "teacher_frames": 4, "progress": False}
    out = pipe(PROMPT, generator=torch.Generator().manual_seed(0), max_steps=1, target="full", **values)
    assert out.config["target"] == "full" and out.updates == 1
    first = pipe(PROMPT, generator=torch.Generator().manual_seed(0), max_steps=1, **values)
    assert first.config["target"] == "first_step" and first.history[0]["loss"] != out.history[0]["loss"]


def test_an_expert_without_a_lora_is_refused(tmp_path: Path) -> None:
    reasoner = load_reasoner(str(wan22_t2v_a14b(tmp_path / "a14b")))
    reasoner.check_target("full")
    with pytest.raises(InputError, match="low-noise expert"):
        reasoner.check_target("last_step")
