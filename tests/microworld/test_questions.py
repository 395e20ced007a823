"""The Teacher's questions in all families: answers follow from state, and the labeller agrees with state."""

import numpy as np
import pytest

from tests.microworld.blur import soften
from vlmteacher.microworld import corruptions, labeller, world
from vlmteacher.microworld.facts import facts_of
from vlmteacher.microworld.families import FAMILIES
from vlmteacher.microworld.questions import (
    ask,
    kinds,
    own_questions,
    recognise,
    right_queries,
)

# Kinds of questions of which one at least must be answered No for a corruption, whatever the family.
BREAKS = {
    "half_finished": {"inside", "turns", "fills", "lies", "sorted"},
    "static": {"inside", "turns", "fills", "lies", "sorted"},
    "wrong_target": {"inside", "turns", "fills", "lies", "sorted", "order"},
    "mistaken": {"inside", "turns", "fills", "lies", "sorted"},
    "eroded_scenery": {"scenery"},
}


@pytest.mark.parametrize("family", world.FAMILIES)
def test_answers_follow_from_state(family):
    rng = np.random.default_rng(5)
    for split in ("train", "train", "ood"):
        scene = world.sample_scene(rng, family, split)
        right = facts_of(scene, world.perform(scene))
        assert all(question.answer for question in own_questions(scene, right))
        assert not right.changed.any()
        asked = {question.kind for question in own_questions(scene, right)}
        for kind, broken in BREAKS.items():
            if kind in corruptions.kinds(family) and asked & broken:
                facts = facts_of(scene, corruptions.corrupt(kind, scene, rng))
                said = {question.kind for question in own_questions(scene, facts) if not question.answer}
                assert said & broken, (kind, said)


@pytest.mark.parametrize("family", world.FAMILIES)
def test_labeller_agrees_with_state(family):
    rng = np.random.default_rng(6)
    same = []
    for kind in ("static", "mistaken", "wrong_target", "vanish", "teleport", "eroded_scenery", "half_finished"):
        if kind not in corruptions.kinds(family):
            continue
        for _ in range(3):
            scene = world.sample_scene(rng, family)
            track = corruptions.corrupt(kind, scene, rng)
            labelled = labeller.label(soften(world.draw(track)), scene)
            pairs = zip(own_questions(scene, facts_of(scene, track)), own_questions(scene, labelled), strict=True)
            same += [true.answer == labelled.answer for true, labelled in pairs]
    assert np.mean(same) > 0.93
    for _ in range(3):
        scene = world.sample_scene(rng, family)
        assert labeller.succeeds(labeller.label(soften(world.render(scene)), scene), scene)


def test_half_of_the_answers_are_no():
    rng = np.random.default_rng(7)
    said = {family: [] for family in world.FAMILIES}
    said_of = set()
    for family in world.FAMILIES:
        for _ in range(30):
            scene = world.sample_scene(rng, family)
            track = corruptions.corrupt("mistaken", scene, rng) if rng.random() < 0.5 else world.perform(scene)
            asked = ask(scene, facts_of(scene, track), rng, 8)
            assert len(asked) == 8 and all("None" not in question.text for question in asked)
            said[family] += [question.answer for question in asked]
            said_of |= {question.kind for question in asked}
    assert said_of == set(kinds())
    assert all(0.35 < np.mean(answers) < 0.65 for answers in said.values()), said


def test_queries_are_few_and_single_out_what_they_name():
    rng = np.random.default_rng(8)
    texts = {family: "" for family in world.FAMILIES}
    for family in world.FAMILIES:
        for split in ("train", "ood"):
            for _ in range(12):
                queries = right_queries(world.sample_scene(rng, family, split))
                assert 1 <= len(queries.process) <= 3
                texts[family] += queries.to_json()
    assert "round" in texts["odd"] and "square" in texts["odd"]
    assert "first" in texts["count"] and "fourth" in texts["count"]


def test_written_questions_are_recognised():
    rng = np.random.default_rng(10)
    for family in world.FAMILIES:
        for _ in range(4):
            scene = world.sample_scene(rng, family)
            facts = facts_of(scene, corruptions.corrupt("mistaken", scene, rng))
            for question in ask(scene, facts, rng, 10):
                again = recognise(question.text, scene, facts)
                assert again is not None and again.text == question.text
                assert (again.kind, again.answer) == (question.kind, question.answer), question
    for text in ("Is the sky blue?", "Is the pink ball inside the red box at the end?"):
        assert recognise(text, scene, facts) is None


def test_a_question_about_what_the_scene_lacks_is_not_recognised():
    rng = np.random.default_rng(11)
    for _ in range(5):
        scene = world.sample_scene(rng, "maze")
        facts = facts_of(scene, world.perform(scene))
        for text in (
            f"Does the {scene.ball_color} bar lie in its outline at the end?",
            f"Does the {scene.ball_color} disc fill its ring at the end?",
            f"Is the {scene.ball_color} disc on the left and the {scene.target.color} disc on the right at the end?",
        ):
            assert recognise(text, scene, facts) is None


def test_no_two_families_give_one_name_to_different_kinds():
    rng = np.random.default_rng(12)
    for family in FAMILIES.values():
        assert all(kinds()[kind.name] is kind for kind in family.kinds)
        assert {kind for kind, _ in family.questions(world.sample_scene(rng, family.name))} <= {*family.kinds}
