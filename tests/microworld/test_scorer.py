"""The scorer agrees with simulator state: right videos pass, every corruption fails."""

import numpy as np
import pytest
import torch

from tests.microworld.blur import soften
from vlmteacher.evaluation.microworld import right_latents
from vlmteacher.microworld import corruptions, scorer, world
from vlmteacher.pipeline import PACKAGED_PAIR
from vlmteacher.reasoners.loading import load_reasoner

COUNT = 16  # scenes of each family, half of them out of domain

# `ghost` and `fade_through` hold mild cases that are still right to the eye; they are not listed as violations.
CELLS = [(f, k) for f in world.FAMILIES for k in corruptions.kinds(f) if k not in ("ghost", "fade_through")]


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[world.Scene]]:
    rng = np.random.default_rng(20)
    return {
        family: [world.sample_scene(rng, family, ("id", "ood")[k % 2]) for k in range(COUNT)]
        for family in world.FAMILIES
    }


@pytest.mark.parametrize("family", world.FAMILIES)
def test_the_right_video_passes(scenes, family):
    for scene in scenes[family]:
        right = world.render(scene)
        for frames in (right, soften(right)):
            verdict = scorer.score(frames, scene)
            assert verdict.success and verdict.score == 1.0


@pytest.mark.slow
def test_right_videos_pass_after_the_packaged_vae(scenes):
    reasoner = load_reasoner(str(PACKAGED_PAIR / "reasoner"))
    passed = dict.fromkeys(world.FAMILIES, 0)
    for scene in (scene for family in world.FAMILIES for scene in scenes[family][:3]):
        with torch.no_grad():
            frames = reasoner.decode(right_latents(reasoner, scene)).permute(0, 2, 3, 1).float().numpy()
        passed[scene.family] += scorer.score(frames, scene).success
    assert passed == dict.fromkeys(world.FAMILIES, 3)


@pytest.mark.parametrize(("family", "kind"), CELLS)
def test_every_corruption_fails(scenes, family, kind):
    rng = np.random.default_rng(21)
    tracks = [corruptions.corrupt(kind, scene, rng) for scene in scenes[family]]
    verdicts = [scorer.score(world.draw(t), scene) for t, scene in zip(tracks, scenes[family], strict=True)]
    passed = [verdict for verdict in verdicts if verdict.success]
    assert len(passed) <= (kind == "duplicate")  # the second one may stand half behind other things
    assert max(verdict.score for verdict in verdicts if not verdict.success) <= 0.5


@pytest.mark.parametrize("family", world.FAMILIES)
def test_noise_and_other_tasks_videos_fail(scenes, family):
    rng = np.random.default_rng(0)
    scene = scenes[family][0]
    assert not scorer.score(rng.random((world.NUM_FRAMES, world.SIZE, world.SIZE, 3)), scene).success
    noisy = world.render(scene) + rng.normal(0, 0.4, (world.NUM_FRAMES, world.SIZE, world.SIZE, 3))
    assert not scorer.score(noisy.clip(0, 1), scene).success
    for others in scenes.values():
        if others[0].family != family:
            assert not scorer.score(world.render(others[0]), scene).success


def test_regions_are_connected_components():
    """Against flood filling, on masks of every density."""
    rng = np.random.default_rng(1)
    pixels = rng.random((6, 17, 23)) < np.linspace(0.1, 0.9, 6)[:, None, None]
    frame, area, centre, spread = scorer._regions(pixels)
    got = sorted(zip(frame.tolist(), area.tolist(), centre.round(6).tolist(), spread.tolist(), strict=True))
    expected = []
    for t, mask in enumerate(pixels):
        left = mask.copy()
        for seed in np.argwhere(mask):
            stack, cells = [tuple(seed)], []
            while stack:
                y, x = stack.pop()
                if 0 <= y < 17 and 0 <= x < 23 and left[y, x]:
                    left[y, x] = False
                    cells.append((y, x))
                    stack += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            if cells:
                y, x = np.asarray(cells).T
                middle = [round(float(x.mean() + 0.5), 6), round(float(y.mean() + 0.5), 6)]
                expected.append((t, len(cells), middle, max(np.ptp(x), np.ptp(y)) + 1))
    assert got == sorted(expected)


def test_other_shapes_are_refused(scenes):
    with pytest.raises(ValueError, match="expected"):
        scorer.score(np.zeros((13, 32, 32, 3)), scenes["move"][0])
