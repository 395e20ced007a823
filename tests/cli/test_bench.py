from __future__ import annotations

from pathlib import Path

from tests.conftest import Run


def test_bench_of_what_is_not_there(run: Run, tmp_path: Path) -> None:
    for benchmark in ("vbvr", "ruler"):
        status, _, err = run("bench", benchmark, "--method", "base", "--out", tmp_path / "a")
        assert status == 2 and "not there yet" in err
    status, _, err = run("bench", "microworld", "--method", "base", "--limit", 0, "--out", tmp_path / "a")
    assert status == 2 and "--limit" in err
    assert list(tmp_path.iterdir()) == []
