"""DMD2: the gradient where the answer is known, the networks' roles, and the trainer on real classes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.tiny_models import tiny_wan_pipeline
from vlmteacher.distillation.adapters import Networks, Role, SeparateNetworks, SharedBackbone
from vlmteacher.distillation.dmd2 import DMD2, DMD2Settings, draw_sigmas, matching_gradient
from vlmteacher.distillation.flow_matching import flow_matching_loss, noised
from vlmteacher.errors import InputError
from vlmteacher.reasoners.condition import Condition, collate
from vlmteacher.reasoners.loading import load_reasoner

MEAN, SPREAD = 1.5, 0.4  # of the real distribution, a Gaussian in every coordinate


def denoised(x: Tensor, sigma: Tensor, mean: Tensor | float, spread: Tensor | float) -> Tensor:
    """E[x0 | x_t] where x0 is Gaussian: the analytic score of both sides, as a clean prediction."""
    s = sigma.view(-1, 1)
    gain = (1 - s) * spread**2 / ((1 - s) ** 2 * spread**2 + s**2)
    return mean + gain * (x - (1 - s) * mean)


def exact_draws(count: int) -> tuple[Tensor, Tensor]:
    """z and noise (1, count) of mean 0, variance 1 and no correlation: expectations of quadratic forms are exact."""
    draws = torch.randn(2, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws -= draws.mean(1, keepdim=True)
    draws = torch.linalg.solve_triangular(torch.linalg.cholesky(draws @ draws.T / count), draws, upper=False)
    return draws[:1], draws[1:]


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9])
def test_gradient_of_two_gaussians_is_that_of_their_divergence(level):
    """For x0 = a z + b: dKL/da and dKL/db of the two noised Gaussians, up to the normaliser and the known weight."""
    z, noise = exact_draws(4000)
    a, b = torch.tensor(1.2, dtype=torch.float64, requires_grad=True), torch.tensor(-0.7, dtype=torch.float64)
    b.requires_grad_(True)
    sigma = torch.tensor([level], dtype=torch.float64)

    x0 = a * z + b
    with torch.no_grad():
        x = noised(x0, noise, sigma)
        fake, real = denoised(x, sigma, b, a), denoised(x, sigma, MEAN, SPREAD)
        gradient = matching_gradient(x0, fake, real)
        normaliser = (x0 - real).abs().mean()
    ours = torch.autograd.grad((x0 * gradient).mean(), (a, b))

    keep = 1 - level
    fake_variance, real_variance = (keep * a) ** 2 + level**2, (keep * SPREAD) ** 2 + level**2
    divergence = (real_variance / fake_variance).log() / 2 - 0.5
    divergence = divergence + (fake_variance + keep**2 * (b - MEAN) ** 2) / (2 * real_variance)
    known = torch.autograd.grad(divergence, (a, b))
    weight = keep * keep / level**2  # score difference = (1 - s) / s^2 (fake - real), and dx/dx0 = 1 - s
    for mine, truth in zip(ours, known, strict=True):
        torch.testing.assert_close(mine * normaliser * weight, truth, rtol=1e-9, atol=1e-12)


def test_descent_reaches_the_real_mean_and_spread():
    """The whole recipe but for the networks: five updates of a fake score for each of the student."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.tensor(x, requires_grad=True) for x in (1.2, -0.7))
    spread, mean = (torch.tensor(x, requires_grad=True) for x in (1.0, 0.0))  # what the fake score believes
    student, fake = torch.optim.Adam([a, b], lr=0.03), torch.optim.Adam([spread, mean], lr=0.03)

    def made() -> tuple[Tensor, Tensor, Tensor]:
        sigma = draw_sigmas(32, 0.02, 0.98, 1.0, generator)
        z, noise = torch.randn(2, 32, 64, generator=generator)
        return a * z + b, noise, sigma

    for step in range(300):
        for group in student.param_groups:
            group["lr"] = 0.03 * (1 - step / 300)
        for _ in range(5):
            x0, noise, sigma = (value.detach() for value in made())
            x = noised(x0, noise, sigma)
            velocity = (x - denoised(x, sigma, mean, spread)) / sigma.view(-1, 1)
            fake.zero_grad()
            flow_matching_loss(velocity, x0, noise, None).backward()
            fake.step()
        x0, noise, sigma = made()
        with torch.no_grad():
            x = noised(x0, noise, sigma)
            scores = denoised(x, sigma, mean, spread), denoised(x, sigma, MEAN, SPREAD)
            gradient = matching_gradient(x0, *scores)
        student.zero_grad()
        (x0 * gradient).mean().backward()
        student.step()
    assert float(b.detach()) == pytest.approx(MEAN, abs=0.03)
    assert abs(float(a.detach())) == pytest.approx(SPREAD, abs=0.03)


def test_drawn_sigmas_lie_in_the_shifted_range():
    plain, shifted = (draw_sigmas(500, 0.02, 0.98, s, torch.Generator().manual_seed(2)) for s in (1.0, 5.0))
    assert plain.min() >= 0.02 and plain.max() < 0.98 and abs(plain.mean() - 0.5) < 0.05
    torch.testing.assert_close(shifted, 5 * plain / (1 + 4 * plain))


# ---------------------------------------------------------------- on a Reasoner


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_wan_pipeline(tmp_path_factory.mktemp("wan"))


@pytest.fixture(params=["lora", "full"])
def dmd2(request, path) -> DMD2:
    reasoner = load_reasoner(path)
    roles = ("student", "fake")
    networks: Networks = (
        SharedBackbone(reasoner.transformer, roles, rank=2, seed=0)
        if request.param == "lora"
        else SeparateNetworks(reasoner.transformer, roles, offload=False)
    )
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():  # away from where all three are the same
        for role in roles:
            for parameter in networks.parameters(role):
                parameter += 0.02 * torch.randn(parameter.shape, generator=draw)
    empty = reasoner.encode("box", None, 5, 32, 48).prompt_embeds
    settings = DMD2Settings(guidance=2.0, gan_weight=0.1, critic_weight=1.0)
    return DMD2(reasoner, networks, empty, settings, seed=0)


def batch(dmd2: DMD2) -> tuple[Condition, Tensor]:
    image = Image.new("RGB", (48, 32), "red")
    prompts = ("move the red ball", "move the green box")
    real = torch.randn(2, 8, 2, 4, 6, generator=torch.Generator().manual_seed(4))
    return collate([dmd2.reasoner.encode(prompt, image, 5, 32, 48) for prompt in prompts]), real


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def gradients(dmd2: DMD2, role: Role, loss: Tensor) -> float:
    """The total of the gradient of `loss` on the parameters of `role`."""
    found = torch.autograd.grad(loss, dmd2.networks.parameters(role), allow_unused=True, retain_graph=True)
    return sum(float(g.abs().sum()) for g in found if g is not None)


def test_backward_simulation_ends_where_sampling_does(dmd2):
    condition, _ = batch(dmd2)
    reasoner = dmd2.reasoner
    found = {}
    for seed in range(12):
        draw = torch.Generator().manual_seed(seed)
        stop = int(torch.randint(4, (1,), generator=draw))
        noise = reasoner.noise(condition, draw)
        with dmd2.networks.active("student"), torch.no_grad():
            found[stop] = dmd2.generate(condition, torch.Generator().manual_seed(seed)), noise
    assert set(found) == {0, 1, 2, 3}
    with dmd2.networks.active("student") as network, torch.no_grad():
        first = reasoner.predict_clean_at(condition, found[0][1].z1, 1.0, transformer=network)
        torch.testing.assert_close(found[0][0], first)
        plain, reasoner.transformer = reasoner.transformer, network
        torch.testing.assert_close(found[3][0], reasoner.sample(condition, found[3][1]))
        reasoner.transformer = plain


def test_losses_reach_whom_they_are_for(dmd2):
    condition, real = batch(dmd2)
    with dmd2.networks.active("student"):
        loss, values = dmd2.student_loss(condition, seeded())
        assert gradients(dmd2, "student", loss) > 0 and gradients(dmd2, "fake", loss) == 0
        assert all(p.grad is None for p in dmd2.critic.parameters())
    assert set(values) == {"matching", "error", "persuasion"} and values["matching"] > 0
    with dmd2.networks.active("fake"):
        loss, values = dmd2.fake_loss(condition, real, seeded())
        assert gradients(dmd2, "fake", loss) > 0 and gradients(dmd2, "student", loss) == 0
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, list(dmd2.critic.parameters())))
    assert set(values) == {"fake", "critic"}


def test_known_first_frame_counts_in_no_loss(dmd2):
    condition, real = batch(dmd2)
    other = real.clone()
    other[:, :, 0] += 10
    with dmd2.networks.active("fake"), torch.no_grad():
        assert dmd2.fake_loss(condition, real, seeded())[0] == dmd2.fake_loss(condition, other, seeded())[0]
    with dmd2.networks.active("student"):
        noise, sigma = torch.randn(real.shape, generator=seeded()), torch.tensor([0.3, 0.8])
        gradient, _ = dmd2._persuasion(condition, real, noise, sigma)
    assert gradient[:, :, 0].abs().max() == 0 and gradient[:, :, 1:].abs().min() > 0


def test_student_loss_is_the_matching_gradient_at_its_samples(dmd2):
    """Written out again from the parts, without the critic."""
    condition, _ = batch(dmd2)
    dmd2.critic = None
    reasoner, networks, draw = dmd2.reasoner, dmd2.networks, seeded()
    with networks.active("student"):
        loss, _ = dmd2.student_loss(condition, seeded())
        found = torch.autograd.grad(loss, networks.parameters("student"), allow_unused=True)

        x0 = dmd2.generate(condition, draw)
        sigma = draw_sigmas(2, 0.02, 0.98, 1.0, draw)
        x = noised(x0.detach(), torch.randn(x0.shape, generator=draw), sigma)
        with torch.no_grad():
            with networks.active("fake") as network:
                fake = reasoner.predict_clean_at(condition, x, sigma, transformer=network)
            with networks.active("real") as network:
                empty = replace(condition, prompt_embeds=dmd2.empty.repeat(2, 1, 1))
                with_prompt, without = (
                    reasoner.predict_clean_at(c, x, sigma, transformer=network) for c in (condition, empty)
                )
        real = without + 2.0 * (with_prompt - without)
        gradient = matching_gradient(x0.detach()[:, :, 1:], fake[:, :, 1:], real[:, :, 1:])
        pseudo = 0.5 * (x0[:, :, 1:] - (x0[:, :, 1:] - gradient).detach()).square().mean()
        expected = torch.autograd.grad(pseudo, networks.parameters("student"), allow_unused=True)
    for mine, truth in zip(found, expected, strict=True):
        assert (mine is None) == (truth is None)
        if mine is not None:
            torch.testing.assert_close(mine, truth, rtol=1e-3, atol=1e-6)


def test_bad_settings_are_named(dmd2):
    for values, message in (
        ({"fake_updates": 0}, "fake_updates must be a whole number of at least 1, not 0"),
        ({"fake_learning_rate": 0.0}, "fake_learning_rate must be greater than 0"),
        ({"guidance": -1.0}, "guidance must be 0 or greater"),
        ({"low": 0.5, "high": 0.5}, "0 < low < high <= 1"),
    ):
        with pytest.raises(InputError, match=message):
            DMD2Settings(**values)
    with pytest.raises(InputError, match="gan_block must be below 2"):
        DMD2(dmd2.reasoner, dmd2.networks, dmd2.empty, DMD2Settings(gan_weight=0.1, gan_block=2), seed=0)
