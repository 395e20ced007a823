"""Stage ``teacher-point``: the gradient of the trained Teacher, learnt together with answers about what it leads to.

A step of each optimisation (`pointing.py`); rendered videos with the simulator's truths, a share of them faded into the
right one, half of them once more as the surrogate decoder shows them; predictions of the optimisations of a while ago
with the labeller's truths, most often about the task's own questions; all of these after an adversarial step; and right
videos, with which the Teacher is to be content. Drawing and labelling are other processes' work.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from recipes.microworld.collect import parts
from recipes.microworld.teacher.data import faded, lesson
from recipes.microworld.teacher.lesson import Lesson
from recipes.microworld.teacher.losses import climbed
from recipes.microworld.teacher.model import build, save
from recipes.microworld.teacher.pointing import Pointing, Scenes
from recipes.microworld.training import Run, adopt, load_config, train
from vlmteacher.checkpoints.pretrained import load_network
from vlmteacher.evaluation.workers import Task, Workers
from vlmteacher.microworld import labeller
from vlmteacher.microworld.questions import Question, ask, own_questions
from vlmteacher.microworld.scene import Scene
from vlmteacher.placement import find_device
from vlmteacher.settings import Settings

SAVE_EVERY = 250
AHEAD = 4  # steps by which rows are drawn before they are needed
LATER = 4  # steps after which the labels of a prediction are known
KEPT = 4000  # predictions that are shown again
OWN, FADED = 0.6, 0.2  # shares of the labelled predictions: asked the task's own questions; faded into the right video
CONTENT = 0.05  # an objective with which the right video is right enough


@dataclass(frozen=True)
class Shown:
    """Videos (N, T, H, W, 3) uint8 and the same number of questions about each.

    yes: (N, questions) in [0, 1], how far Yes is right.
    """

    videos: np.ndarray
    texts: list[list[str]]
    yes: np.ndarray

    @classmethod
    def of(cls, rows: list[tuple[np.ndarray, list[Question], list[float]]]) -> Shown:
        videos, asked, yes = zip(*rows, strict=True)
        pixels = (np.stack(videos).clip(0, 1) * 255).round().astype(np.uint8)
        return cls(pixels, [[q.text for q in row] for row in asked], np.asarray(yes, np.float32))

    def frames(self, device: torch.device) -> Tensor:
        """(N, T, 3, H, W) in [0, 1]."""
        return torch.from_numpy(self.videos).to(device).permute(0, 1, 4, 2, 3).float() / 255

    def rows(self, places: np.ndarray) -> Shown:
        return Shown(self.videos[places], [self.texts[k] for k in places], self.yes[places])

    @classmethod
    def joined(cls, parts: list[Shown]) -> Shown:
        texts = [row for part in parts for row in part.texts]
        return cls(np.concatenate([part.videos for part in parts]), texts, np.concatenate([part.yes for part in parts]))


def answers(asked: list[Question], count: int) -> tuple[list[Question], list[float]]:
    """The first `count` questions, over again where there are fewer, and their answers."""
    asked = (asked * count)[:count]
    return asked, [float(q.answer) for q in asked]


def draw_rows(config: dict[str, Any], index: int) -> Shown:
    """Rendered videos for one step, a share `faded` of them on their way to the right one."""
    rng = np.random.default_rng([config["seed"], index, 1])
    rows: list[tuple[np.ndarray, list[Question], list[float]]] = []
    for _ in range(config["batch"]):
        video, scene, facts = lesson(rng, config["outside"])
        if rng.random() < config["faded"]:
            rows.append(faded((video, scene, facts), float(rng.uniform()), rng))
        else:
            rows.append((video, *answers(ask(scene, facts, rng, config["questions"]), config["questions"])))
    return Shown.of(rows)


def label_rows(config: dict[str, Any], index: int, videos: np.ndarray, scenes: list[Scene]) -> tuple[Shown, float]:
    """Predictions (N, T, H, W, 3) uint8 with the labeller's truths; and the share of them that is right."""
    rng = np.random.default_rng([config["seed"], index, 2])
    rows: list[tuple[np.ndarray, list[Question], list[float]]] = []
    right = []
    for video, scene in zip(videos.astype(np.float32) / 255, scenes, strict=True):
        facts = labeller.label(video, scene)
        right.append(labeller.succeeds(facts, scene))
        kind, count = rng.random(), config["questions"]
        if kind < FADED:
            rows.append(faded((video, scene, facts), float(rng.uniform()), rng))
        else:
            own = kind < FADED + OWN
            rows.append((video, *answers(own_questions(scene, facts) if own else ask(scene, facts, rng, count), count)))
    return Shown.of(rows), float(np.mean(right))


class Queue:
    """What other processes are asked for, in order."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.waiting: deque[Task] = deque()

    def ask(self, work: Callable[..., Any], *given: Any) -> None:
        self.waiting.append(self.workers.submit(work, *given))

    def take(self) -> Any:
        return self.workers.finish(self.waiting.popleft())


class Course:
    """What the steps of the training are made of: the Teacher, whom it learns from, and what other processes do for it.

    config: of both `Pointing` and this: `batch` rendered videos a step, a share `faded` of them; `labels` predictions
    are labelled and as many shown again, `questions` about each; `right` videos; the `adversary`'s most; the weights of
    their losses, `answer_weight` and `content`.
    """

    def __init__(self, lessons: Lesson, reasoner: Any, decoder: Any, workers: Workers, config: dict[str, Any]) -> None:
        self.lessons, self.reasoner, self.decoder, self.config = lessons, reasoner, decoder, config
        self.device: torch.device = reasoner.device
        self.scenes = Scenes.draw(reasoner, config, np.random.default_rng([config["seed"], 0, 3]))
        self.settings = Settings(**load_config("collect")["settings"])
        self.pointing = Pointing(lessons, reasoner, decoder, self.scenes, self.settings, config)
        self.drawn, self.labels = Queue(workers), Queue(workers)
        self.clear()

    def clear(self) -> None:
        """Begin other optimisations, with no prediction labelled yet."""
        self.pointing.clear()
        self.labels.waiting.clear()
        self.known: list[Shown] = []

    def step(self, index: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """The loss and what is reported; at the steps that `train` saves before, all begins anew.

        So a training that is taken up again sees what one in a piece does.
        """
        torch.manual_seed(int(rng.integers(2**31)))  # of adversarial steps
        if index % SAVE_EVERY == 0:
            self.clear()
        pointed, report, videos = self.pointing.step(rng)
        right = self.label(index, videos, rng)
        if right is not None:
            report["right"] = right
        answered, content = self.answer_loss(self.draw(index, rng)), self.content_loss(rng)
        report |= {"answers": float(answered.detach()), "content": float(content.detach())}
        return pointed + self.config["answer_weight"] * answered + self.config["content"] * content, report

    def label(self, index: int, videos: Tensor, rng: np.random.Generator) -> float | None:
        """Have some of the predictions labelled; get those of `LATER` steps ago, the share of right ones among them."""
        picks = rng.choice(len(videos), self.config["labels"], replace=False)
        chosen = (videos[torch.from_numpy(picks).to(self.device)] * 255).round().byte().permute(0, 1, 3, 4, 2)
        which = self.pointing.which.tolist()
        scenes = [self.scenes.scenes[which[k]] for k in picks]
        self.labels.ask(label_rows, self.config, index, chosen.cpu().numpy(), scenes)
        if len(self.labels.waiting) <= LATER:
            return None
        rows, right = self.labels.take()
        self.known = [*self.known, rows][-max(1, KEPT // len(picks)) :]
        return right

    def draw(self, index: int, rng: np.random.Generator) -> Shown:
        """The step's rendered videos, and labelled predictions where there are any."""
        if not self.drawn.waiting:  # the first step
            for later in range(AHEAD):
                self.drawn.ask(draw_rows, self.config, index + later)
        self.drawn.ask(draw_rows, self.config, index + AHEAD)
        shown, count = [self.drawn.take()], self.config["labels"]
        for place in rng.integers(len(self.known) * count, size=count) if self.known else ():
            part, row = divmod(int(place), count)
            shown.append(self.known[part].rows(np.asarray([row])))
        return Shown.joined(shown)

    def cost(self, frames: Tensor, shown: Shown) -> Tensor:
        """Cross-entropy of the answers about frames (N, K, 3, H, W)."""
        reading = self.lessons.read(frames, shown.texts, backend="sdpa")
        yes = torch.from_numpy(shown.yes).to(self.device)
        return -(yes * reading.yes + (1 - yes) * reading.no).mean()

    def answer_loss(self, shown: Shown) -> Tensor:
        """`cost` after an adversarial step; half of the rendered videos come once more, as the decoder shows them."""
        frames, again = shown.frames(self.device), np.arange(self.config["batch"])[::2]
        with torch.no_grad():
            seen = self.decoder.decode_batch(self.reasoner.encode_video(shown.videos[again]))
        shown = Shown.joined([shown, shown.rows(again)])
        frames = torch.cat([frames, seen])[:, self.lessons.indices].requires_grad_()
        (gradient,) = torch.autograd.grad(self.cost(frames, shown), frames)
        return self.cost(climbed(frames, gradient, self.config["adversary"]), shown)

    def content_loss(self, rng: np.random.Generator) -> Tensor:
        """Of what the Teacher still finds wrong with right videos, half of them from shaken latents."""
        picks = rng.integers(len(self.scenes.scenes), size=self.config["right"])
        latents = self.scenes.right[torch.from_numpy(picks).to(self.device)]
        size = 0.25 * rng.random((len(picks), 1, 1, 1, 1)) * (rng.random((len(picks), 1, 1, 1, 1)) < 0.5)
        noise = torch.from_numpy((size * rng.standard_normal(latents.shape)).astype(np.float32))
        with torch.no_grad():
            frames = self.decoder.decode_batch(latents + noise.to(self.device))[:, self.lessons.indices]
        asked = [self.scenes.questions[k] for k in picks]
        return F.relu(self.lessons.objective(frames, asked, self.settings.goal_weight) - CONTENT).mean()


def train_pointing(run: Run) -> None:
    """Stage ``teacher-point``: go on from the Teacher in the directory ``run.start``.

    What is written is a mixture of the two, with a share `mix` of the trained one.
    """
    config, device = run.config, find_device(run.device, "--device")
    assert run.start
    torch.manual_seed(config["seed"])
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    lessons = Lesson(build(config, run.path("teacher/tokenizer")), config)
    teacher = lessons.teacher.model
    adopt(teacher, load_network(Qwen3VLForConditionalGeneration, run.start, dtype=torch.float32))
    lessons.to(device)
    start = [p.detach().clone() for p in teacher.parameters()]
    reasoner, decoder = parts(run)
    reasoner.to(device)
    reasoner.vae.to(device)  # it is not the one that the Reasoner was loaded with
    decoder.to(device)
    with Workers(config["workers"] or os.cpu_count() or 1) as workers:
        train(
            {"teacher": teacher},
            Course(lessons, reasoner, decoder, workers, config).step,
            run,
            warmup=50,
            save_every=SAVE_EVERY,
            log_every=50,
            ema=config["ema"],
            save_interrupted=False,  # `Course` begins anew at the steps that are saved before, and nowhere else
        )
    with torch.no_grad():
        for parameter, before in zip(teacher.parameters(), start, strict=True):
            parameter.copy_(before.lerp(parameter, config["mix"]))
    teacher.cpu()
    save(lessons.teacher, run.out / "teacher")
