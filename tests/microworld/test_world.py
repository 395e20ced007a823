import numpy as np
import pytest

from vlmteacher.microworld import world


def scenes(count: int, seed: int = 0, **kw) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng, **kw) for _ in range(count)]


def test_instances_are_fixed_held_out_and_alternate_between_families():
    first = [world.instance(k, seed=1) for k in range(20)]
    assert first == [world.instance(k, seed=1) for k in range(20)]
    assert all(scene.held_out for scene, _ in first)
    assert [scene.family for scene, _ in first] == ["move", "maze"] * 10
    assert {scene.digest() for scene, _ in first}.isdisjoint(
        scene.digest() for scene, _ in (world.instance(k, seed=2) for k in range(20))
    )


def test_training_scenes_are_never_held_out():
    assert not any(scene.held_out for scene in scenes(50))


def test_scene_survives_json():
    for scene in scenes(10):
        assert world.Scene.from_json(scene.to_json()) == scene


def test_maze_paths_keep_off_the_blocks_and_the_straight_line_does_not():
    for scene in scenes(30, family="maze"):
        half = world.CELL / 2
        way = world.trajectory(scene.waypoints)
        assert np.abs(np.diff(way, axis=0)).max() <= 8.0
        for block in scene.blocks:
            outside = np.abs(way - block).max(1) - half
            assert outside.min() >= half - 1e-6
        straight = world.trajectory((scene.start, scene.waypoints[-1]))
        assert any(np.abs(straight - block).max(1).min() < half + world.RADIUS for block in scene.blocks)


def test_render_shows_the_ball_where_the_state_says():
    scene = scenes(1)[0]
    frames = world.render(scene)
    assert frames.shape == (world.NUM_FRAMES, world.SIZE, world.SIZE, 3)
    x, y = world.trajectory(scene.waypoints)[-1]
    np.testing.assert_allclose(frames[-1, int(y), int(x)], world.COLORS[scene.ball_color], atol=1e-6)


def test_trajectory_arrives_and_rests():
    way = world.trajectory(((0, 0), (10, 0), (10, 10)))
    np.testing.assert_allclose(way[world.ARRIVAL :], [[10, 10]] * (world.NUM_FRAMES - world.ARRIVAL))
    np.testing.assert_allclose(np.hypot(*np.diff(way[: world.ARRIVAL + 1], axis=0).T), 2.0)


@pytest.mark.parametrize("family", world.FAMILIES)
def test_prompts_name_ball_and_box(family):
    rng = np.random.default_rng(3)
    for scene in scenes(5, family=family):
        prompt = world.write_prompt(scene, rng)
        assert f"{scene.ball_color} ball" in prompt and f"{scene.target_box.color} box" in prompt
