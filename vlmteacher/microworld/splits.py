"""The frozen splits: the instances of the tests in and out of domain and of the validation.

``python -m vlmteacher.microworld.splits`` writes their digests to ``splits.json``. Benchmarks draw the instances anew
(``bench microworld --family all --split NAME --seed 1``); a test compares them with the manifest.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vlmteacher.microworld import world

MANIFEST = Path(__file__).with_name("splits.json")
SEED = 1
COUNT = 120  # of each split, the same number of every family


def digest(index: int, split: str) -> tuple[str, str]:
    """Return the name of an instance of the benchmark, and the digest of its scene and prompt."""
    scene, prompt = world.instance(index, SEED, split, world.FAMILIES)
    content = json.dumps({"prompt": prompt, "scene": scene.to_json()}, sort_keys=True)
    return f"{scene.family}/{SEED}/{index:04d}", hashlib.sha256(content.encode()).hexdigest()


def manifest() -> dict[str, Any]:
    """Return all splits as the generators draw them, with the digests of their instances and one of these digests."""
    splits = {}
    for split in ("id", "ood", "validation"):
        instances = dict(digest(index, split) for index in range(COUNT))
        whole = hashlib.sha256("".join(instances.values()).encode()).hexdigest()
        splits[split] = {"sha256": whole, "instances": instances}
    return {"seed": SEED, "families": list(world.FAMILIES), "splits": splits}


@cache
def frozen() -> frozenset[str]:
    """Return `world.digest` of the scenes of the test out of domain, which no training may use."""
    return frozenset(world.digest(world.instance(index, SEED, "ood")[0]) for index in range(COUNT))


def training_scene(rng: np.random.Generator, family: str, outside: float = 0.0) -> world.Scene:
    """Draw a scene for the Teacher's training; a share `outside` is out of domain, but never in the test.

    The Reasoner is trained in domain only; the Teacher should know more than the Reasoner.
    """
    if not outside or rng.random() >= outside:
        return world.sample_scene(rng, family)
    while True:
        scene = world.sample_scene(rng, family, "ood")
        if world.digest(scene) not in frozen():
            return scene


def main() -> None:
    content = json.dumps(manifest(), indent=1)
    MANIFEST.write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
