"""Causes of failures, on rows with a known cause."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vlmteacher.evaluation.failures import CAUSES, cause, explain, judgements
from vlmteacher.microworld import scorer, world
from vlmteacher.microworld.facts import facts_of
from vlmteacher.microworld.questions import right_queries, truths
from vlmteacher.microworld.scene import Scene, Track
from vlmteacher.queries import QuerySet


@pytest.fixture(scope="module")
def scene() -> Scene:
    return world.sample_scene(np.random.default_rng(9), "move")


def vanishes(scene: Scene) -> Track:
    """The right video, but for three frames without the ball."""
    (ball,) = scene.actors
    return [
        tuple(replace(x, alpha=0.0) if i == ball and 4 <= t < 7 else x for i, x in enumerate(things))
        for t, things in enumerate(world.perform(scene))
    ]


def row(
    scene: Scene, track: Track, said: list[bool] | None = None, queries: QuerySet | None = None, **more: Any
) -> dict[str, Any]:
    """A row of results.json; the Teacher answers `said`, by default the truth."""
    true = truths(scene, facts_of(scene, track), queries or right_queries(scene))
    verdict = scorer.score(world.draw(track), scene)
    said = said or [bool(answer) for _, answer in true]
    p_yes = [0.9 if yes else 0.2 for yes in said]
    return {"success": verdict.success, "subscores": verdict.subscores, "truths": true, "p_yes": p_yes, **more}


def test_a_cause_for_every_failure(scene: Scene) -> None:
    right, wrong = world.perform(scene), vanishes(scene)
    assert cause(row(scene, right)) is None
    assert cause(row(scene, right, [False] * 4)) is None  # a success is one, whatever the Teacher thinks of it
    assert row(scene, wrong)["truths"] == [("goal", True), ("one", False), ("smooth", False), ("scenery", True)]
    assert cause(row(scene, wrong)) == "updates"
    assert cause(row(scene, wrong, stopped="max_steps")) == "updates"
    steps = [{"p_yes": [0.1, 0.9, 0.9, 0.9]}, {"p_yes": [0.9, 0.6, 0.9, 0.9]}]
    assert cause(row(scene, wrong, stopped="threshold", steps=steps)) == "few_steps"
    assert cause(row(scene, wrong, stopped="threshold", steps=steps[:1])) == "threshold"
    assert cause(row(scene, wrong, [True] * 4, stopped="threshold", steps=steps)) == "perception"
    about_the_end = QuerySet(right_queries(scene).goal)
    assert cause(row(scene, wrong, queries=about_the_end)) == "query"
    assert cause(row(scene, wrong, [True], QuerySet("Does the pink ball end up in the sky?"))) == "query"


def test_judgements_tell_perception_from_wrong_queries(scene: Scene) -> None:
    def shares(one: dict[str, Any]) -> tuple[int, float, float]:
        rates = explain([one])
        return rates["judgements"], rates["perception"], rates["wrong_query"]

    right, wrong = world.perform(scene), vanishes(scene)
    assert shares(row(scene, right)) == shares(row(scene, wrong)) == (4, 0, 0)
    assert shares(row(scene, wrong, [True, True, False, True])) == (4, 0.25, 0)  # taken for one all the time
    sky = QuerySet("Does the pink ball end up in the sky?")  # none of the world's: no video makes it true
    assert shares(row(scene, wrong, queries=sky)) == (1, 0, 1)

    deliver = world.sample_scene(np.random.default_rng(3), "deliver")
    track = world.perform(deliver)
    said = [True, False, True, True]  # two balls, both about the scorer's goal, and one of each
    assert judgements(row(deliver, track, said)) == [(False, True, True), (True, True, True)]


def test_incomplete_rows_are_left_out(scene: Scene) -> None:
    complete = row(scene, vanishes(scene), stopped="max_steps")
    silent = {name: value for name, value in complete.items() if name != "truths"}
    assert explain([silent]) == {}
    assert explain([complete, silent]) == explain([complete])
    assert explain([complete, complete])["failures"] == {name: 2 * (name == "updates") for name in CAUSES}
