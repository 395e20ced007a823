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
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from vlmteacher.microworld import labeller
from vlmteacher.microworld.collect import parts
from vlmteacher.microworld.pointing import Pointing, Scenes
from vlmteacher.microworld.questions import Question, ask, own_questions
from vlmteacher.microworld.scene import Scene
from vlmteacher.microworld.train_teacher import SAVE_EVERY, Lesson, build, climbed, faded, lesson, save
from vlmteacher.microworld.training import adopt, encode_clips, load_config, train
from vlmteacher.optimization import Settings

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

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool
        self.waiting: deque[Future[Any]] = deque()

    def ask(self, work: Callable[..., Any], *given: Any) -> None:
        self.waiting.append(self.pool.submit(work, *given))

    def take(self) -> Any:
        return self.waiting.popleft().result()


def main(trained: Path, out: Path, device: torch.device) -> None:
    """Go on from ``trained/finetune/teacher``; write ``out/teacher``, a share `mix` of the way to the trained one.

    `train` saves every `SAVE_EVERY` steps; optimisations and labels begin anew there, so that a training that is taken
    up again sees what one in a piece does.
    """
    config = load_config("teacher") | load_config("teacher_point")
    torch.manual_seed(config["seed"])
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    lessons = Lesson(build(config, trained / "teacher/tokenizer"), config)
    adopt(
        lessons.teacher.model,
        Qwen3VLForConditionalGeneration.from_pretrained(trained / "finetune/teacher", dtype=torch.float32),
    )
    lessons.to(device)
    parameters = list(lessons.teacher.model.parameters())
    start = [p.detach().clone() for p in parameters]
    reasoner, decoder = parts(trained)
    reasoner.to(device)
    reasoner.vae.to(device)  # it is not the one that the Reasoner was loaded with
    decoder.to(device)
    scenes = Scenes.draw(reasoner, config, np.random.default_rng([config["seed"], 0, 3]))
    settings = Settings(**load_config("collect")["settings"])
    pointing = Pointing(lessons, reasoner, decoder, scenes, settings, config)

    def cost(frames: Tensor, texts: list[list[str]], yes: Tensor) -> Tensor:
        reading = lessons.read(frames, texts, backend="sdpa")
        return -(yes * reading.yes + (1 - yes) * reading.no).mean()

    def answer_loss(shown: Shown, rendered: int) -> Tensor:
        """Of the answers after an adversarial step; `rendered` rows come once more, as the decoder shows them."""
        frames, again = shown.frames(device), np.arange(rendered)[::2]
        with torch.no_grad():
            seen = decoder.decode_batch(encode_clips(reasoner, shown.videos[again].astype(np.float32) / 255))
        shown = Shown.joined([shown, shown.rows(again)])
        frames = torch.cat([frames, seen])[:, lessons.indices].requires_grad_()
        yes = torch.from_numpy(shown.yes).to(device)
        (gradient,) = torch.autograd.grad(cost(frames, shown.texts, yes), frames)
        return cost(climbed(frames, gradient, config["adversary"]), shown.texts, yes)

    def content_loss(rng: np.random.Generator) -> Tensor:
        """Of what the Teacher still finds wrong with right videos, half of them from shaken latents."""
        picks = rng.integers(len(scenes.scenes), size=config["right"])
        latents = scenes.right[torch.from_numpy(picks).to(device)]
        size = 0.25 * rng.random(len(picks)) * (rng.random(len(picks)) < 0.5)
        noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32)).to(device)
        with torch.no_grad():
            latents = latents + torch.from_numpy(size.astype(np.float32)).to(device).view(-1, 1, 1, 1, 1) * noise
            frames = decoder.decode_batch(latents)[:, lessons.indices]
        asked = [scenes.questions[k] for k in picks]
        return F.relu(lessons.objective(frames, asked, settings.goal_weight) - CONTENT).mean()

    with ProcessPoolExecutor(config["workers"] or os.cpu_count(), get_context("spawn"), _start) as pool:
        drawn, labels = Queue(pool), Queue(pool)
        known: list[Shown] = []

        def step(index: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
            nonlocal known
            torch.manual_seed(int(rng.integers(2**31)))  # of adversarial steps
            if index % SAVE_EVERY == 0:
                pointing.clear()
                labels.waiting.clear()
                known = []
            if not drawn.waiting:  # the first step
                for later in range(AHEAD):
                    drawn.ask(draw_rows, config, index + later)
            drawn.ask(draw_rows, config, index + AHEAD)
            pointed, report, videos = pointing.step(rng)

            picks = rng.choice(len(videos), min(config["labels"], len(videos)), replace=False)
            chosen = (videos[torch.from_numpy(picks).to(device)] * 255).round().byte().permute(0, 1, 3, 4, 2)
            labels.ask(
                label_rows, config, index, chosen.cpu().numpy(), [scenes.scenes[k] for k in pointing.which[picks]]
            )
            if len(labels.waiting) > LATER:
                rows, report["right"] = labels.take()
                known = [*known, rows][-max(1, KEPT // len(picks)) :]
            shown = drawn.take()
            if known:
                places = (divmod(k, len(picks)) for k in rng.integers(len(known) * len(picks), size=len(picks)))
                shown = Shown.joined([shown, *(known[part].rows(np.asarray([row])) for part, row in places)])
            answered, content = answer_loss(shown, config["batch"]), content_loss(rng)
            report |= {"answers": float(answered.detach()), "content": float(content.detach())}
            return pointed + config["answer_weight"] * answered + config["content"] * content, report

        train(
            {"teacher": lessons.teacher.model},
            step,
            out,
            steps=config["steps"],
            learning_rate=config["learning_rate"],
            seed=config["seed"],
            warmup=50,
            save_every=SAVE_EVERY,
            log_every=50,
            ema=config["ema"],
        )
    with torch.no_grad():
        for parameter, before in zip(parameters, start, strict=True):
            parameter.copy_(before.lerp(parameter, config["mix"]))
    lessons.teacher.model.cpu()
    save(lessons.teacher, out / "teacher")


def _start() -> None:
    torch.set_num_threads(1)
