"""What the README and examples/ show runs as it stands there, in an empty directory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vlmteacher.media import read_clip

ROOT = Path(__file__).parents[1]


def test_the_readme_s_quickstart_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    block = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert block
    exec(block[1], {})
    record = json.loads((tmp_path / "runs/first/run.json").read_text())
    assert record["loss_after"] < record["loss_before"]
    assert read_clip(tmp_path / "after.mp4", 13).shape == (13, 64, 64, 3)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("TeacherPipelineOutput(")]
    assert len(shown) == 1 and "13 frames of 64x64" in shown[0] and len(shown[0]) < 300
