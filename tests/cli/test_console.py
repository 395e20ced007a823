"""--quiet, --json and --tracker of every command with long work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.progress_output import check_events, json_lines, tracked_settings
from tests.tiny_pair import QUERIES
from vlmteacher.cli import main, parser

LONG = {
    "solve --prompt x --out o": True,
    "demo": True,
    "train post --config c": True,
    "distill decoder --config c": True,
    "bench microworld --method base --out o": True,
    "microworld export --out o": False,
    "microworld measure --out o": False,
}


@pytest.mark.parametrize(("command", "tracks"), LONG.items())
def test_every_long_command_has_the_flags(command: str, tracks: bool) -> None:
    flags = ["--quiet", "--json", *(["--tracker", "wandb", "--tracker", "trackio", "--tracker-dir", "d"] * tracks)]
    arguments = parser().parse_args([*command.split(), *flags])
    assert arguments.quiet and arguments.json
    if tracks:
        assert (arguments.tracker, arguments.tracker_dir) == (["wandb", "trackio"], "d")


def test_solve_for_programs(run: Run, solve: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--json", "--tracker", "tensorboard", "--tracker-dir", str(tmp_path / "curves")]
    status, printed, err = run(*solve(out=out), *flags)
    assert status == 0
    lines = check_events(printed, "solve", "solve", 3, "step", "loss", "p_yes", "grad_norm", "guards", "memory")
    record = json.loads((out / "run.json").read_text())
    steps = [line for line in lines if line["event"] == "step"]
    assert [step["loss"] for step in steps] == [row["loss"] for row in record["steps"]]
    works = {line["work"] for line in lines if line["event"] == "begin"}
    assert "sampling the final video" in works and "writing queries" not in works  # they were given
    assert lines[-1]["out"] == str(out) and lines[-1]["verdict"] == record["verdict"]
    assert lines[-1]["p_yes_after"] == record["p_yes_after"] and "lora.safetensors" in lines[-1]["files"]
    assert "Run folder" in err and "solve: 3/3" in err and "\r" not in err
    assert tracked_settings(tmp_path / "curves")["queries.goal"] == QUERIES["goal"]


def test_quiet(run: Run, solve: Any, tmp_path: Path) -> None:
    status, printed, err = run(*solve(out=tmp_path / "run"), "--quiet")
    folder, *verdict = printed.splitlines()
    assert status == 0 and folder.startswith(f"Run folder {tmp_path / 'run'}: ") and err == ""
    assert verdict and verdict[0].startswith("Verdict on the final video: ")
    status, printed, err = run(*solve(out=tmp_path / "run"), "--quiet")
    assert (status, printed) == (2, "") and err.startswith("error: ") and err.count("\n") == 1


def test_errors_for_programs(run: Run, solve: Any, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    status, printed, err = run(*solve(out=tmp_path), "--json")
    (line,) = json_lines(printed)
    assert status == 2 and (line["event"], line["status"]) == ("error", 2)
    assert "already holds a run" in line["error"] and err == f"error: {line['error']}\n"
    status, _, err = run(*solve(out=tmp_path / "other"), "--tracker", "mlflow")
    assert status == 2 and "tracker must be tensorboard" in err and not (tmp_path / "other").exists()


def test_stdout_is_for_the_lines_alone(tmp_path: Path) -> None:
    """In a process of its own, in which something prints past Python too."""
    code = (
        "import os, sys; from vlmteacher.cli import main; from vlmteacher.microworld import export as e;"
        "before = e._write;"
        "e._write = lambda *given, **more: (os.write(1, b'from C\\n'), print('from Python'), before(*given, **more));"
        "sys.exit(main(['microworld', 'export', '--limit', '2', '--json', '--out', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    lines = json_lines(result.stdout)
    assert [line["event"] for line in lines] == ["begin", "step", "step", "end", "result"]
    assert lines[-1]["out"] == str(tmp_path / "out")
    assert result.stderr.count("from C") == 2 == result.stderr.count("from Python") and "\r" not in result.stderr
    assert "export: 0/2" in result.stderr and "2 instances in VBVR's layout" in result.stderr


def test_measure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["microworld", "measure", "--limit", "2", "--quiet", "--json", "--out", str(tmp_path / "out")]) == 0
    printed, err = capfd.readouterr()
    result = json_lines(printed)[-1]
    assert (result["command"], result["results"]) == ("measure", str(tmp_path / "out" / "results.json"))
    assert 0 <= result["score"] <= 1 and err == ""
