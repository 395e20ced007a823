"""What the README and examples/ show runs as it stands there, in an empty directory."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

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


def test_the_guide_s_family_makes_the_pair_s_video() -> None:
    """The Reasoner that docs/guides/write_a_family.md writes out is the packaged one, without its fused blocks."""
    block = re.search(r"^```python\n(.*?)^```", (ROOT / "docs/guides/write_a_family.md").read_text(), re.M | re.S)
    assert block
    names: dict[str, Any] = {}
    exec(block[1], names)
    generator = torch.Generator().manual_seed(names["seed"])
    options = {**names["keywords"], "fused_lora": False, "final_samples": 1}
    out = names["packaged"](names["prompt"], names["image"], generator=generator, **options)
    losses = [[row["loss"] for row in each.history] for each in (out, names["out"])]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    video, own = (np.stack([np.asarray(frame, float) for frame in each.frames]) for each in (out, names["out"]))
    assert abs(video - own).max() <= 2


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "examples/quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # the file holds no results of a machine
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (shown,) = next(cell.outputs for cell in notebook.cells if cell.source.startswith("out = pipe("))
    assert "TeacherPipelineOutput(" in shown.data["text/plain"]
    html = shown.data["text/html"]
    assert html.count("<video") == 2 and "data:video/mp4;base64," in html and out_of_html(html) == []
    assert (tmp_path / "runs/notebook/run.json").is_file()


def out_of_html(html: str) -> list[str]:
    """The addresses that a page would load from outside."""
    return re.findall(r"(?:src|href)=[\"']?(?!data:)([^\s\"'>]+)", html)


@pytest.mark.slow
def test_the_custom_reward_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/custom_reward.py"), "--steps", "2", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^still_corners: [\d.]+ -> [\d.]+$", done.stdout, re.MULTILINE) and "objective: " in done.stdout
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["config"]["rewards"] == {"still_corners": 2.0, "temporal_smoothness": 0.1}


@pytest.mark.slow
def test_the_real_model_s_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All that runs without its weights: the arguments, and the plan of a step."""
    flags = ["--prompt", "x", "--num-frames", "5", "--height", "64", "--width", "64", "--plan-only"]
    monkeypatch.setattr(sys, "argv", ["real_model.py", *flags])
    runpy.run_path(str(ROOT / "examples/real_model.py"), run_name="__main__")
    assert "It fits in 80 GB" in capsys.readouterr().out
