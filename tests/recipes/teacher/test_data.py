"""Rows of training batches: where they come from, and how they are faded."""

import numpy as np
import pytest

from recipes.microworld.teacher import data
from vlmteacher.microworld import world
from vlmteacher.microworld.facts import facts_of


def test_a_batch_is_of_what_is_to_be_learnt():
    rng = np.random.default_rng(0)
    rows = []
    for family in ("move", "count"):
        for outside in (0.0, 1.0):
            _, scene, facts = data.rendered(rng, outside, [family])
            rows.append((np.zeros((world.NUM_FRAMES, world.SIZE, world.SIZE, 3), np.uint8), scene, facts))
    for families, outside, count in ((["move"], 0.0, 1), (["move", "count"], 1.0, 2), (["count"], 0.5, 2)):
        source = data.Source({"optimised": rows, "lessons": []}, families, outside)
        assert len(source.groups["optimised"]) == count
        drawn = [source.draw(rng, {"optimised": 2, "lessons": 1}, 4) for _ in range(8)]
        splits = {world.split_of(scene) for batch in drawn for _, scene, _ in batch}
        assert all(len(batch) == 4 for batch in drawn)
        assert {scene.family for batch in drawn for _, scene, _ in batch} == set(families)
        assert ("ood" in splits, splits - {"ood"} != set()) == (outside > 0, outside < 1)


@pytest.mark.parametrize("family", world.FAMILIES)
def test_a_faded_video_and_its_answers_go_to_the_right_ones(family):
    rng = np.random.default_rng(0)
    scene = world.sample_scene(rng, family)
    track = [scene.things] * world.NUM_FRAMES  # nothing happens: the goal is missed
    row = world.draw(track), scene, facts_of(scene, track)
    ends = [data.fade(row, way, rng) for way in (0.0, 0.5, 1.0)]
    frames, asked, yes = zip(*ends, strict=True)
    assert np.array_equal(frames[0], row[0]) and np.abs(frames[2] - world.render(scene)).mean() < 0.05
    assert (
        yes[0] == [float(q.answer) for q in asked[0]] and yes[0][0] == 0 and yes[1][0] == pytest.approx(0.5 * 0.5 / 0.9)
    )
    assert yes[2] == [1.0] * 4 and len({tuple(q.text for q in questions) for questions in asked}) == 1
