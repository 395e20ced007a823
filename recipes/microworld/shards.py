"""Files of collected videos with the facts and the scene of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from vlmteacher.files import replacing
from vlmteacher.microworld import labeller
from vlmteacher.microworld.facts import Facts
from vlmteacher.microworld.scene import Scene

FIELDS = tuple(field.name for field in fields(Facts))


class Shard:
    """Videos (N, T, H, W, 3) uint8 with their scenes and facts, as tensors and JSON in one file."""

    def __init__(self) -> None:
        self.videos: list[np.ndarray] = []
        self.facts: list[Facts] = []
        self.scenes: list[Scene] = []

    def add(self, frames: np.ndarray, scene: Scene, facts: Facts | None = None) -> None:
        """Add frames (T, H, W, 3) in [0, 1]; facts are by default those of the labeller."""
        self.videos.append((frames.clip(0, 1) * 255).round().astype(np.uint8))
        self.facts.append(facts or labeller.label(frames, scene))
        self.scenes.append(scene)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        content = {
            "videos": torch.from_numpy(np.stack(self.videos)),
            "facts": [{name: torch.from_numpy(getattr(f, name)) for name in FIELDS} for f in self.facts],
            "scenes": [s.to_json() for s in self.scenes],
        }
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)


def load(paths: list[Path]) -> list[tuple[np.ndarray, Scene, Facts]]:
    """Read shards: the video (T, H, W, 3) uint8, the scene and the facts of every row."""
    rows = []
    for path in paths:
        content = torch.load(path, weights_only=True)
        for video, scene, facts in zip(content["videos"], content["scenes"], content["facts"], strict=True):
            truth = Facts(**{name: value.numpy() for name, value in facts.items()})
            rows.append((video.numpy(), Scene.from_json(scene), truth))
    return rows


def load_kinds(folder: Path, kinds: Iterable[str]) -> dict[str, list[tuple[np.ndarray, Scene, Facts]]]:
    """Read the shards of some kinds of videos, those that the stages ``collect`` and ``optimise`` write to a folder."""
    return {kind: load(sorted(folder.glob(f"{kind}-*.pt"))) for kind in kinds}
