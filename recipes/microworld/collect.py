"""Stage ``collect``: what the Teacher will be shown, in pixels, with facts.

Three kinds of videos, all of training scenes: lessons with simulator state sent through VAE and surrogate decoder; the
Reasoner's one-step predictions and few-step videos; and predictions in the course of optimisation by an earlier Teacher
(hard negatives). The last two are labelled by ``labeller.py``.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmteacher.checkpoints.pretrained import load_network
from vlmteacher.files import make_folder, replacing
from vlmteacher.microworld import labeller, splits, world
from vlmteacher.microworld.facts import Facts, facts_of
from vlmteacher.microworld.questions import right_queries
from vlmteacher.microworld.scene import Scene
from vlmteacher.optimization.loop import Optimization
from vlmteacher.reasoners.wan import WanReasoner
from vlmteacher.settings import Settings

FIELDS = tuple(field.name for field in fields(Facts))


class Shard:
    """Videos as (N, T, H, W, 3) uint8, facts and scenes of each: plain tensors and JSON in one file."""

    def __init__(self) -> None:
        self.videos: list[np.ndarray] = []
        self.facts: list[Facts] = []
        self.scenes: list[Scene] = []

    def add(self, frames: np.ndarray, scene: Scene, facts: Facts | None = None) -> None:
        """frames (T, H, W, 3) in [0, 1]; without facts the labeller finds them."""
        self.videos.append((frames.clip(0, 1) * 255).round().astype(np.uint8))
        self.facts.append(facts or labeller.label(frames, scene))
        self.scenes.append(scene)

    def save(self, path: Path) -> None:
        content = {
            "videos": torch.from_numpy(np.stack(self.videos)),
            "facts": [{name: torch.from_numpy(getattr(f, name)) for name in FIELDS} for f in self.facts],
            "scenes": [s.to_json() for s in self.scenes],
        }
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)


def load(paths: list[Path]) -> list[tuple[np.ndarray, Scene, Facts]]:
    """(video uint8 (T, H, W, 3), scene, facts) of every row of `paths`."""
    rows = []
    for path in paths:
        content = torch.load(path, weights_only=True)
        for video, scene, facts in zip(content["videos"], content["scenes"], content["facts"], strict=True):
            truth = Facts(**{name: value.numpy() for name, value in facts.items()})
            rows.append((video.numpy(), Scene.from_json(scene), truth))
    return rows


def _pixels(frames: Tensor) -> np.ndarray:
    """(B, F, 3, H, W) in [0, 1] -> (B, F, H, W, 3)."""
    return frames.detach().float().permute(0, 1, 3, 4, 2).numpy()


@torch.no_grad()
def lessons(shard: Shard, count: int, rng: np.random.Generator, reasoner: WanReasoner, decoder: Any) -> None:
    """Rendered videos of every kind, sent through the VAE's encoder and the surrogate decoder."""
    from recipes.microworld.teacher.lesson import draw_track

    for _ in range(count // 8):
        drawn = [draw_track(rng) for _ in range(8)]
        z = reasoner.encode_video(255 * np.stack([world.draw(track) for _, track in drawn]))
        for frames, (scene, track) in zip(_pixels(decoder.decode_batch(z)), drawn, strict=True):
            shard.add(frames, scene, facts_of(scene, track))


@torch.no_grad()
def predictions(shard: Shard, count: int, rng: np.random.Generator, reasoner: WanReasoner, decoder: Any) -> None:
    """The Reasoner's one-step predictions (through the surrogate) and few-step videos (through both decoders)."""
    for index in range(count):
        scene = world.sample_scene(rng, world.FAMILIES[index % len(world.FAMILIES)])
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
    outside: float = 0.0,
) -> None:
    """Predictions while a Teacher optimises: the one-step prediction every third step, and the final video.

    outside: the share of scenes out of domain.
    """
    from vlmteacher.lora.adapter import add_lora, remove_lora

    for index in range(count // 8):
        family = world.FAMILIES[index % len(world.FAMILIES)]
        scene = splits.training_scene(rng, family, outside)
        while world.flawed(scene) == scene and rng.random() < 0.7:  # elsewhere there is little to optimise
            scene = splits.training_scene(rng, family, outside)
        condition, noise = start(reasoner, scene, rng)
        add_lora(reasoner.transformer, settings.rank, seed=int(rng.integers(2**31)))
        loop = Optimization(reasoner, decoder, teacher, condition, noise, right_queries(scene), settings)
        for row in loop:
            if row["step"] % 3 == 2:
                with torch.no_grad():
                    shard.add(_pixels(decoder.decode_batch(reasoner.predict_clean(condition, noise)))[0], scene)
        with torch.no_grad():
            shard.add(_pixels(decoder.decode_batch(reasoner.predict_clean(condition, noise)))[0], scene)
            shard.add(_pixels(reasoner.decode(reasoner.sample(condition, noise))[None])[0], scene)
        remove_lora(reasoner.transformer)


def start(reasoner: WanReasoner, scene: Scene, rng: np.random.Generator) -> tuple[Any, Any]:
    """Condition and noise of a training scene, as the pipeline makes them."""
    from vlmteacher.evaluation.microworld import first_frame

    size = {"num_frames": world.NUM_FRAMES, "height": world.SIZE, "width": world.SIZE}
    condition = reasoner.encode(world.write_prompt(scene, rng), first_frame(scene), **size)
    return condition, reasoner.noise(condition, torch.Generator().manual_seed(int(rng.integers(2**31))))


def parts(trained: Path) -> tuple[WanReasoner, Any]:
    """The Reasoner of stage ``distil``, with the VAE of ``vae-decoder``, and the surrogate decoder."""
    from vlmteacher.decoders.taehv import load_decoder
    from vlmteacher.reasoners import load_reasoner

    reasoner = load_reasoner(str(trained / "distil/pipeline"), torch.float32)
    assert isinstance(reasoner, WanReasoner)
    if (trained / "vae_decoder/vae").exists():
        reasoner.vae = (
            load_network(type(reasoner.vae), trained / "vae_decoder/vae", dtype=torch.float32)
            .eval()
            .requires_grad_(False)
        )
    return reasoner, load_decoder(trained / "decoder/decoder.safetensors", reasoner, torch.float32)


def main(out: Path, optimise: bool) -> None:
    """Write the shards of stage ``collect`` (or of ``optimise``) to ``out/collect``; those that are there are kept."""
    from recipes.microworld.training import load_config
    from vlmteacher.teachers import load_teacher

    config = load_config("collect")
    reasoner, decoder = parts(out)
    make_folder(out / "collect")
    if optimise:
        teacher = load_teacher(str(out / "finetune/teacher"), torch.float32)
        settings = Settings(**config["settings"])
    for kind in ("optimised",) if optimise else ("lessons", "predictions"):
        for index in range(config[kind]["shards"]):
            path = out / "collect" / f"{kind}-{index:03d}.pt"
            if path.exists():
                continue
            rng = np.random.default_rng([config["seed"], index, len(kind)])
            shard, count = Shard(), config[kind]["videos"]
            if kind == "lessons":
                lessons(shard, count, rng, reasoner, decoder)
            elif kind == "predictions":
                predictions(shard, count, rng, reasoner, decoder)
            else:
                optimised(shard, count, rng, reasoner, decoder, teacher, settings, config["outside"])
            shard.save(path)
            right = np.mean([labeller.succeeds(f, s) for f, s in zip(shard.facts, shard.scenes, strict=True)])
            print(f"{path}: {len(shard.videos)} videos, {right:.2f} right", flush=True)
