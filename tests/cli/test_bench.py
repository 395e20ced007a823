from __future__ import annotations

from pathlib import Path

from tests.conftest import Run


def test_missing_benchmarks_and_bad_limits(run: Run, tmp_path: Path) -> None:
    for benchmark, flags, message in (
        ("vbvr", (), "needs --data DIR"),
        ("ruler", (), "needs --data DIR"),
        ("microworld", ("--judge", "o"), "--judge is not for the benchmark microworld"),
    ):
        status, _, err = run("bench", benchmark, "--method", "base", *flags, "--out", tmp_path / "a")
        assert status == 2 and message in err
    status, _, err = run("bench", "microworld", "--method", "base", "--limit", 0, "--out", tmp_path / "a")
    assert status == 2 and "--limit" in err
    assert list(tmp_path.iterdir()) == []
