"""The manifest equals the splits that the generators draw; splits share no scene with each other or with training."""

import json
from collections import Counter

import numpy as np

from vlmteacher.microworld import splits, world


def test_the_manifest_is_what_the_generators_draw():
    assert json.loads(splits.MANIFEST.read_text()) == splits.manifest()


def test_splits_are_large_balanced_and_disjoint():
    frozen = json.loads(splits.MANIFEST.read_text())["splits"]
    digests = [digest for split in frozen.values() for digest in split["instances"].values()]
    assert set(frozen) == {"id", "ood", "validation"} and len(set(digests)) == len(digests) == 3 * splits.COUNT
    for split in frozen.values():
        assert len(split["instances"]) >= 100
        assert len(set(Counter(name.split("/")[0] for name in split["instances"]).values())) == 1


def test_training_never_draws_what_is_tested():
    """Neither the same scene nor, out of domain, the same kind of one."""
    rng = np.random.default_rng(0)
    tested = set()
    for index in range(40):
        for split in ("id", "ood", "validation"):
            scene = world.instance(index, splits.SEED, split, world.FAMILIES)[0]
            assert world.split_of(scene) == split
            tested.add(world.digest(scene))
    drawn = [world.sample_scene(rng, family) for family in world.FAMILIES for _ in range(20)]
    assert {world.split_of(scene) for scene in drawn} == {"train"}
    assert tested.isdisjoint(world.digest(scene) for scene in drawn)


def test_the_teachers_scenes_out_of_domain_are_not_the_tests(monkeypatch):
    """In a family with few such scenes, and with those of the test left out."""
    rng = np.random.default_rng(0)
    assert len(splits.frozen()) > 100
    drawn = [
        splits.training_scene(rng, family, outside=1.0) for family in ("sort", "recolor", "count") for _ in range(20)
    ]
    assert {world.split_of(scene) for scene in drawn} == {"ood"}
    assert splits.frozen().isdisjoint(world.digest(scene) for scene in drawn)
    first = splits.training_scene(np.random.default_rng(5), "maze", outside=1.0)
    monkeypatch.setattr(splits, "frozen", lambda: frozenset([world.digest(first)]))
    assert world.digest(splits.training_scene(np.random.default_rng(5), "maze", outside=1.0)) != world.digest(first)
