from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Run
from vlmteacher.pipeline import PACKAGED_PAIR

packaged = pytest.mark.skipif(not (PACKAGED_PAIR / "pair.json").exists(), reason="no packaged pair in this checkout")


@packaged
def test_demo(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/demo", "runs/demo-2"):
        status, out, err = run("demo")
        assert status == 0 and "Warning" not in err
        record = json.loads((tmp_path / folder / "run.json").read_text())
        for question in (record["queries"]["goal"], *record["queries"]["process"]):
            assert question in out
        assert "Rule scorer before: " in out and "Rule scorer after: " in out
        for name in ("before.mp4", "after.mp4", "lora.safetensors", "queries.json", "run.json"):
            assert name in out and (tmp_path / folder / name).stat().st_size > 0
        assert record["models"]["reasoner"] == "packaged/reasoner"
        assert record["predictions"][:2] == [0, 5] and record["command"] == "vlmteacher demo"
        assert 50_000 < (tmp_path / folder / "report.html").stat().st_size < 5_000_000
        assert record["loss_after"] < record["loss_before"]
    assert run("demo", "--out", "runs/demo")[0] == 2
