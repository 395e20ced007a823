"""A walked-through example of a new family: one class is all that it takes to be drawn, asked about, corrupted, scored,
exported and trained on.

In the project it would be a file in ``vlmteacher/microworld/families/`` and an entry of `FAMILIES` there. The packaged
pair must then be trained again, and says so.
"""

import json
from typing import ClassVar

import imageio_ffmpeg
import numpy as np
import pytest

from recipes.microworld.teacher.data import draw_track, task_text
from vlmteacher.errors import InputError
from vlmteacher.evaluation.microworld import run_benchmark
from vlmteacher.microworld import corruptions, labeller, scorer, world
from vlmteacher.microworld.export import export
from vlmteacher.microworld.facts import facts_of
from vlmteacher.microworld.families import FAMILIES
from vlmteacher.microworld.families.base import Family, draw_colors, halfway, leap, straight
from vlmteacher.microworld.kinds import ONE, SCENERY, SMOOTH, Kind, is_single
from vlmteacher.microworld.questions import ask, own_questions, recognise, right_queries
from vlmteacher.microworld.scene import Scene, ball, block, edited, perform, scene_of

CEILING = 8.0


def at_ceiling(facts, scene, a):
    return is_single(facts, scene, a) & (facts.position[:, a, 1] <= CEILING + 4)


def sideways(scene, rng):
    """Drifts to the side on its way up."""
    return edited(perform(scene), scene.actors[0], lambda t, thing: {"x": thing.x + t if thing.x < 32 else thing.x - t})


class Balloon(Family):
    """``balloon``: the ball rises straight to the ceiling, past a block; from further below out of domain."""

    name = "balloon"
    category = "knowledge"
    prompts = ("Let the {ball} balloon rise to the ceiling.", "The {ball} balloon rises to the ceiling.")
    paraphrases = ("Please let the {ball} balloon go{ending}.",)
    endings = ("", " upwards")
    noun = "balloon"
    verb = "rise"
    kept = "blocks"
    goal = Kind("ceiling", ("Is the {a} balloon at the ceiling at the end?",), at_ceiling, at_end=True)
    process = (ONE, SMOOTH, SCENERY)
    breaks = SMOOTH
    corruptions: ClassVar = {"sideways": sideways}
    query_weight = 2.0

    def sample(self, rng, unseen=False):
        (color,) = draw_colors(rng, 1)
        x = float(rng.choice([rng.integers(8, 20), rng.integers(46, 57)]))
        y = float(rng.integers(46, 57) if unseen else rng.integers(24, 46))
        things = [block((32.0, float(rng.integers(20, 45)))), ball(color, (x, y))]
        return scene_of(self.name, things, {1: [(x, y), (x, CEILING)]})

    def is_unseen(self, scene):
        return scene.start[1] >= 46

    def names(self, scene):
        return {"ball": scene.ball_color}

    def key_color(self, scene):
        return scene.ball_color

    def mistaken(self, scene):
        """Stops half-way."""
        return halfway(scene)

    def forbidden(self, scene):
        """In one leap."""
        return leap(scene)

    def wrong(self, scene, rng):
        """Sinks to the floor."""
        return straight(scene, (scene.start[0], world.SIZE - CEILING))

    def rules(self, scene, ways):
        """``straight``: the share of frames in which the ball is straight above its start."""
        return {"straight": float((np.abs(ways[0, :, 0] - scene.start[0]) <= 4).mean())}


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> None:
    monkeypatch.setitem(FAMILIES, "balloon", Balloon())


@pytest.fixture
def scenes() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [world.sample_scene(rng, "balloon", split) for split in world.SPLITS for _ in range(3)]


def test_it_is_generated_in_every_split():
    for split in world.SPLITS:
        scene, prompt = world.instance(3, 1, split, ["balloon"])
        assert world.split_of(scene) == split and "balloon" in prompt
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene
        assert world.render(scene).shape == (world.NUM_FRAMES, world.SIZE, world.SIZE, 3)
    world.check("id", ["balloon", "maze"])


def test_its_questions_are_in_its_words_and_answered_from_state(scenes):
    rng = np.random.default_rng(1)
    for scene in scenes:
        color = scene.ball_color
        queries = right_queries(scene)
        assert queries.goal == f"Is the {color} balloon at the ceiling at the end?"
        assert queries.process[1:] == (
            f"Does the {color} balloon rise smoothly, without jumps?",
            "Do all blocks stay as they are?",
        )
        right, wrong = (
            facts_of(scene, track) for track in (perform(scene), corruptions.corrupt("mistaken", scene, rng))
        )
        assert all(question.answer for question in own_questions(scene, right))
        assert [question.answer for question in own_questions(scene, wrong)] == [False, True, True, True]
        for question in ask(scene, wrong, rng, 8):
            again = recognise(question.text, scene, wrong)
            assert again is not None and (again.kind, again.answer) == (question.kind, question.answer)


def test_its_corruptions_fail_and_its_right_videos_pass(scenes):
    rng = np.random.default_rng(2)
    kinds = corruptions.kinds("balloon")
    assert kinds[-1] == "sideways" and "static" in kinds and not {"wall_crossing", "disguise"} & {*kinds}
    for scene in scenes:
        video = world.render(scene)
        verdict = scorer.score(video, scene)
        assert verdict.success and verdict.subscores["straight"] == 1.0
        assert labeller.succeeds(labeller.label(video, scene), scene)
        for kind in ("static", "mistaken", "wrong_target", "vanish", "eroded_scenery", "forbidden", "sideways"):
            track = corruptions.corrupt(kind, scene, rng)
            assert not scorer.score(world.draw(track), scene).success, kind
            if kind != "sideways":  # which no question asks about
                assert not labeller.succeeds(labeller.label(world.draw(track), scene), scene), kind


def test_it_is_exported(tmp_path):
    export(tmp_path, 4, 0, flaws="both", chosen=["balloon", "move"])
    folders = sorted(tmp_path.glob("balloon_task/*"))
    assert len(folders) == 2
    for folder in folders:
        description = json.loads((folder / "metadata.json").read_text())
        assert description["flaw"] == world.flaw(Scene.from_json(description["scene"]), "both")
        assert imageio_ffmpeg.count_frames_and_secs(folder / "ground_truth.mp4")[0] == world.NUM_FRAMES


def test_it_is_trained_on():
    rng = np.random.default_rng(3)
    drawn = [draw_track(rng, 0.3, ["balloon"])[0] for _ in range(40)]
    assert {world.split_of(scene) for scene in drawn} == {"train", "ood"}
    assert any(task_text(scene, rng).endswith("balloon go upwards.") for scene in drawn)


def test_a_pair_that_does_not_know_its_words_is_refused(tmp_path):
    known = r"family balloon: the Teacher does not know the words balloon, ceiling, rise, rises: train the pair again"
    with pytest.raises(InputError, match=known):
        run_benchmark("base", 1, 1, tmp_path, chosen=["balloon"])
