"""`vlmteacher report`: the statistics of the page, what it takes, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.evaluation.sweeps import sweep, sweeps
from vlmteacher.errors import InputError
from vlmteacher.evaluation.gallery import report


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweeps(tmp_path_factory.mktemp("deep") / "table")


def plain(page: str) -> str:
    """The text of a page."""
    return " ".join(re.sub(r"<[^>]*>", " ", page.partition("</style>")[2]).split())


def test_the_page_has_table_matrix_and_every_instance(run: Run, table: Path, tmp_path: Path) -> None:
    status, out, _ = run("report", table, "-o", tmp_path / "page.html")
    assert status == 0 and "page.html (0.1 MB)" in out
    page = (tmp_path / "page.html").read_text()
    text = plain(page)
    assert "5 instances, 2 methods" in text
    assert re.search(r"base 0\.40 0\.00.0\.80 0\.50 .* 0\.0 1\.5 1\.0 2\.0 5 teacher 0\.60", text)
    assert "teacher 2 : 1 p 1" in text and "base 1 : 2 p 1" in text
    best, worst = re.findall(r"Task &lt;b&gt;(\d)&lt;/b&gt; &amp; more \w+ ([+-][\d.]+)", text)[::5]
    assert best == ("1", "+0.70") and worst == ("3", "-0.50")
    assert page.count("data:video/mp4") == 10 and page.count("data:image/webp") == 5
    assert page.count('data-outcome="gained"') == 2 and page.count('data-outcome="lost"') == 1
    assert "<b>1</b>" not in page and page.count("<script") == 1


def test_scores_alone_and_missing_videos(tmp_path: Path) -> None:
    sweep(tmp_path / "base", "base", [None, None], [0.2, 0.6])
    ours = sweep(tmp_path / "teacher", "teacher", [None, None], [0.5, 0.5])
    (ours / "videos/teacher/id/move/00000.mp4").unlink()
    page = report([tmp_path])
    text = plain(page)
    assert "Differences of the score" in text and "+0.100" in text and "no video" in text
    assert page.count('data-outcome="gained"') == page.count('data-outcome="lost"') == 1


def test_a_video_outside_of_its_folder_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    for index, name in enumerate(("../secret.mp4", str(tmp_path / "secret.mp4"))):
        page = report([sweep(tmp_path / str(index), "base", [True], [1.0], video=name)])
        assert "no video" in plain(page) and "data:video" not in page


def bad_folders(tmp_path: Path) -> dict[str, tuple[list[Path], str]]:
    (tmp_path / "empty").mkdir()
    one, again = (sweep(tmp_path / name, "base", [True], [1.0]) for name in ("one", "again"))
    other = sweep(tmp_path / "other", "teacher", [True], [1.0])
    content = json.loads((other / "results.json").read_text())
    (other / "results.json").write_text(json.dumps(content | {"benchmark": "vbvr"}))
    old = sweep(tmp_path / "old", "base", [True], [1.0])
    (old / "results.json").write_text('{"benchmark": "microworld", "method": "base", "instances": [{"id": 3}]}')
    broken = sweep(tmp_path / "broken", "base", [True], [1.0])
    (broken / "results.json").write_text("{")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("[]")
    return {
        "no folder": ([tmp_path / "none"], "is no folder"),
        "nothing in it": ([tmp_path / "empty"], "neither a run.json nor a results.json"),
        "twice": ([one, again], "was given before"),
        "two benchmarks": ([one, other], "microworld and vbvr"),
        "another version": ([old], "not of this version"),
        "no JSON": ([broken], "not JSON"),
        "no run": ([tmp_path / "run"], "not the record of a run"),
    }


def test_bad_folders_are_refused_in_one_line(run: Run, tmp_path: Path, subtests: Any) -> None:
    for name, (folders, message) in bad_folders(tmp_path).items():
        with subtests.test(name):
            status, _, err = run("report", *folders, "-o", tmp_path / "page.html")
            assert status == 2 and message in err and err.count("\n") == 1
            assert not (tmp_path / "page.html").exists()
    status, _, err = run("report", tmp_path / "one", "-o", tmp_path / "none" / "page.html")
    assert status == 2 and "does not exist" in err


def test_a_tree_of_results_is_searched(table: Path) -> None:
    assert "5 instances, 2 methods" in plain(report([table.parent]))
    with pytest.raises(InputError, match="was given before"):
        report([table, table])
