"""Stage ``teacher-point``: train the direction of the Teacher's gradient, together with its answers.

The loss of a step is the sum of

- the loss on the gradient's direction, over a step of all optimisations (`pointing.py`);
- the loss of answers, after an adversarial step, about rendered videos with the simulator's truth (a share of them
  faded into the right video; half of them a second time through VAE and surrogate decoder), about predictions of the
  optimisations some steps ago with the labeller's truth, and about collected videos, both mostly with the task's own
  questions;
- the loss of right videos whose objective is not low.

Videos are drawn and labelled by other processes.
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
from recipes.microworld.shards import load_kinds
from recipes.microworld.teacher.data import Row, Source, fade, rendered
from recipes.microworld.teacher.lesson import Lesson
from recipes.microworld.teacher.losses import perturbed
from recipes.microworld.teacher.model import build, save
from recipes.microworld.teacher.pointing import Pointing, Scenes, decode
from recipes.microworld.training import Run, adopt, load_config, train
from vlmteacher.checkpoints.pretrained import load_network
from vlmteacher.evaluation.processes import Processes
from vlmteacher.evaluation.workers import Task, Workers
from vlmteacher.microworld import labeller, world
from vlmteacher.microworld.questions import Question, ask, own_questions
from vlmteacher.microworld.scene import Scene
from vlmteacher.placement import find_device
from vlmteacher.settings import Settings

SAVE_EVERY = 250
AHEAD = 4  # steps by which rows are drawn in advance
LATER = 4  # steps until the labels of a prediction are used
KEPT = 4000  # labelled predictions that are kept for later steps
# Shares of labelled and collected videos with the task's own questions, and faded into the right video.
OWN, FADED = 0.6, 0.2
CONTENT = 0.05  # an objective that is low enough for a right video


@dataclass(frozen=True)
class Shown:
    """Videos (N, T, H, W, 3) uint8 and the same number of questions about each.

    yes: (N, questions), the target probability of Yes.
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
    """The first `count` questions, repeated where there are fewer, and their answers."""
    asked = (asked * count)[:count]
    return asked, [float(q.answer) for q in asked]


def draw_rows(config: dict[str, Any], index: int) -> Shown:
    """Draw the rendered videos of a step, a share `faded` of them faded into the right video."""
    rng = np.random.default_rng([config["seed"], index, 1])
    rows: list[tuple[np.ndarray, list[Question], list[float]]] = []
    for _ in range(config["batch"]):
        video, scene, facts = rendered(rng, config["outside"])
        if rng.random() < config["faded"]:
            rows.append(fade((video, scene, facts), float(rng.uniform()), rng))
        else:
            rows.append((video, *answers(ask(scene, facts, rng, config["questions"]), config["questions"])))
    return Shown.of(rows)


def label_rows(config: dict[str, Any], index: int, videos: np.ndarray, scenes: list[Scene]) -> tuple[Shown, float]:
    """Label predictions (N, T, H, W, 3) uint8; returns them with questions, and the share of right ones."""
    rng = np.random.default_rng([config["seed"], index, 2])
    rows = [(v, s, labeller.label(v, s)) for v, s in zip(videos.astype(np.float32) / 255, scenes, strict=True)]
    right = [labeller.succeeds(facts, scene) for _, scene, facts in rows]
    return question_rows(config, rows, rng), float(np.mean(right))


def question_rows(config: dict[str, Any], rows: list[Row], rng: np.random.Generator) -> Shown:
    """The rows with questions, a share `OWN` with the task's own; a share `FADED` is faded into the right video."""
    shown = []
    for video, scene, facts in rows:
        kind, count = rng.random(), config["questions"]
        if kind < FADED:
            shown.append(fade((video, scene, facts), float(rng.uniform()), rng))
        else:
            asked = own_questions(scene, facts) if kind < FADED + OWN else ask(scene, facts, rng, count)
            shown.append((video, *answers(asked, count)))
    return Shown.of(shown)


class Queue:
    """Tasks of other processes, whose results are taken in order."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.waiting: deque[Task] = deque()

    def submit(self, work: Callable[..., Any], *given: Any) -> None:
        """Have a call made by a worker."""
        self.waiting.append(self.workers.submit(work, *given))

    def take(self) -> Any:
        """The result of the oldest call; waits for it."""
        return self.workers.finish(self.waiting.popleft())


class Course:
    """The training steps: the optimisations, the videos, and the tasks of other processes.

    config: settings of `Pointing`, and: `batch` rendered videos per step, a share `faded` of them; `labels` predictions
    that are labelled per step, and as many labelled ones that are used; the number of `collected` videos of each kind
    per step; `questions` about each video; `right` videos;
    the largest adversarial step `adversary`; the weights `answer_weight` and `content` of the losses.
    """

    def __init__(
        self,
        lessons: Lesson,
        reasoner: Any,
        decoder: Any,
        workers: Workers,
        collected: Source,
        config: dict[str, Any],
    ) -> None:
        self.collected = collected
        self.lessons, self.reasoner, self.decoder, self.config = lessons, reasoner, decoder, config
        self.device: torch.device = reasoner.device
        self.scenes = Scenes.draw(reasoner, config, np.random.default_rng([config["seed"], 0, 3]))
        self.settings = Settings(**load_config("collect")["settings"])
        self.pointing = Pointing(lessons, reasoner, decoder, self.scenes, self.settings, config)
        self.drawn, self.labels = Queue(workers), Queue(workers)
        self.clear()

    def clear(self) -> None:
        """Restart the optimisations, without labelled predictions."""
        self.pointing.clear()
        self.labels.waiting.clear()
        self.known: list[Shown] = []

    def step(self, index: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """The loss of a step and metrics.

        Everything restarts at the steps before which the state is saved, so that a resumed training equals an
        uninterrupted one.
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
        """Have some predictions labelled, and add those of `LATER` steps ago; returns the share of right ones."""
        picks = rng.choice(len(videos), self.config["labels"], replace=False)
        chosen = (videos[torch.from_numpy(picks).to(self.device)] * 255).round().byte().permute(0, 1, 3, 4, 2)
        which = self.pointing.which.tolist()
        scenes = [self.scenes.scenes[which[k]] for k in picks]
        self.labels.submit(label_rows, self.config, index, chosen.cpu().numpy(), scenes)
        if len(self.labels.waiting) <= LATER:
            return None
        rows, right = self.labels.take()
        self.known = [*self.known, rows][-max(1, KEPT // len(picks)) :]
        return right

    def draw(self, index: int, rng: np.random.Generator) -> Shown:
        """The rendered and collected videos of the step, and labelled predictions where there are any."""
        if not self.drawn.waiting:  # the first step
            for later in range(AHEAD):
                self.drawn.submit(draw_rows, self.config, index + later)
        self.drawn.submit(draw_rows, self.config, index + AHEAD)
        shown, count = [self.drawn.take()], self.config["labels"]
        for place in rng.integers(len(self.known) * count, size=count) if self.known else ():
            part, row = divmod(int(place), count)
            shown.append(self.known[part].rows(np.asarray([row])))
        if counts := self.config["collected"]:
            rows = self.collected.draw(rng, counts, sum(counts.values()))
            shown.append(question_rows(self.config, rows, rng))
        return Shown.joined(shown)

    def cost(self, frames: Tensor, shown: Shown) -> Tensor:
        """Cross-entropy of the answers about frames (N, K, 3, H, W)."""
        reading = self.lessons.read(frames, shown.texts, backend="sdpa")
        yes = torch.from_numpy(shown.yes).to(self.device)
        return -(yes * reading.yes + (1 - yes) * reading.no).mean()

    def answer_loss(self, shown: Shown) -> Tensor:
        """`cost` after an adversarial step; half of the rendered videos are added as the decoder shows them."""
        frames, again = shown.frames(self.device), np.arange(self.config["batch"])[::2]
        with torch.no_grad():
            decoded = decode(self.decoder, self.reasoner.encode_video(shown.videos[again]))
        shown = Shown.joined([shown, shown.rows(again)])
        frames = torch.cat([frames, decoded])[:, self.lessons.indices].requires_grad_()
        (gradient,) = torch.autograd.grad(self.cost(frames, shown), frames)
        return self.cost(perturbed(frames, gradient, self.config["adversary"]), shown)

    def content_loss(self, rng: np.random.Generator) -> Tensor:
        """The mean objective above `CONTENT` of right videos, half of which are decoded from noisy latents."""
        picks = rng.integers(len(self.scenes.scenes), size=self.config["right"])
        latents = self.scenes.right[torch.from_numpy(picks).to(self.device)]
        size = 0.25 * rng.random((len(picks), 1, 1, 1, 1)) * (rng.random((len(picks), 1, 1, 1, 1)) < 0.5)
        noise = torch.from_numpy((size * rng.standard_normal(latents.shape)).astype(np.float32))
        with torch.no_grad():
            frames = decode(self.decoder, latents + noise.to(self.device))[:, self.lessons.indices]
        asked = [self.scenes.questions[k] for k in picks]
        return F.relu(self.lessons.objective(frames, asked, self.settings.goal_weight) - CONTENT).mean()


def train_pointing(run: Run) -> None:
    """Stage ``teacher-point``: train the Teacher in the directory ``run.start`` further.

    The result is the weighted mean of the two, with a share `mix` of the trained one.
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
    reasoner.vae.to(device)  # `parts` replaced the VAE that the Reasoner was loaded with
    decoder.to(device)
    collected = Source(load_kinds(run.path("collect"), config["collected"]), world.FAMILIES, config["outside"])
    with Processes(config["workers"] or os.cpu_count() or 1) as executor:
        workers = Workers(executor)
        train(
            {"teacher": teacher},
            Course(lessons, reasoner, decoder, workers, collected, config).step,
            run,
            warmup=50,
            save_every=SAVE_EVERY,
            log_every=50,
            ema=config["ema"],
            save_interrupted=False,  # `Course` restarts only where the state is saved regularly
        )
    with torch.no_grad():
        for parameter, before in zip(teacher.parameters(), start, strict=True):
            parameter.copy_(before.lerp(parameter, config["mix"]))
    teacher.cpu()
    save(lessons.teacher, run.out / "teacher")
