"""Part of stage ``teacher-finetune``: where the gradient of what the Teacher says should point.

Answers alone do not teach it: of the many changes of a video after which a small Teacher says Yes, few make it right.
So optimisations of training scenes run beside the training, and at each of their steps the gradient of the Teacher's
loss with respect to the LoRA is turned towards that of the squared distance from the right video's latents: a loss on
a derivative (Sobolev training, arXiv 1706.04859), where the Teacher's own optimisations lead (DAgger, arXiv 1011.0686).
And the Teacher is not to be content before most of the way is made.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmteacher.evaluation.microworld import right_latents
from vlmteacher.lora import add_lora, lora_parameters
from vlmteacher.microworld import splits, world
from vlmteacher.microworld.collect import start
from vlmteacher.microworld.questions import right_queries
from vlmteacher.optimization import GRADIENT_CLIP, Settings
from vlmteacher.reasoners.base import Condition, Noise
from vlmteacher.reward import vqa_objective

if TYPE_CHECKING:
    from vlmteacher.microworld.train_teacher import Lesson


@dataclass
class Run:
    """An optimisation of a training scene.

    right: the right video's latents. length: updates until another optimisation takes its place. straight: led by the
    distance from `right` instead of the Teacher. outside: the scene is out of domain. flawed: it is one where the
    Reasoner errs. first: the distance before the first update.
    """

    condition: Condition
    noise: Noise
    right: Tensor
    questions: list[str]
    transformer: nn.Module
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    length: int
    straight: bool
    outside: bool
    flawed: bool
    first: float = 0.0
    updates: int = 0

    def due(self, distance: float) -> float:
        """What the Teacher's objective should not be below yet: 1.5 at the first distance, 0 at a quarter of it."""
        return 3.0 * min(max((distance / self.first) ** 0.5 - 0.5, 0.0), 0.5) if self.flawed else 0.0

    def gradient(self, value: Tensor, along: Tensor | None = None) -> list[Tensor]:
        """Of `value` with respect to the LoRA; with `along`, of the product of the two, and differentiable in it."""
        return list(
            torch.autograd.grad(
                value,
                self.parameters,
                along,
                retain_graph=True,
                create_graph=along is not None,
                allow_unused=True,
                materialize_grads=True,
            )
        )


class Pointing:
    """The optimisations; `step` takes some of them a step further and gives the loss on the Teacher's gradients there.

    settings: of the optimisations. config: `runs` of them are kept and `at_once` take a step; `outside` and `flawed`
    are shares of scenes out of domain and, of the others, of those where the Reasoner errs; `longest` updates; a share
    `straight` of them is led by the distance; below a distance of `far` the direction counts less; `weight` of
    1 - cosine in the loss, and `early` of content with what is not right yet.
    """

    def __init__(self, lesson: Lesson, reasoner: Any, decoder: Any, settings: Settings, config: dict[str, Any]) -> None:
        self.lesson, self.reasoner, self.decoder = lesson, reasoner, decoder
        self.settings, self.config = settings, config
        shared = {id(weight): weight for weight in reasoner.transformer.parameters()}  # which stay as they are
        self.transformers = [copy.deepcopy(reasoner.transformer, dict(shared)) for _ in range(config["runs"])]
        self.clear()

    def clear(self) -> None:
        """Begin other optimisations."""
        self.runs: list[Run | None] = [None] * self.config["runs"]

    def begin(self, transformer: Any, rng: np.random.Generator) -> Run:
        family = str(rng.choice(world.FAMILIES))
        scene = splits.training_scene(rng, family, self.config["outside"])
        while world.flawed(scene) == scene and rng.random() < self.config["flawed"]:
            scene = splits.training_scene(rng, family, self.config["outside"])
        condition, noise = start(self.reasoner, scene, rng)
        queries = right_queries(scene)
        add_lora(transformer, self.settings.rank, seed=int(rng.integers(2**31)), fused=False)
        parameters = list(lora_parameters(transformer))
        return Run(
            condition,
            noise,
            right_latents(self.reasoner, scene),
            [queries.goal, *queries.process],
            transformer,
            parameters,
            torch.optim.AdamW(parameters, lr=self.settings.learning_rate, weight_decay=0),
            int(rng.integers(1, self.config["longest"] + 1)),
            rng.random() < self.config["straight"],
            world.split_of(scene) == "ood",
            world.flawed(scene) != scene,
        )

    def losses(self, frames: Tensor, runs: list[Run]) -> Tensor:
        """The Teacher's objective (B,) on frames (B, K, 3, H, W), whose gradient has one too."""
        most = max(len(run.questions) for run in runs)
        texts = [(run.questions * most)[:most] for run in runs]  # the first again, unweighed, where there are fewer
        with torch.autocast("cpu", torch.bfloat16, enabled=self.lesson.config["bf16"]):
            losses = -self.lesson.read(frames, texts, backend="sdpa").yes
        goal = self.settings.goal_weight
        return torch.stack([vqa_objective(x[: len(r.questions)], goal) for x, r in zip(losses, runs, strict=True)])

    @torch.no_grad()
    def carried(self, video: Tensor, z: Tensor, direction: Tensor) -> Tensor:
        """The change of a video with its latents: exact but for the kinks of the decoder, which is linear elsewhere."""
        size = 1e-3 * z.square().mean().sqrt() / direction.square().mean().sqrt().clamp_min(1e-30)
        return (self.decoder.decode(z + size * direction, frame_indices=self.lesson.indices) - video) / size

    def turn(self, run: Run, z: Tensor, video: Tensor, asked: Tensor) -> tuple[Tensor, float, float]:
        """Compare the way that the Teacher asks for with that to the right video, and leave one of them for the LoRA.

        asked: the gradient at the video. Returns the gradient of 1 - cosine at `asked`, the cosine and the distance.
        All is linear from there to the LoRA's gradient: what the cosine wants of that is carried forward to the frames.
        """
        distance = (z - run.right).square().mean()
        straight = run.gradient(distance)
        (asked_of_latents,) = torch.autograd.grad(video, z, asked)
        led = run.gradient(z, asked_of_latents.requires_grad_())
        cosine = F.cosine_similarity(*(torch.cat([g.flatten() for g in each]) for each in (led, straight)), dim=0)
        (wanted,) = torch.autograd.grad(1 - cosine, asked_of_latents)
        for parameter, value in zip(run.parameters, straight if run.straight else led, strict=True):
            parameter.grad = value.detach()
        nn.utils.clip_grad_norm_(run.parameters, GRADIENT_CLIP)
        return self.carried(video, z, wanted), cosine.item(), distance.item()

    def step(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """The loss and what is reported."""
        places = [int(k) for k in rng.choice(len(self.runs), self.config["at_once"], replace=False)]
        runs = [self.runs[k] or self.begin(self.transformers[k], rng) for k in places]
        with sdpa_kernel(SDPBackend.MATH):  # the only one whose gradient has one
            latents = [
                self.reasoner.predict_clean_at(run.condition, run.noise.z1, 1.0, transformer=run.transformer)
                for run in runs
            ]
            videos = [self.decoder.decode(z, frame_indices=self.lesson.indices) for z in latents]
            frames = torch.stack(videos).detach().requires_grad_()
            losses = self.losses(frames, runs)
        (asked,) = torch.autograd.grad(losses.sum(), frames, create_graph=True)
        given = zip(runs, latents, videos, asked.detach(), strict=True)
        changes, cosines, distances = zip(*(self.turn(*each) for each in given), strict=True)

        # Little is to be told of the direction where little is left of the way.
        weights = (torch.tensor(distances) / self.config["far"]).clamp_max(1) * self.config["weight"] / len(runs)
        turned = torch.stack([(a * change).sum() for a, change in zip(asked, changes, strict=True)])
        turned = turned - turned.detach() + 1 - torch.tensor(cosines)
        for run, distance in zip(runs, distances, strict=True):
            run.first = run.first if run.updates else distance
        due = torch.tensor([run.due(distance) for run, distance in zip(runs, distances, strict=True)])
        early = F.relu(due - losses).mean()
        report = {
            "cosine": cosines,
            "cosine_first": [c for run, c in zip(runs, cosines, strict=True) if not run.updates and not run.outside],
            "cosine_first_outside": [
                c for run, c in zip(runs, cosines, strict=True) if not run.updates and run.outside
            ],
            "distance": distances,
            "objective": losses.tolist(),
            "early": [early.item()],
        }
        for place, run in zip(places, runs, strict=True):
            run.optimizer.step()
            run.updates += 1
            self.runs[place] = run if run.updates < run.length else None
        means = {name: float(np.mean(values)) for name, values in report.items() if len(values)}
        return (weights * turned).sum() + self.config["early"] * early, means
