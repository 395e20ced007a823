"""Stages ``teacher`` and ``teacher-finetune``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from recipes.microworld.shards import load_kinds
from recipes.microworld.teacher.data import Batch, Row, Source, blend, rendered, scenes_to_write
from recipes.microworld.teacher.lesson import Lesson
from recipes.microworld.teacher.model import build, save
from recipes.microworld.training import Run, adopt, in_bfloat16, train
from vlmteacher.checkpoints.pretrained import load_network, load_tokenizer
from vlmteacher.distillation.trainer import STATE
from vlmteacher.microworld import world
from vlmteacher.microworld.questions import ask

SAVE_EVERY = 250


def pretrain(run: Run) -> None:
    """Stage ``teacher``, from scratch or from the weights of the Teacher in the directory ``run.start``."""
    config = run.config
    torch.manual_seed(config["seed"])
    lessons = Lesson(build(config, run.out / "tokenizer"), config)
    if run.start:
        known = load_network(Qwen3VLForConditionalGeneration, run.start, dtype=torch.float32)
        adopt(lessons.teacher.model, known, lessons.teacher.tokenizer, load_tokenizer(run.start))
    fit(lessons, lambda rng: [rendered(rng, config["outside"]) for _ in range(config["batch"])], run, warmup=100)


def finetune(run: Run) -> None:
    """Stage ``teacher-finetune``: train the state in the folder ``run.start`` further, partly on collected videos.

    config: `collected` has the number of rows of each kind in a batch. `learn` restricts the training to some families,
    or to scenes out of domain ("outside"); every other step then keeps the judging of all else as it was.
    """
    config = run.config
    torch.manual_seed(config["seed"])
    lessons = Lesson(build(config, run.path("teacher/tokenizer")), config)
    assert run.start
    modules = torch.load(run.start / STATE, weights_only=True)["modules"]
    lessons.teacher.model.load_state_dict(modules["teacher"])
    lessons.heads.load_state_dict(modules.get("heads", {}), strict=False)  # one that was added since is untrained
    groups = load_kinds(run.path("collect"), config["collected"])
    if config["learn"] == "outside":
        learned, held = Source(groups, world.FAMILIES, 1.0), Source(groups, world.FAMILIES, 0.0)
    else:
        families = tuple(config["learn"] or world.FAMILIES)
        others = tuple(family for family in world.FAMILIES if family not in families)
        learned, held = (Source(groups, names, config["outside"]) for names in (families, others))

    def draw(source: Source, rng: np.random.Generator) -> list[Row]:
        return source.draw(rng, config["collected"], config["batch"])

    hold = None
    if held.families:
        known = Lesson(copy.deepcopy(lessons.teacher), config)
        known.teacher.model.requires_grad_(False)

        def hold(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
            return lessons.keep(questioned(draw(held, rng), rng, 4), known)

    fit(lessons, partial(draw, learned), run, warmup=50, hold=hold)


def questioned(rows: list[Row], rng: np.random.Generator, count: int) -> Batch:
    """The rows with `count` questions about each."""
    return Batch.of(rows, [ask(scene, facts, rng, count) for _, scene, facts in rows])


def fit(
    lessons: Lesson,
    draw: Callable[[np.random.Generator], list[Row]],
    run: Run,
    *,
    warmup: int,
    hold: Callable[[np.random.Generator], tuple[Tensor, dict[str, float]]] | None = None,
) -> None:
    """Train on the rows that `draw` returns, and on writing queries; save the Teacher to ``run.out / "teacher"``.

    config: in the first `heads_first` steps the training-only heads learn alone, which untrained would spoil a Teacher.
    hold: the loss of the steps with an odd index. With an even `blend_every` no step then blends, for those are odd.
    """
    config, teacher = lessons.config, lessons.teacher

    def step(index: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        teacher.model.requires_grad_(index >= config["heads_first"])
        with in_bfloat16(config["bf16"]):
            if index < config["heads_first"]:
                return lessons.judge(questioned(draw(rng), rng, config["questions"]))
            if config["write_every"] and index % config["write_every"] == config["write_every"] - 1:
                loss = lessons.write(scenes_to_write(rng, config["batch"], config["outside"]), rng)
                return loss, {"write": float(loss.detach())}
            if hold and index % 2:
                return hold(rng)
            rows = draw(rng)
            blended = config["blend_every"] and index % config["blend_every"] == 1
            shown = blend(rows, rng) if blended else questioned(rows, rng, config["questions"])
            if config["adversary"]:
                shown = lessons.perturb(shown, rng)
            loss, report = lessons.judge(shown)
            if blended:
                loss = config["answer_weight"] * lessons.answer_loss
                report = {"blend": float(lessons.answer_loss.detach())}
        return loss, report

    modules = {"teacher": teacher.model, "heads": lessons.heads}
    train(modules, step, run, warmup=warmup, save_every=SAVE_EVERY, log_every=50)
    save(teacher, run.out / "teacher")
