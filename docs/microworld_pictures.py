"""Contact sheets for `docs/microworld.md`: ``python docs/microworld_pictures.py [DIR]`` writes one per family."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vlmteacher.microworld import world

SHOWN = (0, 3, 6, 12)  # frames
INSTANCES = 3
GAP, SCALE = 2, 2


def strip(frames: np.ndarray) -> np.ndarray:
    """(H, W, 3) of some frames side by side."""
    padded = np.pad(frames[list(SHOWN)], ((0, 0), (GAP, GAP), (GAP, GAP), (0, 0)), constant_values=1.0)
    return np.concatenate(list(padded), axis=1)


def sheet(family: str) -> Image.Image:
    """Rows: two instances in domain and one out of it; left the right video, right the flawed one."""
    rows = []
    for index, split in enumerate(("id", "id", "ood")):
        rng = np.random.default_rng([7, index])
        scene = world.sample_scene(rng, family, split)
        while world.flawed(scene) == scene:
            scene = world.sample_scene(rng, family, split)
        pair = [strip(world.render(s)) for s in (scene, world.flawed(scene))]
        rows.append(np.concatenate([pair[0], np.ones((pair[0].shape[0], 8, 3)), pair[1]], axis=1))
    pixels = (np.concatenate(rows) * 255).round().astype(np.uint8).repeat(SCALE, 0).repeat(SCALE, 1)
    return Image.fromarray(pixels).quantize(64, dither=Image.Dither.NONE)


def main(out: Path) -> None:
    for family in world.FAMILIES:
        path = out / f"microworld_{family}.png"
        sheet(family).save(path, optimize=True)
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
