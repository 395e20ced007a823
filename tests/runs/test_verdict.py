"""The verdict follows the final video's answers, names what got worse, and says what to try."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run, Solve
from vlmteacher.errors import Notice
from vlmteacher.runs.verdict import Verdict


def record(before: list[float], after: list[float], **changed: Any) -> dict[str, Any]:
    """A finished run whose answers had these P(Yes); its loss weighs the goal by a half."""

    def loss(p_yes: list[float]) -> float:
        goal, *process = (-math.log(p) for p in p_yes)
        return (goal + sum(process) / len(process)) / 2

    config = {"threshold": 0.22, "check_final": False, "final_samples": 1, "max_steps": 40, "learning_rate": 1e-4}
    config |= {"seed": 7, "sampling": {"sampler": "renoise", "timesteps": [1000, 500]}}
    return {
        "prompt": "Move the red ball into the purple box.",
        "queries": {"goal": "Is it in?", "process": ["Is there one?"]},
        "p_yes_before": before,
        "p_yes_after": after,
        "loss_before": loss(before),
        "loss_after": loss(after),
        "stopped": "threshold",
        "models": {"reasoner": "packaged/reasoner"},
        "config": config,
    } | changed


@pytest.mark.parametrize(
    ("before", "after", "outcome", "worse"),
    [
        ([0.02, 0.99], [0.9, 0.9], "solved", 0),
        ([0.9, 0.9], [0.9, 0.9], "solved", 0),
        ([0.02, 0.99], [0.6, 0.8], "improved", 1),
        ([0.02, 0.95], [0.24, 0.17], "worse", 1),  # the mean has risen, but the video breaks a rule and misses the goal
        ([0.02, 0.95], [0.8, 0.45], "improved", 1),  # the goal is reached
        ([0.6, 0.9], [0.55, 0.6], "worse", 1),
        ([0.3, 0.9], [0.31, 0.88], "unchanged", 0),
        ([0.49, 0.9], [0.52, 0.88], "improved", 0),
    ],
)
def test_outcomes(before: list[float], after: list[float], outcome: str, worse: int) -> None:
    verdict = Verdict.of(record(before, after))
    assert (verdict.outcome, len(verdict.worse)) == (outcome, worse)
    assert bool(verdict.remedies) == (outcome != "solved")
    assert str(verdict).startswith(f"Verdict on the final video: {outcome}")


def test_a_high_threshold_does_not_solve_a_task_with_an_answer_of_no() -> None:
    lenient = record([0.3, 0.98], [0.99, 0.49])
    lenient["config"]["threshold"] = 2.0
    assert Verdict.of(lenient).outcome == "improved"


def test_the_remedies_fit_how_the_run_ended() -> None:
    def text(**changed: Any) -> str:
        return str(Verdict.of(record([0.02, 0.95], [0.24, 0.17], **changed)))

    assert "0.95 -> 0.17  Is there one?" in text()
    assert "--check-final" in text() and "--final-samples 5" in text() and "another --seed than 7" in text()
    assert "a lower --lr than 0.0001" in text(stopped="diverged") and "--check-final" not in text(stopped="diverged")
    assert "a higher --max-steps" in text(stopped="max_steps")
    config = record([0.1, 0.1], [0.1, 0.1])["config"]
    checked = text(config=config | {"check_final": True, "final_samples": 5})
    assert "--check-final" not in checked and "--final-samples" not in checked


def test_an_unknown_task_is_named_even_where_the_teacher_is_content() -> None:
    verdict = Verdict.of(record([0.9, 0.9], [0.95, 0.95], prompt="A cat plays piano."))
    assert verdict.outcome == "solved" and "this prompt is none of them" in verdict.remedies[0]
    other = Verdict.of(record([0.9, 0.9], [0.95, 0.95], prompt="A cat plays piano.", models={"reasoner": "a/b"}))
    assert other.remedies == []


def test_solve_ends_with_the_verdict(run: Run, solve: Solve, tmp_path: Path) -> None:
    status, out, err = run(*solve(tmp_path / "run"))
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    verdict = Verdict.of(saved)
    assert status == 0 and saved["verdict"] == verdict.to_dict()
    assert out.endswith(f"{verdict}\n") and "warning" not in err
    assert verdict.outcome in (tmp_path / "run" / "README.md").read_text()


def test_the_packaged_pair_says_what_it_knows(run: Run, tmp_path: Path) -> None:
    with pytest.warns(Notice, match="the packaged pair knows 10 kinds of tasks"):
        run("queries", "--prompt", "Move the red ball to the right.", "-o", tmp_path / "queries.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        assert run("queries", "--prompt", "Sort the discs by size, the smallest on the left.")[0] == 0
