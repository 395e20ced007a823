"""DMD2 (arXiv 2405.14867): distribution matching distillation of a many-step Reasoner into a few-step one.

The student is pushed down the gradient of KL(student's videos || real videos), which is the difference of two scores:
that of a frozen many-step model (the real score) and that of a model which follows the student's own videos (the fake
score). Written in clean predictions: at a noised sample x_t of the student's x0, the score is ((1 - sigma) E[x0 | x_t]
- x_t) / sigma^2, so the difference of the scores is that of the two predictions up to a weight, and the weight is
replaced by a normaliser of each sample (arXiv 2311.18828, eq. 7 and 8).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmteacher.distillation.adapters import Networks, Role
from vlmteacher.distillation.flow_matching import counted, flow_matching_loss, noised
from vlmteacher.distillation.kinds import check_kinds
from vlmteacher.errors import InputError
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.condition import Condition, with_first_frame
from vlmteacher.reasoners.many_step import guided_velocity
from vlmteacher.reasoners.sampling import trajectory

# ---------------------------------------------------------------- mathematics


def draw_sigmas(count: int, low: float, high: float, shift: float, generator: torch.Generator) -> Tensor:
    """(count,) noise levels on the CPU: t uniform in [low, high), then sigma = shift t / (1 + (shift - 1) t)."""
    t = low + (high - low) * torch.rand(count, generator=generator)
    return shift * t / (1 + (shift - 1) * t)


def matching_gradient(x0: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """The direction of rising KL at the student's samples: (fake - real) / mean |x0 - real|, the mean of each sample.

    x0: (B, ...) the student's samples; fake, real: E[x0 | x_t] by the two scores at the same noised x0. The normaliser
    makes the step's size about that of the student's error, whatever the noise level. All without gradient.
    """
    scale = (x0 - real).abs().flatten(1).mean(1).clamp_min(1e-6)
    return (fake - real) / scale.view(-1, *[1] * (x0.ndim - 1))


class Critic(nn.Module):
    """The GAN head: a verdict on every token's features inside the fake score, real above 0 and made below.

    width: of the features. seed: of its start, whatever was drawn before.
    """

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, L, width) -> (B, L)."""
        return self.layers(features.float())[..., 0]


def critic_loss(made: Tensor, real: Tensor) -> Tensor:
    """What the critic minimises: the mean of softplus(verdict on made) and softplus(-verdict on real)."""
    return (F.softplus(made).mean() + F.softplus(-real).mean()) / 2


def persuasion_loss(made: Tensor) -> Tensor:
    """What the student minimises against the critic (non-saturating)."""
    return F.softplus(-made).mean()


# ---------------------------------------------------------------- on a Reasoner


@dataclass(frozen=True)
class DMD2Settings:
    """What DMD2 may be told.

    Attributes:
        fake_updates: of the fake score for each update of the student (two-time-scale rule), at least 1.
        fake_learning_rate: of the fake score and the critic, greater than 0.
        guidance: classifier-free guidance of the real score, which the student learns to do without; 1 is none.
        low, high, score_shift: noise levels at which the scores are compared (see `draw_sigmas`), 0 < low < high <= 1.
        gan_weight: of the critic's verdict in the student's loss; 0 leaves the critic out, and with it real videos.
        critic_weight: of the critic's loss in that of the fake score, whose weights it shares.
        gan_block: index of the transformer block whose output the critic sees; negative ones count from the end.

    Raises InputError.
    """

    fake_updates: int = 5
    fake_learning_rate: float = 1e-4
    guidance: float = 3.0
    low: float = 0.02
    high: float = 0.98
    score_shift: float = 1.0
    gan_weight: float = 0.0
    critic_weight: float = 0.01
    gan_block: int = -2

    def __post_init__(self) -> None:
        check_kinds(self)
        if not (isinstance(self.fake_updates, int) and self.fake_updates >= 1):
            raise InputError(f"fake_updates must be a whole number of at least 1, not {self.fake_updates}")
        for name in ("fake_learning_rate", "score_shift"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} must be greater than 0, not {value}")
        for name in ("guidance", "gan_weight", "critic_weight"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise InputError(f"{name} must be 0 or greater, not {value}")
        if not 0 < self.low < self.high <= 1:
            raise InputError(f"low and high must satisfy 0 < low < high <= 1, not {self.low} and {self.high}")


class DMD2:
    """The losses of the fake score and of the student; who steps when is the caller's.

    Args:
        reasoner: its `settings` tell the student's timesteps and shift.
        networks: with the roles student, fake and real.
        empty: (1, L, D) embeddings of the empty prompt.
        settings: of the method.
        seed: of the critic's start.
    """

    def __init__(
        self, reasoner: Reasoner, networks: Networks, empty: Tensor, settings: DMD2Settings, seed: int
    ) -> None:
        self.reasoner, self.networks, self.empty, self.settings = reasoner, networks, empty, settings
        blocks, config = reasoner.transformer.blocks, reasoner.transformer.config
        self.critic: Critic | None = None
        if settings.gan_weight:
            if not -len(blocks) <= settings.gan_block < len(blocks):
                raise InputError(
                    f"gan_block must be below {len(blocks)}, the transformer's blocks: {settings.gan_block}"
                )
            width = config.num_attention_heads * config.attention_head_dim
            self.critic = Critic(width, seed).to(reasoner.device)

    def generate(self, condition: Condition, generator: torch.Generator) -> Tensor:
        """The student's x0 (B, C, T, h, w) at a step of its sampler drawn at random, as sampling would come to it.

        Backward simulation: the steps before run without gradient. Inside ``networks.active("student")``.
        """
        sigmas = self.reasoner.settings.sigmas
        stop = int(torch.randint(len(sigmas), (1,), generator=generator))
        noise = self.reasoner.noise(condition, generator)

        def predict(latents: Tensor, sigma: float | Tensor) -> Tensor:
            return self._clean("student", condition, latents, sigma)

        with torch.no_grad():
            latents = trajectory(predict, sigmas, noise, stop)
        return predict(latents, sigmas[stop])

    def fake_loss(
        self, condition: Condition, real: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """What the fake score and the critic minimise, and its terms. Inside ``networks.active("fake")``.

        real: (B, C, T, h, w) latents of real videos for the same conditions; only the critic looks at them.
        """
        with torch.no_grad(), self.networks.active("student"):
            x0 = self.generate(condition, generator)
        sigma, noise = self._draw(x0, generator)
        velocity, seen = self._fake(condition, noised(x0, noise, sigma), sigma)
        loss = flow_matching_loss(velocity, x0, noise, condition.first_frame)
        values = {"fake": float(loss.detach())}
        if self.critic is not None:
            _, noise = self._draw(x0, generator)
            _, other = self._fake(condition, noised(real, noise, sigma), sigma)
            verdicts = critic_loss(self._verdict(seen, condition), self._verdict(other, condition))
            loss = loss + self.settings.critic_weight * verdicts
            values["critic"] = float(verdicts.detach())
        return loss, values

    def student_loss(self, condition: Condition, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """A loss whose gradient is that of the method, and what to watch. Inside ``networks.active("student")``.

        The loss has no meaning of its own; `matching` is the RMS of the gradient at x0 (before the GAN's), `error` that
        of the student's x0 against the real score's.
        """
        x0 = self.generate(condition, generator)
        known = condition.first_frame
        sigma, noise = self._draw(x0, generator)
        made = x0.detach()
        with torch.no_grad():
            x = noised(made, noise, sigma)
            fake, real = (self._clean(role, condition, x, sigma) for role in ("fake", "real"))
            mine, fake, real = (counted(value, known) for value in (made, fake, real))
            gradient = matching_gradient(mine, fake, real)
        loss = (counted(x0, known) * gradient).mean()
        values = {"matching": _rms(gradient), "error": _rms(mine - real)}
        if self.critic is not None:
            x, persuasion = self._persuasion(condition, made, noise, sigma)
            loss = loss + self.settings.gan_weight * (x0 * x).sum()
            values["persuasion"] = persuasion
        return loss, values

    def _persuasion(self, condition: Condition, made: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, float]:
        """The gradient of the persuasion loss at `made`, and that loss."""
        made = made.detach().requires_grad_(True)
        with torch.enable_grad(), self.networks.active("fake"):
            _, seen = self._fake(condition, noised(made, noise, sigma), sigma)
            loss = persuasion_loss(self._verdict(seen, condition))
            gradient = torch.autograd.grad(loss, made)[0]
        return gradient, float(loss.detach())

    def _draw(self, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise levels (B,) and noise for `x0`."""
        settings = self.settings
        sigma = draw_sigmas(len(x0), settings.low, settings.high, settings.score_shift, generator)
        return sigma.to(x0.device), torch.randn(x0.shape, generator=generator).to(x0.device)

    def _clean(self, role: Role, condition: Condition, latents: Tensor, sigma: float | Tensor) -> Tensor:
        """E[x0 | latents] by the network of `role`; the real score is guided."""
        with self.networks.active(role) as network:
            if role == "real":
                velocity = guided_velocity(
                    self.reasoner, condition, self.empty, latents, sigma, self.settings.guidance, network
                )
                assert isinstance(sigma, Tensor)
                return with_first_frame(latents - sigma.view(-1, 1, 1, 1, 1) * velocity, condition.first_frame)
            return self.reasoner.predict_clean_at(condition, latents, sigma, transformer=network)

    def _fake(self, condition: Condition, latents: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The fake score's velocity and the features (B, L, width) that a critic sees on the way, else (0,)."""
        with self.networks.active("fake") as network:
            if self.critic is None:
                return self.reasoner.velocity(condition, latents, sigma, transformer=network), latents.new_empty(0)
            with _outputs(network.blocks[self.settings.gan_block]) as seen:
                velocity = self.reasoner.velocity(condition, latents, sigma, transformer=network)
        return velocity, seen[0]

    def _verdict(self, features: Tensor, condition: Condition) -> Tensor:
        """The critic's verdicts on the tokens of all frames but a known first one."""
        assert self.critic is not None
        if condition.first_frame is not None:
            frames = (condition.num_frames - 1) // self.reasoner.temporal_stride + 1
            features = features[:, features.shape[1] // frames :]
        return self.critic(features)


@contextmanager
def _outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Everything that `module` returns inside the block."""
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()


def _rms(values: Tensor) -> float:
    return float(values.float().square().mean().sqrt())
