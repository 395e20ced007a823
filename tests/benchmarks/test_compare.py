from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare


def ours(path: Path, milliseconds: dict[str, float], speedup: float = 2.0) -> str:
    rows = [{"case": case, "ours_ms": ms, "speedup": speedup} for case, ms in milliseconds.items()]
    result = {"benchmark": "step", "device": "cpu", "dtype": "float32", "rows": rows, "summary": {}}
    path.write_text("a table\n" + json.dumps(result) + "\n")
    return str(path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["compare", *arguments])
    compare.main()


def test_ratios_of_two_of_our_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = ours(tmp_path / "old", {"a": 8.0, "b": 1.0, "gone": 1.0})
    new = ours(tmp_path / "new", {"b": 2.0, "a": 2.0, "fresh": 1.0}, speedup=3.0)
    run(monkeypatch, old, new, "--json")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["case"] for row in result["rows"]] == ["step: a (cpu, float32)", "step: b (cpu, float32)"]
    assert [row["ratio"] for row in result["rows"]] == [4.0, 0.5]
    assert result["summary"] == pytest.approx({"ratio": 2**0.5, "speedup_ratio": 1.5})
    assert result["only_old"] == ["step: gone (cpu, float32)"] and result["only_new"] == ["step: fresh (cpu, float32)"]


def test_pytest_benchmarks_medians(tmp_path: Path) -> None:
    def stored(name: str, seconds: float) -> str:
        stats = {"median": seconds, "mean": 10 * seconds}
        (tmp_path / name).write_text(json.dumps({"benchmarks": [{"fullname": "suite::a", "stats": stats}]}, indent=1))
        return str(tmp_path / name)

    comparison = compare.compare(compare.read(stored("old", 0.3)), compare.read(stored("new", 0.1)))
    assert comparison["rows"] == [{"case": "suite::a", "old_ms": 300.0, "new_ms": 100.0, "ratio": pytest.approx(3)}]
    assert comparison["summary"] == {"ratio": pytest.approx(3)}


@pytest.mark.parametrize("content", [None, "", "no JSON", "[1]", '{"rows": []}'])
def test_bad_files_are_named_in_one_line(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[Any]
) -> None:
    bad = tmp_path / "bad.json"
    if content is not None:
        bad.write_text(content)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, str(bad), ours(tmp_path / "new", {"a": 1.0}))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "bad.json" in err and err.count("\n") == 1


def test_other_cases_cannot_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, ours(tmp_path / "old", {"a": 1.0}), ours(tmp_path / "new", {"b": 1.0}))
