"""The samplers on fields with a known solution, and against diffusers' schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from vlmteacher.errors import InputError
from vlmteacher.reasoners.condition import Noise
from vlmteacher.reasoners.sampling import SamplerSettings, euler, even_timesteps, sample, trajectory


def draws(count: int) -> Noise:
    generator = torch.Generator().manual_seed(0)
    z1, *steps = (torch.randn(1, 2, 3, 4, 4, generator=generator) for _ in range(count))
    return Noise(z1, tuple(steps))


@pytest.mark.parametrize("sigmas", [(1.0,), (1.0, 0.4), (1.0, 0.75, 0.5, 0.25), (1.0, 0.9, 0.05)])
def test_what_enters_each_prediction_is_clean_plus_its_own_noise(sigmas):
    noise, seen = draws(len(sigmas)), []

    def predict(latents: torch.Tensor, sigma: float) -> torch.Tensor:
        seen.append((latents, sigma))
        return latents * 0.5 + sigma

    result = sample(predict, sigmas, noise)
    assert [sigma for _, sigma in seen] == list(sigmas)
    latents = noise.z1
    for k, sigma in enumerate(sigmas):
        torch.testing.assert_close(seen[k][0], latents)
        torch.testing.assert_close(trajectory(lambda x, s: x * 0.5 + s, sigmas, noise, k), latents)
        clean = latents * 0.5 + sigma
        if k + 1 < len(sigmas):
            latents = (1 - sigmas[k + 1]) * clean + sigmas[k + 1] * noise.steps[k]
    torch.testing.assert_close(result, clean)


def test_a_perfect_prediction_stays():
    """A predictor that always returns one video gives that video at any timesteps."""
    video = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    for sigmas in ((1.0,), (1.0, 0.5), (1.0, 0.9, 0.8, 0.1)):
        assert torch.equal(sample(lambda x, s: video, sigmas, draws(len(sigmas))), video)


def test_the_spread_of_a_gaussian():
    """With the posterior mean of x0 ~ N(m, s^2) as predictor, mean and spread follow a recursion in closed form."""
    mean, spread, count = 0.7, 0.5, 200_000
    generator = torch.Generator().manual_seed(0)

    def weight(sigma: float) -> float:
        return (1 - sigma) * spread**2 / ((1 - sigma) ** 2 * spread**2 + sigma**2)

    def predict(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return mean + weight(sigma) * (x - (1 - sigma) * mean)

    for steps in (1, 4, 16):
        z1, *rest = (torch.randn(count, generator=generator) for _ in range(steps))
        sigmas = tuple(1 - k / steps for k in range(steps))
        found = sample(predict, sigmas, Noise(z1, tuple(rest)))
        variance = 0.0
        for sigma in sigmas:
            variance = weight(sigma) ** 2 * ((1 - sigma) ** 2 * variance + sigma**2)
        assert float(found.mean()) == pytest.approx(mean, abs=0.01)
        assert float(found.std()) == pytest.approx(variance**0.5, rel=0.01, abs=1e-6)


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_euler_is_diffusers_euler(steps, shift):
    """Levels, up to UniPC's 1e-6 below 1, and steps are diffusers'; a step also gets the level that it leads to."""
    settings = SamplerSettings(even_timesteps(steps), shift=shift, sampler="euler")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    unipc.set_timesteps(steps)
    levels = torch.tensor((*settings.sigmas, 0.0))
    torch.testing.assert_close(levels, scheduler.sigmas)
    if steps > 1:  # whose own levels for n steps are even up to its last trained level, 1 / 1000
        torch.testing.assert_close(levels, unipc.sigmas, atol=2e-3 * shift, rtol=0)

    told = []

    def velocity(latents, sigma, until):
        told.append((sigma, until))
        return torch.tanh(latents) + sigma

    z1 = draws(1).z1
    found, expected = euler(velocity, settings.sigmas, z1), z1
    for t in scheduler.timesteps:
        expected = scheduler.step(torch.tanh(expected) + t / 1000, t, expected, return_dict=False)[0]
    torch.testing.assert_close(found, expected)
    assert [until for _, until in told] == [*settings.sigmas[1:], 0.0]
    assert [sigma for sigma, _ in told] == list(settings.sigmas)


def test_no_steps():
    with pytest.raises(InputError, match="between 1 and 1000, not 0"):
        even_timesteps(0)
