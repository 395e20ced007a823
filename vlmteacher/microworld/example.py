"""The packaged example: one task of the microworld that the packaged pair of models solves."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vlmteacher.files import read_json
from vlmteacher.microworld.world import Scene, first_frame

PAIR = Path(__file__).parent / "models" / "pair.json"


class Example(NamedTuple):
    """A task: its prompt, its first frame (RGB, 64x64 pixels), the seed of its noise, and the scene for the scorer."""

    prompt: str
    image: Image.Image
    seed: int
    scene: Scene


def packaged_example() -> Example:
    """The example that pair.json of the packaged pair names; `vlmteacher demo` solves it."""
    example = read_json(PAIR, "file")["example"]
    scene = Scene.from_json(example["scene"])
    return Example(example["prompt"], first_frame(scene), example["seed"], scene)
