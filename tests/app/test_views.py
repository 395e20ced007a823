"""The page's HTML: text of users stays text, weights add up, waiting runs say their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.app.test_folders import RECORD, RESULTS
from vlmteacher.app import views
from vlmteacher.app.jobs import Run
from vlmteacher.queries import QuerySet
from vlmteacher.settings import Settings

EVIL = '<img src=x onerror="alert(1)"> {{ 7 * 6 }} ${alert(1)} </script>'


def check_escaped(html: str) -> None:
    assert "<img src=x" not in html and "</script>" not in html and "&lt;img src=x" in html


def test_text_of_users_stays_text() -> None:
    config = Settings().to_dict()
    job = Run(EVIL, state="at work", folder=Path("x"), queries=QuerySet(EVIL, (EVIL + "2",)))
    job.rows = [{"loss": 1.0, "p_yes": [0.1, 0.2], "seconds": 0.5}, {"loss": 0.5, "p_yes": [0.2, 0.3], "seconds": 0.5}]
    check_escaped(views.live(job, 0, config))
    queries = {"goal": EVIL, "process": []}
    results = {"updates": 1, "seconds": {}, "queries": queries, "prompt": EVIL}
    record = {**RECORD, **RESULTS, **results, "config": {**RECORD["config"], **config, "width": 64, "height": 64}}
    check_escaped(views.ended("run", record, ["before.mp4", "after.mp4", "report.html"], EVIL))
    check_escaped(views.run_list([job], [], None, {id(job): EVIL}))
    check_escaped(views.alert(EVIL))


def test_names_of_folders_are_quoted_in_addresses() -> None:
    record = {**RECORD, **RESULTS, "updates": 1, "seconds": {}, "config": {**RECORD["config"], **Settings().to_dict()}}
    assert 'href="runs/a%20%22b/c/report.html"' in views.ended('a "b/c', record, ["report.html"])


def test_a_waiting_run_says_its_place() -> None:
    job = Run("prompt", folder=Path("x"))
    assert "2 pieces of work are before this run" in views.live(job, 2, Settings().to_dict())
    assert "1 piece of work is before yours" in views.line(job, 1)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_weights_add_up_to_one(count: int) -> None:
    shares = views.shares(count, 0.5)
    assert len(shares) == count and sum(shares) == pytest.approx(1) and shares[0] == (1 if count == 1 else 0.5)


def test_remedies_name_what_the_page_has() -> None:
    config = {**RECORD["config"], **Settings().to_dict(), "sampling": {"sampler": "renoise", "timesteps": [1, 2]}}
    for stopped in ("threshold", "max_steps", "diverged"):
        results = {**RESULTS, "loss_after": 1.0, "p_yes_after": [0.4], "stopped": stopped, "updates": 1, "seconds": {}}
        assert " --" not in views.ended("run", {**RECORD, **results, "config": config}, []), stopped
