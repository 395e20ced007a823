"""The flaws of training videos: one of them misses the goal, the other reaches it and breaks one rule on the way."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from recipes.microworld import clips
from tests.microworld.blur import soften
from vlmteacher.microworld import labeller, scorer, world
from vlmteacher.microworld.facts import Facts, facts_of
from vlmteacher.microworld.families import FAMILIES
from vlmteacher.microworld.questions import own_questions
from vlmteacher.pipeline import PACKAGED_PAIR
from vlmteacher.reasoners.loading import load_reasoner

COUNT = 12  # scenes of each family, half of them out of domain


@pytest.fixture(scope="module", params=world.FAMILIES)
def drawn(request) -> list[world.Scene]:
    rng = np.random.default_rng(31)
    return [world.sample_scene(rng, request.param, ("train", "ood")[k % 2]) for k in range(COUNT)]


def broken(frames: np.ndarray, scene: world.Scene) -> set[str]:
    return {name for name, value in scorer.score(frames, scene).subscores.items() if value < 1}


def denied(scene: world.Scene, facts: Facts) -> set[str]:
    return {question.kind for question in own_questions(scene, facts) if not question.answer}


def test_the_forbidden_way_reaches_the_goal_and_breaks_its_rule_alone(drawn):
    """By the scorer and by the questions' truths. Changed scenery of a solid colour also makes the picture unclean."""
    for scene in drawn:
        family = FAMILIES[scene.family]
        track = family.forbidden(scene)
        assert track == family.forbidden(scene) and np.array_equal(world.draw(track)[0], world.render(scene)[0])
        entailed = {"clean"} if family.breaks.name == "scenery" else set()
        for frames in (world.draw(track), soften(world.draw(track))):
            assert broken(frames, scene) - entailed == {family.breaks.subscore}
        assert denied(scene, facts_of(scene, track)) == {family.breaks.name}


def test_the_labeller_sees_the_forbidden_way(drawn):
    """It always denies the rule. Where a shape fades or a copy passes, it may also miss an actor in some colours."""
    seen = []
    for scene in drawn:
        track = FAMILIES[scene.family].forbidden(scene)
        seen.append(denied(scene, labeller.label(soften(world.draw(track)), scene)))
    rule = FAMILIES[drawn[0].family].breaks.name
    assert all(rule in kinds for kinds in seen)
    assert sum(kinds == {rule} for kinds in seen) >= 0.75 * COUNT


@pytest.mark.slow
def test_the_forbidden_way_is_seen_through_the_packaged_vae():
    reasoner = load_reasoner(str(PACKAGED_PAIR / "reasoner"), torch.float32)
    rng = np.random.default_rng(32)
    for name, family in FAMILIES.items():
        for _ in range(2):
            scene = world.sample_scene(rng, name)
            video = (world.draw(family.forbidden(scene)) * 255).round().astype(np.uint8)
            with torch.no_grad():
                frames = reasoner.decode(reasoner.encode_video(video)).permute(0, 2, 3, 1).float().numpy()
            rules = broken(frames, scene)
            assert family.breaks.subscore in rules and "goal" not in rules, name


def test_the_mistake_misses_the_goal(drawn):
    for scene in drawn:
        track = world.perform(FAMILIES[scene.family].mistaken(scene))
        # To the scorer, a shape of another colour is no whole one.
        assert ("one" if scene.family == "recolor" else "goal") in broken(world.draw(track), scene)
        assert FAMILIES[scene.family].goal.name in denied(scene, facts_of(scene, track))


@pytest.mark.parametrize("family", world.FAMILIES)
def test_every_key_colour_has_its_flaw(family):
    """Of six colours two are right in the scheme of both kinds, two miss the goal, and two take the forbidden way."""
    rng, kinds = np.random.default_rng(33), {}
    while len(kinds) < len(world.COLORS):
        scene = world.sample_scene(rng, family)
        kinds[FAMILIES[family].key_color(scene)] = [world.flaw(scene, flaws) for flaws in ("single", "both")]
        shown = world.training_track(scene, "both")
        made = {
            None: world.perform(scene),
            "mistaken": world.perform(FAMILIES[family].mistaken(scene)),
            "forbidden": FAMILIES[family].forbidden(scene),
        }
        assert shown == made[world.flaw(scene, "both")]
    single, both = (Counter(column) for column in zip(*kinds.values(), strict=True))
    assert both == {None: 2, "mistaken": 2, "forbidden": 2}
    assert single == {None: 3, "forbidden" if family == "maze" else "mistaken": 3}


def test_every_kind_of_rule_is_broken_somewhere():
    assert {family.breaks.name for family in FAMILIES.values()} == {
        "smooth", "avoid", "one", "scenery", "shorter", "order",
    }  # fmt: skip
    assert all(family.breaks in family.process for family in FAMILIES.values())


def test_clips_show_both_flaws(monkeypatch):
    shown, track = Counter(), world.training_track

    def counted(scene: world.Scene, flaws: str) -> world.Track:
        shown[world.flaw(scene, flaws)] += 1
        return track(scene, flaws)

    monkeypatch.setattr(world, "training_track", counted)
    rng = np.random.default_rng(34)
    for _ in range(100):
        assert clips.random_clip(rng, 5, "both").shape == (5, world.SIZE, world.SIZE, 3)
    assert {*shown} == {None, "mistaken", "forbidden"}
