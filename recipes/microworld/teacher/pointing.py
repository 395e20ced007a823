"""The loss of stage ``teacher-point`` on the direction of the Teacher's gradient.

Answers alone do not teach the direction: of the many changes of a video after which a small Teacher answers Yes, few
make it right. Optimisations of training scenes therefore run beside the training. At each of their steps a loss aligns
the gradient of the Teacher's objective with respect to the LoRA with that of the squared distance from the right
video's latents: a loss on a derivative (Sobolev training, arXiv 1706.04859), on the states to which the Teacher's own
optimisations lead (DAgger, arXiv 1011.0686). A second loss keeps the objective high until the video is nearly right.

All optimisations make a step at the same time, as rows of one batch, each with a LoRA of its own; on a GPU a hundred of
them take as long as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from recipes.microworld.teacher.lesson import Lesson
from vlmteacher.lora.adapter import target_modules
from vlmteacher.microworld import splits, world
from vlmteacher.microworld.questions import right_queries
from vlmteacher.microworld.scene import Scene
from vlmteacher.optimization.objective import GRADIENT_CLIP
from vlmteacher.reasoners.condition import Condition
from vlmteacher.settings import Settings


def decode(decoder: Any, latents: Tensor) -> Tensor:
    """Decode latents (N, C, T, h, w) to videos (N, F, 3, H, W), on a CPU clip by clip, as its kernels do it fastest.

    Differentiable once.
    """
    if latents.device.type == "cpu":
        return torch.stack([decoder.decode(row[None], check=False) for row in latents])
    return decoder.decode_batch(latents)


class Loras:
    """LoRAs on a transformer's linear layers, one for each row of a batch, of one rank and scale 1.

    Their weights are the rows of a matrix (rows, `count`).
    """

    def __init__(self, transformer: nn.Module, rank: int) -> None:
        self.rank, self.weights = rank, ()
        ends = tuple(target_modules(transformer))
        layers = [m for name, m in transformer.named_modules() if name.startswith("blocks.") and name.endswith(ends)]
        self.sizes = [rank * side for layer in layers for side in (layer.in_features, layer.out_features)]
        self.count = sum(self.sizes)
        for place, layer in enumerate(layers):
            layer.register_forward_hook(partial(self._add, place))

    def _add(self, place: int, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        if not self.weights:
            return output
        down, up = self.weights[2 * place : 2 * place + 2]
        down, up = down.unflatten(1, (self.rank, -1)), up.unflatten(1, (-1, self.rank))
        return output + inputs[0] @ down.transpose(1, 2) @ up.transpose(1, 2)

    @contextmanager
    def on(self, weights: Tensor) -> Iterator[None]:
        """Apply the LoRA in row b of `weights` (rows, count) to row b of the transformer's batch inside the block."""
        self.weights = weights.split(self.sizes, 1)
        try:
            yield
        finally:
            self.weights = ()

    def fresh(self, rows: int, generator: torch.Generator) -> Tensor:
        """Draw initial weights (rows, count) on the CPU, with the distribution of `add_lora`."""
        parts = []
        for place, size in enumerate(self.sizes):
            most = 0.0 if place % 2 else (self.rank / size) ** 0.5  # kaiming_uniform with a = sqrt(5)
            parts.append(most * (2 * torch.rand(rows, size, generator=generator) - 1))
        return torch.cat(parts, 1)


class RowAdam:
    """Adam for the rows of a matrix, which start at different times; each gradient is clipped to `GRADIENT_CLIP`."""

    def __init__(self, weights: Tensor, learning_rate: float) -> None:
        self.weights, self.learning_rate = weights, learning_rate
        self.mean, self.square = torch.zeros_like(weights), torch.zeros_like(weights)
        self.steps = weights.new_zeros(len(weights), 1)

    def clear(self, rows: Tensor) -> None:
        """Reset the state of some rows."""
        for state in (self.mean, self.square, self.steps):
            state[rows] = 0

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """Update all rows in place by a gradient (rows, count)."""
        gradient = gradient * (GRADIENT_CLIP / (gradient.norm(dim=1, keepdim=True) + 1e-6)).clamp_max(1)
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        mean, square = self.mean / (1 - 0.9**self.steps), self.square / (1 - 0.999**self.steps)
        self.weights.sub_(self.learning_rate * mean / (square.sqrt() + 1e-8))


@dataclass(frozen=True)
class Scenes:
    """Encoded training scenes.

    Attributes:
        scenes: the N scenes.
        questions: the right queries of each, the goal first.
        prompts: embeddings (N, L, D).
        first, right: latents of the first frames, (N, C, 1, h, w), and of the right videos, (N, C, T, h, w).
        flawed: (N,) whether the Reasoner was trained to err there.
        outside: (N,) whether the scene is out of domain.
    """

    scenes: list[Scene]
    questions: list[list[str]]
    prompts: Tensor
    first: Tensor
    right: Tensor
    flawed: Tensor
    outside: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, reasoner: Any, scenes: list[Scene], prompts: list[str], flaws: str, batch: int = 64) -> Scenes:
        """Encode scenes on the Reasoner's device, `batch` videos at a time.

        flaws: the scheme of the Reasoner's training videos.
        """
        first, right = [], []
        for start in range(0, len(scenes), batch):
            clips = np.stack([world.render(scene) for scene in scenes[start : start + batch]])
            clips = (clips * 255).round()  # as in an image and a video file
            first.append(reasoner.encode_video(clips[:, :1]))
            right.append(reasoner.encode_video(clips))
        queries = [right_queries(scene) for scene in scenes]
        return cls(
            scenes,
            [[query_set.goal, *query_set.process] for query_set in queries],
            torch.cat([reasoner.encode_prompt(prompt) for prompt in prompts]),
            torch.cat(first),
            torch.cat(right),
            torch.tensor([world.flaw(scene, flaws) is not None for scene in scenes], device=reasoner.device),
            torch.tensor([world.split_of(scene) == "ood" for scene in scenes], device=reasoner.device),
        )

    @classmethod
    def draw(cls, reasoner: Any, config: dict[str, Any], rng: np.random.Generator) -> Scenes:
        """Draw and encode `scenes` training scenes.

        config: `often` has the weights of families, `outside` the share of scenes out of domain, `flaws` the scheme of
        the Reasoner's training videos; where a scene is not flawed, another is drawn with probability `flawed`.
        """
        weights = np.asarray([config["often"].get(family, 1.0) for family in world.FAMILIES])
        scenes = []
        for family in rng.choice(world.FAMILIES, config["scenes"], p=weights / weights.sum()):
            scene = splits.training_scene(rng, str(family), config["outside"])
            while not world.flaw(scene, config["flaws"]) and rng.random() < config["flawed"]:
                scene = splits.training_scene(rng, str(family), config["outside"])
            scenes.append(scene)
        prompts = [world.write_prompt(scene, rng) for scene in scenes]
        return cls.of(reasoner, scenes, prompts, config["flaws"])

    def condition(self, rows: Tensor | slice = slice(None)) -> Condition:
        """The Reasoner's condition for some scenes."""
        return Condition(self.prompts[rows], self.first[rows], world.NUM_FRAMES, world.SIZE, world.SIZE)


class Pointing:
    """The optimisations beside the training; `step` advances them and returns the loss on the Teacher's gradients.

    Args:
        lesson: the Teacher.
        reasoner, decoder: as in the method.
        scenes: the scenes to optimise.
        settings: settings of the optimisations.
        config: `runs` is the number of optimisations, `longest` their largest number of updates. A share `straight`
            follows the gradient of the distance instead of the Teacher's. `weight` is that of 1 - cosine in the loss,
            which falls linearly below a distance of `far`. `early` is the weight of the loss on an objective that is
            low too early; it ends where the square root of the distance is `content_from` of the initial one.
    """

    def __init__(
        self,
        lesson: Lesson,
        reasoner: Any,
        decoder: Any,
        scenes: Scenes,
        settings: Settings,
        config: dict[str, Any],
    ) -> None:
        self.lesson, self.reasoner, self.decoder, self.scenes = lesson, reasoner, decoder, scenes
        self.settings, self.config = settings, config
        self.loras = Loras(reasoner.transformer, settings.rank)
        self.clear()

    def clear(self) -> None:
        """Restart all optimisations."""
        rows, device = self.config["runs"], self.reasoner.device
        self.weights = torch.zeros(rows, self.loras.count, device=device, requires_grad=True)
        self.optimizer = RowAdam(self.weights.detach(), self.settings.learning_rate)
        self.noise = torch.zeros(rows, *self.scenes.right.shape[1:], device=device)
        self.which = torch.zeros(rows, dtype=torch.long, device=device)  # of `scenes`
        self.updates, self.length = np.zeros(rows, int), np.zeros(rows, int)
        self.straight = torch.zeros(rows, dtype=torch.bool, device=device)
        self.first_distance = torch.ones(rows, device=device)

    def begin(self, rng: np.random.Generator) -> None:
        """Replace the finished optimisations by new ones."""
        rows = np.nonzero(self.updates >= self.length)[0]
        if not len(rows):
            return
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        device, places = self.weights.device, torch.from_numpy(rows)
        with torch.no_grad():
            self.weights[places] = self.loras.fresh(len(rows), generator).to(device)
            self.noise[places] = torch.randn(len(rows), *self.noise.shape[1:], generator=generator).to(device)
        self.optimizer.clear(places)
        self.which[places] = torch.from_numpy(rng.integers(len(self.scenes.scenes), size=len(rows))).to(device)
        self.straight[places] = torch.from_numpy(rng.random(len(rows)) < self.config["straight"]).to(device)
        self.updates[rows], self.length[rows] = 0, rng.integers(1, self.config["longest"] + 1, len(rows))

    def predict(self) -> Tensor:
        """The one-step predictions (rows, C, T, h, w); twice differentiable with respect to the LoRAs."""
        condition = self.scenes.condition(self.which)
        with self.loras.on(self.weights), sdpa_kernel(SDPBackend.MATH):  # the only one that is twice differentiable
            return self.reasoner.predict_clean_at(condition, self.noise, 1.0)

    def pushed_forward(self, latents: Tensor, change: Tensor) -> Tensor:
        """The change of the Teacher's frames (rows, K, 3, H, W) with a change of the latents, to first order."""
        size = change.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1, 1)  # squares of the tiny underflow
        with torch.no_grad(), forward_ad.dual_level():
            frames = self.decoder.decode_batch(forward_ad.make_dual(latents.detach(), change / size))
            return forward_ad.unpack_dual(frames).tangent[:, self.lesson.indices] * size

    def least_objective(self, distance: Tensor) -> Tensor:
        """The least objective (rows,) that fits a distance (rows,) where the Reasoner was trained to err, else 0."""
        left = (distance / self.first_distance).sqrt() - self.config["content_from"]
        return 2.5 * left.clamp(0, 1) * self.scenes.flawed[self.which]

    def step(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float], Tensor]:
        """Make a step of every optimisation; returns the loss, metrics, and the videos (rows, T, 3, H, W) of `which`.

        The map from the gradient at the frames to that at the LoRA is linear, so the derivative of the cosine by the
        latter is pushed forward to the frames.
        """
        self.begin(rng)
        latents = self.predict()
        videos = decode(self.decoder, latents)
        shown = videos[:, self.lesson.indices]
        frames = shown.detach().requires_grad_()
        questions = [self.scenes.questions[k] for k in self.which.tolist()]
        losses = self.lesson.objective(frames, questions, self.settings.goal_weight)
        (asked,) = torch.autograd.grad(losses.sum(), frames, create_graph=True)

        distances = (latents - self.scenes.right[self.which]).square().flatten(1).mean(1)
        (straight,) = torch.autograd.grad(distances.sum(), self.weights, retain_graph=True)
        (asked_of_latents,) = torch.autograd.grad(shown, latents, asked.detach(), retain_graph=True)
        asked_of_latents.requires_grad_()
        (led,) = torch.autograd.grad(latents, self.weights, asked_of_latents, create_graph=True)
        cosine = F.cosine_similarity(led, straight, dim=1)
        (wanted,) = torch.autograd.grad((1 - cosine).sum(), asked_of_latents)
        turned = (asked * self.pushed_forward(latents, wanted)).flatten(1).sum(1)
        cosine, distance = cosine.detach(), distances.detach()
        turned = turned - turned.detach() + 1 - cosine

        # The direction matters less near the right video.
        weights = (distance / self.config["far"]).clamp_max(1) * self.config["weight"] / len(distance)
        fresh = torch.from_numpy(self.updates == 0).to(distance.device)
        self.first_distance = torch.where(fresh, distance, self.first_distance)
        early = F.relu(self.least_objective(distance) - losses).mean()
        self.optimizer.step(torch.where(self.straight[:, None], straight, led.detach()))
        report = {"cosine": cosine, "distance": distance, "objective": losses.detach(), "early": early.detach()}
        outside = self.scenes.outside[self.which]
        firsts = {"cosine_first": fresh & ~outside, "cosine_first_outside": fresh & outside}
        report |= {name: cosine[rows] for name, rows in firsts.items() if rows.any()}
        self.updates += 1
        means = {name: float(values.mean()) for name, values in report.items()}
        return (weights * turned).sum() + self.config["early"] * early, means, videos.detach()
