"""Every family's right video does what its prompt says; splits are disjoint; the first families are as before."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest

from vlmteacher.microworld import world
from vlmteacher.microworld.families import FAMILIES

CATEGORIES = {"abstraction", "knowledge", "perception", "spatiality", "transformation"}


def scenes(count: int, family: str, split: str = "train", seed: int = 0) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng, family, split) for _ in range(count)]


@pytest.fixture(scope="module", params=world.FAMILIES)
def drawn(request) -> list[world.Scene]:
    """Scenes of a family, in domain and out of it."""
    return scenes(12, request.param) + scenes(12, request.param, "ood")


def test_move_and_maze_are_drawn_as_they_were():
    """Scene, prompt and first frame of their first instances, as the first version of the world drew them."""
    digest = hashlib.sha256()
    for index in range(30):
        scene, prompt = world.instance(index, seed=1, chosen=["move", "maze"])
        first = (world.render(scene)[0] * 255).round().astype(np.uint8)
        digest.update(f"{world.digest(scene)} {prompt}".encode() + first.tobytes())
    assert digest.hexdigest() == "e2747cd51ab1d85819eb068660432f412d5296bc0e9c46f372973c6c0407e909"


def test_ten_families_over_the_five_categories():
    assert len(FAMILIES) == 10 and {family.category for family in FAMILIES.values()} == CATEGORIES


def test_instances_are_fixed_and_families_alternate():
    first = [world.instance(k, 1, "validation") for k in range(20)]
    assert first == [world.instance(k, 1, "validation") for k in range(20)]
    assert [scene.family for scene, _ in first] == [*world.FAMILIES] * 2
    assert [world.instance(k, 1, "id", ["maze", "odd"])[0].family for k in range(4)] == ["maze", "odd"] * 2


@pytest.mark.parametrize("split", world.SPLITS)
def test_a_scene_is_in_the_split_that_it_was_drawn_for(split):
    for family in world.FAMILIES:
        assert all(world.split_of(scene) == split for scene in scenes(3, family, split))


def test_scenes_survive_json(drawn):
    for scene in drawn:
        again = world.Scene.from_json(scene.to_json())
        assert again == scene and world.digest(again) == world.digest(scene)


def test_right_videos_are_slow_and_come_to_rest(drawn):
    for scene in drawn:
        track = world.perform(scene)
        assert track[0] == scene.things
        assert all(things == track[-1] for things in track[world.ARRIVAL :])
        assert [track[-1][i] for i in scene.actors] == list(scene.goals)
        for before, after in pairwise(track):
            for a, b in zip(before, after, strict=True):
                assert np.hypot(a.x - b.x, a.y - b.y) <= 8.01
                assert abs(a.size - b.size) <= 1.0 and abs(a.angle - b.angle) <= 8.0 and abs(a.blend - b.blend) <= 0.11


def test_things_are_whole_large_and_inside(drawn):
    for scene in drawn:
        for things in world.perform(scene):
            for thing in things:
                assert thing.size >= 4 and 3.5 <= thing.x <= world.SIZE - 3.5 and 3.5 <= thing.y <= world.SIZE - 3.5


def test_balls_and_discs_never_touch_each_other(drawn):
    for scene in drawn:
        for things in world.perform(scene) if len(scene.actors) > 1 else ():
            moving = [things[i] for i in scene.actors]
            for k, a in enumerate(moving):
                assert all(np.hypot(a.x - b.x, a.y - b.y) >= a.size + b.size for b in moving[:k])


def test_the_mistake_is_another_plan_for_the_same_picture(drawn):
    for scene in drawn:
        mistake = FAMILIES[scene.family].mistaken(scene)
        assert mistake.things == scene.things
        assert (mistake.goals, mistake.ways) != (scene.goals, scene.ways)


def test_prompts_name_what_they_must(drawn):
    rng = np.random.default_rng(3)
    for scene in drawn:
        prompt = world.write_prompt(scene, rng)
        assert "{" not in prompt and all(
            name in prompt for name in FAMILIES[scene.family].names(scene).values() if name
        )


def test_goals_are_what_the_prompts_ask_for():
    for split in ("train", "ood"):
        for scene in scenes(10, "deliver", split):
            assert [scene.things[i].color for i in scene.targets] == [actor.color for actor in scene.moving]
        for scene in scenes(10, "sort", split):
            placed = sorted(scene.goals, key=lambda disc: disc.x)
            assert [disc.size for disc in placed] == sorted(disc.size for disc in placed)
        for scene in scenes(10, "odd", split):
            looks = [(box.color, box.shape) for box in scene.boxes]
            assert looks.count((scene.target.color, scene.target.shape)) == 1
            assert len(set(looks)) == 2
        for scene in scenes(10, "count", split):
            dots = sum(thing.shape == "disc" and thing not in scene.moving for thing in scene.things)
            assert sorted(scene.boxes, key=lambda box: box.x).index(scene.target) == dots - 1
        for scene in scenes(10, "connect", split):
            assert scene.waypoints[1:] == tuple(scene.things[i].at for i in scene.targets)
        for scene in scenes(10, "resize", split):
            assert scene.goals[0].size == scene.target.size - 3 and scene.target.at == scene.moving[0].at
        for scene in scenes(10, "rotate", split):
            assert scene.goals[0].angle == scene.target.angle and scene.target.at == scene.moving[0].at


def test_maze_paths_keep_off_the_blocks_and_the_straight_line_does_not():
    for scene in scenes(30, "maze") + scenes(20, "maze", "ood"):
        way = world.trajectory(scene.waypoints)
        straight = world.trajectory((scene.start, scene.waypoints[-1]))
        for block in scene.blocks:
            assert min(world.distance_to_block(p, block) for p in way) >= block.size - 1e-6
        assert any(world.distance_to_block(p, block) < world.RADIUS for block in scene.blocks for p in straight)


def test_pictures_show_the_state(drawn):
    """The topmost thing at a point has its colour there; the ground is plain."""
    for scene in drawn[:3]:
        for things, frame in zip(world.perform(scene), world.render(scene), strict=True):
            expected = np.full((world.SIZE, world.SIZE, 3), world.BACKGROUND, np.float32)
            sure = np.ones((world.SIZE, world.SIZE), bool)
            for thing in things:
                cover = world.mask(thing)
                expected[cover > 0.999] = (1 - thing.blend) * np.asarray(world.PAINTS[thing.color]) + (
                    thing.blend * np.asarray(world.PAINTS[thing.other or thing.color])
                )
                sure = (sure & (cover < 0.001)) | (cover > 0.999)
            assert sure.mean() > 0.8
            np.testing.assert_allclose(frame[sure], expected[sure], atol=2e-3)


def test_trajectory_arrives_and_rests():
    way = world.trajectory(((0, 0), (10, 0), (10, 10)))
    np.testing.assert_allclose(way[world.ARRIVAL :], [[10, 10]] * (world.NUM_FRAMES - world.ARRIVAL))
    np.testing.assert_allclose(np.hypot(*np.diff(way[: world.ARRIVAL + 1], axis=0).T), 2.0)
