from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import Run
from tests.tiny_pair import QUERIES, tiny_decoder
from vlmteacher.cli import parser
from vlmteacher.errors import Notice
from vlmteacher.placement import parse_device_map


def test_solve_writes_a_run(run: Run, solve: Any, tmp_path: Path) -> None:
    Image.new("RGB", (96, 64), "red").save(tmp_path / "first.png")
    status, out, err = run(*solve(out=tmp_path / "run", image=tmp_path / "first.png", seed=3, goal_weight=0.25))
    assert status == 0
    for text in (*QUERIES["process"], QUERIES["goal"], "3 updates", "lora.safetensors", "->"):
        assert text in out
    assert "loss" in err and "P(Yes)" in err and "Warning" not in err and "shards" not in err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    config = record["config"]
    assert (config["seed"], config["goal_weight"], config["teacher_frames"]) == (3, 0.25, 4)
    assert config["image"] and record["queries"] == QUERIES and len(record["steps"]) == 3


def bad_inputs(tmp_path: Path) -> dict[str, tuple[dict[str, Any], str]]:
    text = tmp_path / "text.png"
    text.write_text("no image")
    square = tmp_path / "square.png"
    Image.new("RGB", (64, 64)).save(square)
    files = {
        "not_json": "{",
        "no_goal": '{"process": ["Is it?"]}',
        "too_many": json.dumps({"goal": "Is it?", "process": ["Is it?"] * 8}),
        "number": '{"goal": "Is it?", "process": [3]}',
        "empty": '{"goal": " "}',
        "half": r'{"goal": "Is it \udcff?"}',
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(content)
    (tmp_path / "empty").mkdir()
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "run.json").write_text("{}")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "text" / "config.json").write_text('{"model_type": "bert"}')
    wrong = tiny_decoder(tmp_path / "wrong.safetensors", latent_channels=16)
    return {
        "missing image": ({"image": tmp_path / "none.png"}, "none.png does not exist"),
        "unreadable image": ({"image": text}, "text.png cannot be read"),
        "image is a directory": ({"image": tmp_path}, "cannot be read"),
        "image of another shape": ({"image": square}, "64x64 pixels, the video 48x32"),
        "height": ({"height": 40}, "32 and 48"),
        "frames of the video": ({"num_frames": 6}, "5 and 9"),
        "empty prompt": ({"prompt": ""}, "--prompt is empty"),
        "prompt of half a character": ({"prompt": "move \udcff"}, r"(\udcff) at position 5"),
        "prompt with a NUL": ({"prompt": "move\0"}, "argument prompt holds a NUL at position 4"),
        "negative prompt": ({"negative_prompt": "\ud800"}, "argument negative-prompt holds"),
        "path of half a character": ({"out": tmp_path / "\udcff"}, "argument out holds"),
        "one path of two": ({"transformer": "\udcff"}, "argument transformer holds"),
        "query of half a character": ({"queries": tmp_path / "half.json"}, "half a character"),
        "queries missing": ({"queries": tmp_path / "none.json"}, "none.json"),
        "queries not JSON": ({"queries": tmp_path / "not_json.json"}, "not JSON"),
        "queries without goal": ({"queries": tmp_path / "no_goal.json"}, "no goal"),
        "too many queries": ({"queries": tmp_path / "too_many.json"}, "9 questions, at most 8"),
        "query is a number": ({"queries": tmp_path / "number.json"}, "not 3"),
        "empty query": ({"queries": tmp_path / "empty.json"}, "non-empty"),
        "reasoner unknown": ({"reasoner": "no-such/model"}, "local directory"),
        "reasoner empty": ({"reasoner": tmp_path / "empty"}, "model_index.json"),
        "reasoner of another family": ({"reasoner": tmp_path / "text"}, "FluxPipeline"),
        "teacher unknown": ({"teacher": "no-such/model"}, "director"),
        "teacher of another family": ({"teacher": tmp_path / "text"}, "bert"),
        "decoder missing": ({"decoder": tmp_path / "none.safetensors"}, "none.safetensors"),
        "decoder is no decoder": ({"decoder": text}, "text.png"),
        "decoder of another family": ({"decoder": wrong}, "16 channels, but the Reasoner's have 8"),
        "K too large": ({"teacher_frames": 6}, "6 frames of a video of 5"),
        "N": ({"max_steps": -1}, "not -1"),
        "threshold": ({"threshold": 0}, "not 0"),
        "rank": ({"rank": 0}, "not 0"),
        "learning rate": ({"lr": 0}, "not 0"),
        "goal weight": ({"goal_weight": 2}, "not 2"),
        "N is no number": ({"max_steps": "many"}, "'many'"),
        "dtype": ({"dtype": "int8"}, "'int8'"),
        "device": ({"device": "abacus"}, "--device abacus cannot be used here"),
        "device of a part": ({"device_map": "reasoner=cpu,teacher=abacus"}, "--device-map: teacher=abacus cannot be"),
        "device of an unknown part": ({"device_map": "vae=cpu"}, "--device-map: unknown part 'vae': the parts are"),
        "device for one part": ({"device_map": "teacher=cpu"}, "--device-map: no device for the reasoner"),
        "devices of another form": ({"device_map": "cpu,cpu"}, "'cpu,cpu' is not of the form reasoner=cuda:0,teacher"),
        "two ways to say it": ({"device": "cpu", "device_map": "reasoner=cpu,teacher=cpu"}, "exclude each other"),
        "quantize": ({"quantize": "2bit"}, "'2bit'"),
        "seed": ({"seed": 2**63}, "argument --seed: must be a whole number"),
        "out is a file": ({"out": text}, "not a directory"),
        "out under a file": ({"out": text / "run"}, "not a directory"),
        "out cannot be made": ({"out": "/proc/run"}, "/proc/run"),
        "out holds a run": ({"out": tmp_path / "held"}, "already holds a run"),
    }


def test_bad_input_is_one_line_and_leaves_nothing(
    run: Run, solve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: Any
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cases = bad_inputs(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name, (changed, message) in cases.items():
        with subtests.test(name):
            status, out, err = run(*solve(**{"out": tmp_path / "run", **changed}))
            assert status == 2 and message in err
            assert err.startswith("error: ") and err.count("\n") == 1 and re.fullmatch(r"(cpu \(.*\), float32\n)?", out)
            assert sorted(tmp_path.rglob("*")) == before


def test_sizes_are_refused_before_anything_is_loaded(run: Run, solve: Any, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "square.png")
    square = tmp_path / "square.png"
    for changed in ({"height": 40}, {"num_frames": 6}, {"image": square}, {"last_image": square}):
        status, out, err = run(*solve(**{"out": tmp_path / "run", **changed}))
        assert (status, out) == (2, "") and err.count("\n") == 1  # without the line about the device
    flags = {"image": tmp_path / "square.png", "fit": "pad", "max_steps": 0}
    assert run(*solve(out=tmp_path / "run", **flags))[0] == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["config"]["fit"] == "pad"


def test_a_flag_of_the_last_release_still_works(run: Run, solve: Any, tmp_path: Path) -> None:
    arguments = solve(out=tmp_path / "run", teacher_frames=None, max_steps=0)
    with pytest.warns(Notice, match="--frames is now --teacher-frames"):
        assert run(*arguments, "--frames", 4)[0] == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["config"]["teacher_frames"] == 4


def test_placement(run: Run, solve: Any, tmp_path: Path) -> None:
    """What can be said where there is no second device."""
    status, _, err = run(*solve(out=tmp_path / "run"), "--offload")
    assert status == 2 and "--offload keeps in main memory what a GPU does not need" in err
    assert list(tmp_path.iterdir()) == []
    flags = {"device_map": "reasoner=cpu, teacher=cpu", "max_steps": 1}
    assert run(*solve(out=tmp_path / "run", **flags))[0] == 0
    assert run(*solve(out=tmp_path / "same", max_steps=1))[0] == 0
    first, second = ((tmp_path / name / "lora.safetensors").read_bytes() for name in ("run", "same"))
    assert first == second


def test_the_documented_commands_for_placement() -> None:
    guides = Path(__file__).parents[2] / "docs/guides"
    docs = (guides / "several_gpus.md").read_text() + (guides / "low_memory.md").read_text()
    commands = [shlex.split(line)[1:] for line in docs.splitlines() if line.startswith("    vlmteacher solve")]
    one, two, small, both = (parser().parse_args(command) for command in commands)
    assert (one.device, one.device_map, one.offload, one.quantize) == ("cuda", None, False, None)
    assert parse_device_map(two.device_map) == {"reasoner": "cuda:0", "teacher": "cuda:1"} and two.device is None
    assert (small.device, small.offload, small.quantize) == ("cuda", True, "4bit")
    assert (both.quantize_reasoner, both.quantize, both.offload) == ("4bit", "4bit", True)


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_lora(run: Run, solve: Any, tmp_path: Path) -> None:
    steps = 150  # long enough for the interrupt to arrive in time on a busy machine
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(*solve(out=whole, max_steps=steps))[0] == 0

    arguments = solve(out=killed, max_steps=steps)
    process = subprocess.Popen([sys.executable, "-m", "vlmteacher", *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not (killed / "state.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130 and "interrupted; the same with --resume goes on" in err
    record = json.loads((killed / "run.json").read_text())
    assert record["stopped"] == "interrupted" and len(record["steps"]) < steps

    status, _, err = run(*solve(out=killed, max_steps=steps, lr=0.5), "--resume")
    assert status == 2 and "another learning_rate (0.03, now 0.5)" in err
    status, _, err = run(*solve(out=killed, max_steps=steps))
    assert status == 2 and "already holds a run" in err
    status, _, _ = run(*solve(out=killed, max_steps=steps, queries=None), "--resume")
    assert status == 0
    assert (killed / "lora.safetensors").read_bytes() == (whole / "lora.safetensors").read_bytes()
    first, second = (json.loads((folder / "run.json").read_text()) for folder in (whole, killed))
    assert [row["loss"] for row in first["steps"]] == [row["loss"] for row in second["steps"]]
    assert second["stopped"] == "max_steps" and not list(killed.glob(".*"))
