"""The scorer and the labeller are held to simulator state: right videos pass, every kind of wrong one fails."""

import numpy as np
import pytest

from vlmteacher.microworld import corruptions, labeller, scorer, world
from vlmteacher.microworld.facts import answer, facts_of

RNG_SEED = 20
COUNT = 12


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    rng = np.random.default_rng(RNG_SEED)
    return [world.sample_scene(rng) for _ in range(COUNT)]


def soften(frames: np.ndarray) -> np.ndarray:
    """What a small decoder does to edges."""
    for axis in (1, 2):
        frames = 0.2 * np.roll(frames, 1, axis) + 0.6 * frames + 0.2 * np.roll(frames, -1, axis)
    return frames


def test_the_right_video_passes(scenes):
    for scene in scenes:
        verdict = scorer.score(world.render(scene), scene)
        assert verdict.success and verdict.score == 1.0
        assert scorer.score(soften(world.render(scene)), scene).success


# `ghost` and `fade_through` hold mild cases that are still right to the eye; they are not listed as violations.
@pytest.mark.parametrize("kind", [k for k in corruptions.CORRUPTIONS if k not in ("ghost", "fade_through")])
def test_every_corruption_fails(scenes, kind):
    rng = np.random.default_rng(RNG_SEED + 1)
    verdicts = [scorer.score(corruptions.render_states(corruptions.CORRUPTIONS[kind](s, rng)), s) for s in scenes]
    assert not any(v.success for v in verdicts)
    assert max(v.score for v in verdicts) <= 0.5


def test_noise_fails(scenes):
    rng = np.random.default_rng(0)
    for scene in scenes[:5]:
        assert not scorer.score(rng.random((world.NUM_FRAMES, world.SIZE, world.SIZE, 3)), scene).success


def test_other_shapes_are_refused(scenes):
    with pytest.raises(ValueError, match="expected"):
        scorer.score(np.zeros((13, 32, 32, 3)), scenes[0])


def test_labeller_agrees_with_state_on_what_it_can_see(scenes):
    rng = np.random.default_rng(RNG_SEED + 2)
    agree = total = 0
    for kind in ("vanish", "teleport", "duplicate", "wrong_target", "eroded_scenery", "wrong_color", "half_finished"):
        for scene in scenes[:8]:
            states = corruptions.CORRUPTIONS[kind](scene, rng)
            true, seen = facts_of(scene, states), labeller.label(corruptions.render_states(states), scene)
            names = {"ball": scene.ball_color, "box": scene.target_box.color}
            for question in ("goal", "one", "smooth", "avoid", "scenery"):
                agree += answer(question, true, **names) == answer(question, seen, **names)
                total += 1
    assert agree / total > 0.93


def test_labeller_passes_right_videos(scenes):
    for scene in scenes:
        assert labeller.succeeds(labeller.label(soften(world.render(scene)), scene), scene)
