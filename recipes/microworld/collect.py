"""Stages ``collect`` and ``optimise``: videos of training scenes with facts, to fine-tune the Teacher on.

There are three kinds: *lessons*, rendered videos through VAE and surrogate decoder, with facts from the simulator;
*predictions*, the Reasoner's one-step predictions and few-step videos; and *optimised* ones, predictions in the course
of optimisations by an earlier Teacher (hard negatives). The latter two have facts from the labeller.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.microworld.shards import Shard
from recipes.microworld.teacher.data import draw_track
from recipes.microworld.training import Run
from vlmteacher.checkpoints.pretrained import load_network
from vlmteacher.decoders.taehv import load_decoder
from vlmteacher.evaluation.microworld import first_frame
from vlmteacher.files import make_folder
from vlmteacher.lora.adapter import add_lora, remove_lora
from vlmteacher.microworld import labeller, splits, world
from vlmteacher.microworld.facts import facts_of
from vlmteacher.microworld.questions import right_queries
from vlmteacher.microworld.scene import Scene
from vlmteacher.optimization.loop import Optimization
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.reasoners.wan.reasoner import WanReasoner
from vlmteacher.settings import Settings
from vlmteacher.teachers import load_teacher


def _pixels(frames: Tensor) -> np.ndarray:
    """Frames (B, F, 3, H, W) in [0, 1] as an array (B, F, H, W, 3)."""
    return frames.detach().float().permute(0, 1, 3, 4, 2).numpy()


@torch.no_grad()
def lessons(shard: Shard, count: int, rng: np.random.Generator, reasoner: WanReasoner, decoder: Any) -> None:
    """Add `count` rendered videos, of all kinds of `MIX`, through the VAE's encoder and the surrogate decoder."""
    for _ in range(count // 8):
        drawn = [draw_track(rng) for _ in range(8)]
        z = reasoner.encode_video(255 * np.stack([world.draw(track) for _, track in drawn]))
        for frames, (scene, track) in zip(_pixels(decoder.decode_batch(z)), drawn, strict=True):
            shard.add(frames, scene, facts_of(scene, track))


@torch.no_grad()
def predictions(
    shard: Shard, count: int, rng: np.random.Generator, reasoner: WanReasoner, decoder: Any, outside: float
) -> None:
    """Add `count` of the Reasoner's one-step predictions (surrogate decoder) and few-step videos (either decoder).

    outside: share of the scenes out of domain.
    """
    for index in range(count):
        scene = splits.training_scene(rng, world.FAMILIES[index % len(world.FAMILIES)], outside)
        condition, noise = start(reasoner, scene, rng)
        if index % 3 == 0:
            frames = decoder.decode_batch(reasoner.predict_clean(condition, noise))
        elif index % 3 == 1:
            frames = decoder.decode_batch(reasoner.sample(condition, noise))
        else:
            frames = reasoner.decode(reasoner.sample(condition, noise))[None]
        shard.add(_pixels(frames)[0], scene)


def optimised(
    shard: Shard,
    count: int,
    rng: np.random.Generator,
    reasoner: WanReasoner,
    decoder: Any,
    teacher: Any,
    settings: Settings,
    outside: float,
    flaws: str,
    finals: int,
) -> None:
    """Add the videos of ``count // 8`` optimisations by a Teacher: every third one-step prediction, and final videos.

    outside: share of the scenes out of domain. flaws: the scheme of the Reasoner's training videos. finals: number of
    few-step videos of each optimisation, which start from one z1.
    """
    for index in range(count // 8):
        family = world.FAMILIES[index % len(world.FAMILIES)]
        scene = splits.training_scene(rng, family, outside)
        while not world.flaw(scene, flaws) and rng.random() < 0.7:  # others need little optimisation
            scene = splits.training_scene(rng, family, outside)
        condition, noise = start(reasoner, scene, rng, finals)
        add_lora(reasoner.transformer, settings.rank, seed=int(rng.integers(2**31)))
        loop = Optimization(reasoner, decoder, teacher, condition, noise, right_queries(scene), settings)
        for row in loop:
            if row["step"] % 3 == 2:
                with torch.no_grad():
                    shard.add(_pixels(decoder.decode_batch(reasoner.predict_clean(condition, noise)))[0], scene)
        with torch.no_grad():
            shard.add(_pixels(decoder.decode_batch(reasoner.predict_clean(condition, noise)))[0], scene)
            for each in noise.samples():
                shard.add(_pixels(reasoner.decode(reasoner.sample(condition, each))[None])[0], scene)
        remove_lora(reasoner.transformer)


def start(reasoner: WanReasoner, scene: Scene, rng: np.random.Generator, samples: int = 1) -> tuple[Any, Any]:
    """The condition and the noise of a training scene, as in the pipeline; the noise is for `samples` videos."""
    size = {"num_frames": world.NUM_FRAMES, "height": world.SIZE, "width": world.SIZE}
    condition = reasoner.encode(world.write_prompt(scene, rng), first_frame(scene), **size)
    return condition, reasoner.noise(condition, torch.Generator().manual_seed(int(rng.integers(2**31))), samples)


def parts(run: Run) -> tuple[WanReasoner, Any]:
    """The Reasoner of stage ``distil``, with the VAE of ``vae-decoder``, and the surrogate decoder."""
    reasoner = load_reasoner(str(run.path("distil/pipeline")), torch.float32)
    assert isinstance(reasoner, WanReasoner)
    if (refined := run.path("vae_decoder/vae")).exists():
        reasoner.vae = load_network(type(reasoner.vae), refined, dtype=torch.float32).eval().requires_grad_(False)
    return reasoner, load_decoder(run.path("decoder/decoder.safetensors"), reasoner, torch.float32)


def collect(run: Run) -> None:
    """Stage ``collect``: shards of lessons and of predictions."""
    reasoner, decoder = parts(run)
    _write(run, "lessons", partial(lessons, reasoner=reasoner, decoder=decoder))
    outside = run.config["outside"]
    _write(run, "predictions", partial(predictions, reasoner=reasoner, decoder=decoder, outside=outside))


def optimise(run: Run) -> None:
    """Stage ``optimise``: shards of predictions in the course of optimisations by the Teacher in ``run.start``."""
    reasoner, decoder = parts(run)
    teacher = load_teacher(str(run.start), torch.float32)
    given: dict[str, Any] = {"teacher": teacher, "settings": Settings(**run.config["settings"])}
    given |= {name: run.config[name] for name in ("outside", "flaws", "finals")}
    _write(run, "optimised", partial(optimised, reasoner=reasoner, decoder=decoder, **given))


def _write(run: Run, kind: str, fill: Callable[[Shard, int, np.random.Generator], None]) -> None:
    """Write the shards of one kind of videos to ``run.out``; those that exist are kept."""
    make_folder(run.out)
    for index in range(run.config[kind]["shards"]):
        path = run.out / f"{kind}-{index:03d}.pt"
        if path.exists():
            continue
        shard = Shard()
        fill(shard, run.config[kind]["videos"], np.random.default_rng([run.config["seed"], index, len(kind)]))
        shard.save(path)
        right = np.mean([labeller.succeeds(f, s) for f, s in zip(shard.facts, shard.scenes, strict=True)])
        print(f"{path}: {len(shard.videos)} videos, {right:.2f} right", flush=True)
