from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import Run
from tests.tiny_pair import PROMPT
from vlmteacher.pipeline import PACKAGED_PAIR

packaged = pytest.mark.skipif(not (PACKAGED_PAIR / "pair.json").exists(), reason="no packaged pair in this checkout")


def test_queries(run: Run, models: dict[str, str], tmp_path: Path) -> None:
    """A random Teacher writes no queries: it says so, and leaves no file."""
    out = tmp_path / "queries.json"
    status, _, err = run("queries", "--prompt", PROMPT, "--teacher", models["teacher"], "-o", out)
    assert status == 2 and "no usable queries" in err and err.count("\n") == 1 and not out.exists()
    status, _, err = run("queries", "--prompt", " ", "--teacher", models["teacher"], "-o", out)
    assert status == 2 and "empty" in err


def test_bad_arguments_of_queries(
    run: Run, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: Any
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text.png").write_text("no image")
    before = sorted(tmp_path.rglob("*"))
    cases: dict[str, tuple[list[object], str]] = {
        "no prompt": ([], "--prompt"),
        "empty prompt": (["--prompt", " "], "--prompt is empty"),
        "prompt of half a character": (["--prompt", "move \udcff"], r"argument prompt holds a byte or half a char"),
        "teacher of half a character": (["--prompt", PROMPT, "--teacher", "a\udcff"], "argument teacher holds"),
        "NUL in a path": (["--prompt", PROMPT, "--image", "a\0b"], "argument image holds a NUL"),
        "output in no directory": (["--prompt", PROMPT, "-o", tmp_path / "none" / "q.json"], "does not exist"),
        "output is a directory": (["--prompt", PROMPT, "-o", tmp_path], "is a directory"),
        "missing image": (["--prompt", PROMPT, "--image", tmp_path / "none.png"], "none.png does not exist"),
        "no image": (["--prompt", PROMPT, "--image", tmp_path / "text.png"], "text.png cannot be read"),
        "unknown teacher": (["--prompt", PROMPT, "--teacher", "no-such/model"], "'no-such/model'"),
        "device": (["--prompt", PROMPT, "--device", "abacus"], "--device abacus cannot be used here"),
        "number without device": (["--prompt", PROMPT, "--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        "quantize": (["--prompt", PROMPT, "--quantize", "2bit"], "'2bit'"),
        "device map": (["--prompt", PROMPT, "--device-map", "teacher=cpu"], "--device-map"),  # there is one model
    }
    for name, (flags, message) in cases.items():
        with subtests.test(name):
            teacher = [] if "--teacher" in flags else ["--teacher", models["teacher"]]
            status, out, err = run("queries", *teacher, *flags)
            assert status == 2 and message in err and out == ""
            assert err.startswith("error: ") and err.count("\n") == 1
            assert sorted(tmp_path.rglob("*")) == before


@packaged
def test_queries_to_edit_and_give_back(run: Run, tmp_path: Path) -> None:
    from vlmteacher.microworld.world import instance, render

    scene, prompt = instance(0, 7)
    Image.fromarray((render(scene)[0] * 255).round().astype("uint8")).save(tmp_path / "first.png")
    instance_flags = ["--prompt", prompt, "--image", tmp_path / "first.png"]
    status, out, _ = run("queries", *instance_flags)
    assert status == 0 and 1 <= len(json.loads(out)["process"]) <= 3
    status, told, _ = run("queries", *instance_flags, "-o", tmp_path / "q.json")
    assert status == 0 and (tmp_path / "q.json").read_text() == out
    goal, *process, hint = told.splitlines()
    assert goal.split(maxsplit=1) == ["goal", json.loads(out)["goal"]] and "vlmteacher solve --queries" in hint
    assert [line.split(maxsplit=1) for line in process] == [["process", q] for q in json.loads(out)["process"]]
    Image.open(tmp_path / "first.png").resize((2048, 2048), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    assert run("queries", "--prompt", prompt, "--image", tmp_path / "large.png")[1] == out  # as large as the video
    Image.new("RGB", (64, 128)).save(tmp_path / "tall.png")
    status, _, err = run("queries", "--prompt", prompt, "--image", tmp_path / "tall.png")
    assert status == 2 and "the image is 64x128 pixels, the video 64x64" in err
    edited = {**json.loads((tmp_path / "q.json").read_text()), "process": ["Do the boxes stay as they are?"]}
    (tmp_path / "q.json").write_text(json.dumps(edited))
    flags = [*instance_flags, "--queries", tmp_path / "q.json", "--max-steps", 1, "--out", tmp_path / "run"]
    assert run("solve", *flags)[0] == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["queries"] == edited


@packaged
def test_the_documented_commands_for_queries(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmteacher.microworld.world import Scene, render

    docs = (Path(__file__).parents[2] / "docs" / "guides" / "queries.md").read_text()
    commands = [shlex.split(line)[1:] for line in docs.splitlines() if line.startswith("    vlmteacher ")]
    assert [command[0] for command in commands] == ["queries", "solve", "solve"]
    monkeypatch.chdir(tmp_path)
    example = json.loads((PACKAGED_PAIR / "pair.json").read_text())["example"]
    frame = (render(Scene.from_json(example["scene"]))[0] * 255).round().astype("uint8")
    Image.fromarray(frame).save("first.png")
    assert run(*commands[0])[0] == 0
    assert run(*commands[1], "--max-steps", 0)[0] == 0
    Path("first.png").rename("solved.png")
    Image.open("solved.png").save("first.png")
    assert run(*commands[2], "--max-steps", 0)[0] == 0
    assert json.loads(Path("runs/edited/run.json").read_text())["queries"] == json.loads(Path("q.json").read_text())
