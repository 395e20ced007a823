"""DMD2 (arXiv 2405.14867): distribution matching distillation of a many-step Reasoner into a few-step one.

The student descends the gradient of KL(student's videos || real videos), which is the difference of two scores: that
of a frozen many-step model (the real score) and that of a model trained on the student's own videos (the fake score).
In terms of clean predictions: at a noised sample x_t of the student's x0, the score is ((1 - sigma) E[x0 | x_t]
- x_t) / sigma^2, so the difference of the scores is that of the two predictions up to a weight, which is
replaced by a normaliser per sample (arXiv 2311.18828, eq. 7 and 8).
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
    """Draw (count,) noise levels on the CPU: t uniform in [low, high), then sigma = shift t / (1 + (shift - 1) t)."""
    t = low + (high - low) * torch.rand(count, generator=generator)
    return shift * t / (1 + (shift - 1) * t)


def matching_gradient(x0: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """The gradient of the KL at the student's samples: (fake - real) / mean |x0 - real|, with a mean for each sample.

    x0: (B, ...) the student's samples; fake, real: E[x0 | x_t] by the two scores at the same noised x0. The normaliser
    makes the step about as large as the student's error at every noise level. Nothing here is differentiated.
    """
    scale = (x0 - real).abs().flatten(1).mean(1).clamp_min(1e-6)
    return (fake - real) / scale.view(-1, *[1] * (x0.ndim - 1))


class Critic(nn.Module):
    """The GAN discriminator: a logit for every token's features inside the fake score, above 0 for real videos.

    width: number of features. seed: seed of its initial weights, independent of the global generator.
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
    """The critic's loss: the mean of softplus(logit of generated videos) and softplus(-logit of real videos)."""
    return (F.softplus(made).mean() + F.softplus(-real).mean()) / 2


def persuasion_loss(made: Tensor) -> Tensor:
    """The student's non-saturating GAN loss."""
    return F.softplus(-made).mean()


# ---------------------------------------------------------------- on a Reasoner


@dataclass(frozen=True)
class DMD2Settings:
    """Settings of DMD2. Raises InputError.

    Attributes:
        fake_updates: updates of the fake score for each update of the student (two-time-scale rule), at least 1.
        fake_learning_rate: learning rate of the fake score and the critic, greater than 0.
        guidance: classifier-free guidance scale of the real score; the student learns the guided result. 1 is none.
        low, high, score_shift: range of the noise levels at which the scores are compared (see `draw_sigmas`),
            0 < low < high <= 1.
        gan_weight: weight of the GAN loss in the student's loss; 0 leaves out the critic, and real videos with it.
        critic_weight: weight of the critic's loss in the loss of the fake score, whose weights it shares.
        gan_block: index of the transformer block whose output the critic reads; negative ones count from the end.
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
    """The losses of the fake score and of the student; the caller decides which of them to update.

    Args:
        reasoner: its `settings` define the student's timesteps and shift.
        networks: networks with the roles student, fake and real.
        empty: (1, L, D) embeddings of the empty prompt.
        settings: settings of the method.
        seed: seed of the critic's initial weights.
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
                    f"gan_block must be below {len(blocks)}, the transformer's blocks, not {settings.gan_block}"
                )
            width = config.num_attention_heads * config.attention_head_dim
            self.critic = Critic(width, seed).to(reasoner.device)

    def generate(self, condition: Condition, generator: torch.Generator) -> Tensor:
        """The student's x0 (B, C, T, h, w) at a random step of its sampler (backward simulation).

        The steps before it run without gradient. Must be called inside ``networks.active("student")``.
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
        """The loss of the fake score and the critic, and its terms.

        real: (B, C, T, h, w) latents of real videos for the same conditions; only the critic uses them. Must be called
        inside ``networks.active("fake")``.
        """
        with torch.no_grad(), self.networks.active("student"):
            x0 = self.generate(condition, generator)
        sigma, noise = self._draw(x0, generator)
        velocity, features = self._fake(condition, noised(x0, noise, sigma), sigma)
        loss = flow_matching_loss(velocity, x0, noise, condition.first_frame)
        values = {"fake": float(loss.detach())}
        if self.critic is not None:
            _, noise = self._draw(x0, generator)
            _, other = self._fake(condition, noised(real, noise, sigma), sigma)
            critic = critic_loss(self._logits(features, condition), self._logits(other, condition))
            loss = loss + self.settings.critic_weight * critic
            values["critic"] = float(critic.detach())
        return loss, values

    def student_loss(self, condition: Condition, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """A loss with the gradient of the method, and metrics. Must be called inside ``networks.active("student")``.

        The value of the loss has no meaning. The metric `matching` is the RMS of the gradient at x0 without the GAN's;
        `error` is the RMS difference of the student's x0 from the real score's.
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
        """The gradient of the GAN loss at the generated latents `made`, and that loss."""
        made = made.detach().requires_grad_(True)
        with torch.enable_grad(), self.networks.active("fake"):
            _, features = self._fake(condition, noised(made, noise, sigma), sigma)
            loss = persuasion_loss(self._logits(features, condition))
            gradient = torch.autograd.grad(loss, made)[0]
        return gradient, float(loss.detach())

    def _draw(self, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw noise levels (B,) and noise of the shape of `x0`."""
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
        """The fake score's velocity, and the features (B, L, width) that the critic reads; (0,) without a critic."""
        with self.networks.active("fake") as network:
            if self.critic is None:
                return self.reasoner.velocity(condition, latents, sigma, transformer=network), latents.new_empty(0)
            with _outputs(network.blocks[self.settings.gan_block]) as features:
                velocity = self.reasoner.velocity(condition, latents, sigma, transformer=network)
        return velocity, features[0]

    def _logits(self, features: Tensor, condition: Condition) -> Tensor:
        """The critic's logits of the tokens of all frames, without the first one where that is given."""
        assert self.critic is not None
        if condition.first_frame is not None:
            frames = (condition.num_frames - 1) // self.reasoner.temporal_stride + 1
            features = features[:, features.shape[1] // frames :]
        return self.critic(features)


@contextmanager
def _outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of a module inside the block."""
    outputs: list[Tensor] = []
    hook = module.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


def _rms(values: Tensor) -> float:
    return float(values.float().square().mean().sqrt())
