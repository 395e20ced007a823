"""Collected videos come back from their file."""

import numpy as np

from recipes.microworld.shards import Shard, load
from recipes.microworld.teacher import data
from vlmteacher.microworld import world
from vlmteacher.microworld.facts import facts_of


def test_collected_shard_comes_back(tmp_path):
    rng = np.random.default_rng(3)
    shard = Shard()
    scene, track = data.draw_track(rng)
    frames = world.draw(track)
    shard.add(frames, scene, facts_of(scene, track))
    shard.add(frames, scene)
    shard.save(tmp_path / "a.pt")
    (video, again, facts), (_, _, labelled) = load([tmp_path / "a.pt"])
    assert again == scene and video.shape == frames.shape
    np.testing.assert_allclose(video / 255, frames, atol=0.003)
    for name, value in vars(facts_of(scene, track)).items():
        np.testing.assert_array_equal(getattr(facts, name), value)
    for found in (facts, labelled):
        assert found.changed.shape == (world.NUM_FRAMES, 16)
        assert found.changed.any() == (not found.intact.all())
