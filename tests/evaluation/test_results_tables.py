"""The docs' tables are written from a table.json by one command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tools.results_tables import PAGES, ROOT, failures, full, marks, pages, short
from vlmteacher.evaluation.failures import CAUSES


def entry(success: float, against: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    compared = {"wins": 3, "losses": 1, "sign_p": 0.0004}
    split = {"success_rate": success, "score": success}
    return {
        **{"success_rate": success, "low": 0.0, "high": 1.0, "score": success, "id": split, "ood": split},
        **{"updates_mean": 2.0, "seconds_mean": 1.25, "against": dict.fromkeys(against, compared)},
        **{"failures": dict.fromkeys(CAUSES, 1), "perception": 0.1, "wrong_query": 0.2},
        **more,
    }


@pytest.fixture
def table(tmp_path: Path) -> Path:
    methods = {
        "base": entry(0.25, updates_mean=0.0),
        "pass@5": entry(0.5, ("base",), oracle={"success_rate": 0.75}, failures={}, updates_mean=0.0),
        "teacher": entry(1.0, ("base", "pass@5")),
        "goal-only": entry(0.75, ("base", "pass@5")),
        "generic": entry(0.75, ("base", "pass@5")),
    }
    content = {"benchmark": "microworld", "splits": ["id", "ood"], "methods": methods}
    (tmp_path / "table.json").write_text(json.dumps(content))
    return tmp_path / "table.json"


def test_the_tables_of_the_pages_are_replaced(table: Path, tmp_path: Path) -> None:
    for page in PAGES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    written = pages(table, tmp_path)
    readme, results = written[tmp_path / "README.md"], written[tmp_path / "docs/results/evaluation.md"]
    assert "| teacher | 1.00 [.00, 1.00] | 1.00 | 1.00 | 1.000 | 2.0 | 1.2 |\n| goal-only |" in readme
    assert (
        "| pass@5, picked by the Teacher (the scorer's choice: .75) | .50 [" in readme and "| generic |" not in readme
    )
    assert "| `teacher` | 1.00 [.00, 1.00] | 1.00 | 1.00 | 1.000 | 3, 1, <.001 | <.001 | 2.0 | 1.2 |" in results
    assert (
        "| `generic` | 5 | 1 | 1 | 1 | 1 | 1 | .10 | .20 |\n<!-- end -->" in results and "| `base` | 5 |" not in results
    )
    for page, text in written.items():
        before = page.read_text()
        assert text.count("<!--") == before.count("<!--") and text.split("\n")[0] == before.split("\n")[0]


def test_the_pages_have_tables_of_these_columns(table: Path) -> None:
    """A run of today's command fits into them."""
    methods = json.loads(table.read_text())["methods"]
    for page, tables in PAGES.items():
        for made in tables:
            begin, end = marks(made.__name__)
            present = (ROOT / page).read_text().split(begin, 1)[1].split(end, 1)[0]
            assert present.splitlines()[:2] == made(methods).splitlines()[:2]


def test_other_tables_are_refused(table: Path) -> None:
    content = json.loads(table.read_text())
    table.write_text(json.dumps(content | {"splits": ["validation"]}))
    with pytest.raises(ValueError, match="test splits"):
        pages(table)
    assert {short, full, failures} == {made for tables in PAGES.values() for made in tables}
