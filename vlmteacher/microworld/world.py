"""The built-in world: 64x64 videos of flat shapes, ten families of tasks, exact symbolic state.

``families/`` defines the tasks, ``scene.py`` the state and its pictures. This module draws instances and divides them
into splits that share no scene: of the scenes inside the parameters of training, a tenth (by digest) belongs to the
test in domain (``id``) and another to ``validation``; the test out of domain (``ood``) has scenes outside these
parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlmteacher.errors import InputError
from vlmteacher.microworld import families
from vlmteacher.microworld.scene import (
    ARRIVAL,
    BACKGROUND,
    BLOCK_COLOR,
    BOX_HALF,
    CELL,
    COLORS,
    FPS,
    NUM_FRAMES,
    PAINTS,
    RADIUS,
    SIZE,
    Scene,
    Thing,
    Track,
    digest_of,
    disc_mask,
    distance_to_block,
    draw,
    draw_still,
    mask,
    perform,
    trajectory,
)

__all__ = [
    "ARRIVAL",
    "BACKGROUND",
    "BLOCK_COLOR",
    "BOX_HALF",
    "CELL",
    "COLORS",
    "FAMILIES",
    "FLAWS",
    "FPS",
    "NUM_FRAMES",
    "PACKAGED_FLAWS",
    "PAINTS",
    "RADIUS",
    "SIZE",
    "SPLITS",
    "Scene",
    "Thing",
    "Track",
    "check",
    "digest",
    "disc_mask",
    "distance_to_block",
    "draw",
    "draw_still",
    "first_frame",
    "flaw",
    "instance",
    "mask",
    "perform",
    "render",
    "sample_scene",
    "split_of",
    "training_track",
    "trajectory",
    "write_prompt",
]

FAMILIES = tuple(families.FAMILIES)
FLAWS = tuple(families.FLAWS)
PACKAGED_FLAWS = families.PACKAGED_FLAWS
SPLITS = ("train", "id", "ood", "validation")


def check(split: str, chosen: Sequence[str]) -> None:
    """Raise InputError for an unknown split or family."""
    registry = tuple(families.FAMILIES)
    for kind, name, known in (("split", split, SPLITS), *(("family", name, registry) for name in chosen)):
        if name not in known:
            raise InputError(f"unknown {kind} {name!r}: choose from {', '.join(known)}")


def render(scene: Scene) -> np.ndarray:
    """Draw the right video (T, H, W, 3) of a scene, float32 RGB in [0, 1]."""
    return draw(perform(scene))


def first_frame(scene: Scene) -> Image.Image:
    """Return the scene's first frame as the image that a user would give."""
    return Image.fromarray((render(scene)[0] * 255).round().astype("uint8"))


def flaw(scene: Scene, flaws: str) -> str | None:
    """Return the flaw of a scene's training video in a scheme of `FLAWS`: ``mistaken``, ``forbidden`` or None."""
    return families.FAMILIES[scene.family].flaw(scene, flaws)


def training_track(scene: Scene, flaws: str) -> Track:
    """Return what the training video of a scene shows in a scheme of `FLAWS`: the right track, or a flawed one."""
    family, kind = families.FAMILIES[scene.family], flaw(scene, flaws)
    if kind == "forbidden":
        return family.forbidden(scene)
    return perform(family.mistaken(scene) if kind else scene)


def digest(scene: Scene) -> str:
    """Return a hash of a scene, which decides its split."""
    return digest_of(families.FAMILIES[scene.family].signature(scene))


def split_of(scene: Scene) -> str:
    """Return the only split that a scene can be in."""
    if families.FAMILIES[scene.family].is_unseen(scene):
        return "ood"
    return {0: "id", 1: "validation"}.get(int(digest(scene), 16) % 10, "train")


def sample_scene(rng: np.random.Generator, family: str | None = None, split: str = "train") -> Scene:
    """Draw a scene of `family` (by default any) from a split."""
    name = family or str(rng.choice(FAMILIES))
    while True:
        scene = families.FAMILIES[name].sample(rng, split == "ood")
        if scene is not None and split_of(scene) == split:
            return scene


def write_prompt(scene: Scene, rng: np.random.Generator) -> str:
    """Draw one of the wordings of the scene's task."""
    family = families.FAMILIES[scene.family]
    return family.prompts[int(rng.integers(len(family.prompts)))].format(**family.names(scene))


def instance(index: int, seed: int, split: str = "id", chosen: Sequence[str] = FAMILIES) -> tuple[Scene, str]:
    """Draw scene and prompt of the `index`-th instance of a split. The chosen families alternate."""
    rng = np.random.default_rng([seed, index])
    scene = sample_scene(rng, chosen[index % len(chosen)], split)
    return scene, write_prompt(scene, rng)
