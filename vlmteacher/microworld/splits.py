"""The frozen splits: which instances are the tests in and out of domain and the validation.

``python -m vlmteacher.microworld.splits`` writes them to ``splits.json``. What a benchmark runs on comes from the
generators (``bench microworld --family all --split NAME --seed 1``); a test holds them to the manifest.
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
    """Name of an instance of the benchmark, and the digest of its scene and prompt."""
    scene, prompt = world.instance(index, SEED, split, world.FAMILIES)
    content = json.dumps({"prompt": prompt, "scene": scene.to_json()}, sort_keys=True)
    return f"{scene.family}/{SEED}/{index:04d}", hashlib.sha256(content.encode()).hexdigest()


def manifest() -> dict[str, Any]:
    """All splits as the generators draw them, each with the digest of its instances' digests."""
    splits = {}
    for split in ("id", "ood", "validation"):
        instances = dict(digest(index, split) for index in range(COUNT))
        whole = hashlib.sha256("".join(instances.values()).encode()).hexdigest()
        splits[split] = {"sha256": whole, "instances": instances}
    return {"seed": SEED, "families": list(world.FAMILIES), "splits": splits}


@cache
def frozen() -> frozenset[str]:
    """`world.digest` of the scenes of the test out of domain, the only ones of there that no training may meet."""
    return frozenset(world.digest(world.instance(index, SEED, "ood")[0]) for index in range(COUNT))


def training_scene(rng: np.random.Generator, family: str, outside: float = 0.0) -> world.Scene:
    """A scene for the Teacher's training, of a share `outside` of them out of domain but none of the test's.

    The Reasoner never meets such; a Teacher should know more than it does.
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
