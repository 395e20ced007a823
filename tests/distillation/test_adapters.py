"""Student, fake and real score: who computes when, and whose weights are trained and saved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tiny_models import tiny_wan_pipeline
from vlmteacher.distillation.adapters import Networks, SeparateNetworks, SharedBackbone
from vlmteacher.errors import InputError


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_wan_pipeline(tmp_path_factory.mktemp("wan"))


def transformer(path):
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(path, subfolder="transformer").eval()


def predict(network) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 8, 2, 4, 6, generator=draw), torch.randn(2, 12, 32, generator=draw)
    return network(latents, torch.tensor([1000.0, 500.0]), text, return_dict=False)[0]


@pytest.fixture(params=["lora", "full"])
def networks(request, path) -> Networks:
    if request.param == "lora":
        return SharedBackbone(transformer(path), ("student", "fake"), rank=2, seed=0)
    return SeparateNetworks(transformer(path), ("student", "fake"), offload=True)


def push(networks: Networks, role, amount: float) -> None:
    """One step of gradient descent on the output's square."""
    with networks.active(role) as network:
        loss = predict(network).square().mean()
        found = torch.autograd.grad(loss, networks.parameters(role), allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(networks.parameters(role), found, strict=True):
            if gradient is not None:
                parameter -= amount * gradient


def outputs(networks: Networks) -> dict[str, Tensor]:
    found = {}
    for role in ("student", "fake", "real"):
        with networks.active(role) as network, torch.no_grad():
            found[role] = predict(network)
    return found


def test_all_start_as_the_real_score_and_each_learns_alone(networks):
    before = outputs(networks)
    assert torch.equal(before["student"], before["real"]) and torch.equal(before["fake"], before["real"])
    push(networks, "student", 1.0)
    after = outputs(networks)
    assert not torch.equal(after["student"], before["student"])
    assert torch.equal(after["fake"], before["fake"]) and torch.equal(after["real"], before["real"])
    push(networks, "fake", 2.0)
    last = outputs(networks)
    assert torch.equal(last["student"], after["student"]) and torch.equal(last["real"], before["real"])
    assert not torch.equal(last["fake"], after["fake"])


def test_scores_asked_in_between_leave_the_students_gradient_alone(networks):
    """The scores are asked between the student's forward and backward pass."""

    def gradients(ask: bool, checkpointing: bool) -> list[Tensor]:
        with networks.active("student") as network:
            network.train()
            if checkpointing:
                network.enable_gradient_checkpointing()
            x0 = predict(network)
            if ask:
                for role in ("real", "fake"):
                    with networks.active(role) as other, torch.no_grad():
                        predict(other)
            x0.square().mean().backward()
            network.disable_gradient_checkpointing()
        found = [p.grad.clone() for p in networks.parameters("student") if p.grad is not None]
        for parameter in networks.parameters("student"):
            parameter.grad = None
        return found

    push(networks, "fake", 1.0)
    push(networks, "student", 1.0)
    plain = gradients(False, False)
    assert len(plain) > 20
    for checkpointing in (False, True):
        for mine, expected in zip(gradients(True, checkpointing), plain, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in networks.parameters("fake"))


def test_student_weights_load_into_a_plain_transformer(networks, path):
    push(networks, "student", 1.0)
    plain = transformer(path)
    plain.load_state_dict(networks.student_weights())
    with torch.no_grad():
        torch.testing.assert_close(predict(plain), outputs(networks)["student"], rtol=1e-4, atol=1e-5)


def test_roles_and_ranks_are_checked(networks, path):
    assert networks.parameters("student") and (
        {id(p) for p in networks.parameters("student")}.isdisjoint(id(p) for p in networks.parameters("fake"))
    )
    with pytest.raises(ValueError, match="critic"), networks.active("critic"):  # type: ignore[arg-type]
        pass
    with pytest.raises(InputError, match="rank must be at least 1, not 0"):
        SharedBackbone(transformer(path), ("student",), rank=0, seed=0)
