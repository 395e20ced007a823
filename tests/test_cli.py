from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.tiny_pair import PROMPT, QUERIES, tiny_decoder
from vlmteacher import cli
from vlmteacher.cli import main, parser
from vlmteacher.pipeline import PACKAGED_PAIR
from vlmteacher.placement import parse_device_map

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def solve(models: dict[str, str], queries_file: Path) -> Callable[..., list[str]]:
    """Arguments of a small `solve`; a keyword changes one of them, None leaves it out."""

    def solve(**changed: Any) -> list[str]:
        values: dict[str, Any] = {
            **models,
            "prompt": PROMPT,
            "queries": queries_file,
            "max_steps": 3,
            "rank": 2,
            "frames": 4,
            "lr": 0.03,
            **changed,
        }
        flags = ((f"--{name.replace('_', '-')}", value) for name, value in values.items() if value is not None)
        return ["solve", *(str(part) for flag in flags for part in flag)]

    return solve


def test_help_comes_at_once() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "vlmteacher", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "solve" in result.stdout and "demo" in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "transformers", "diffusers", "peft", "PIL"}
    assert len(imported) < 250  # of Python's own: 0.1 s


def test_version_and_usage_errors(run: Run) -> None:
    status, out, _ = run("--version")
    assert status == 0 and re.fullmatch(r"vlmteacher \d+\.\d+\.\d+\n", out)
    for arguments in ([], ["nothing"], ["solve", "--out", "x"], ["bench", "chess", "--method", "base", "--out", "x"]):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1


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


def test_notices_and_texts_on_a_narrow_terminal(tmp_path: Path) -> None:
    """A notice is a line, and no text fails to be printed: run as a process, for a test's own streams are others."""
    Image.new("RGBA", (8, 8)).save(tmp_path / "cle\u00e4r.png")
    arguments = ["--prompt", PROMPT, "--image", tmp_path / "cle\u00e4r.png", "-o", tmp_path / "none" / "q.json"]
    command = [sys.executable, "-m", "vlmteacher", "queries", *map(str, arguments)]
    for encoding in ("ascii:strict", "utf-8:strict"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        result = subprocess.run(command, capture_output=True, env=environment)
        warning, error = result.stderr.splitlines()
        name = b"cle\\xe4r.png" if encoding.startswith("ascii") else "cle\u00e4r.png".encode()
        assert result.returncode == 2 and error.startswith(b"error: queries file") and result.stdout == b""
        assert warning.startswith(b"warning: image /") and warning.endswith(
            name + b" is transparent in places: they are taken as white"
        )


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
        "K too large": ({"frames": 6}, "6 frames of a video of 5"),
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


def test_a_lora_is_converted_and_gone_on_from(run: Run, solve: Any, tmp_path: Path) -> None:
    assert run(*solve(out=tmp_path / "run"))[0] == 0
    lora, musubi, back = tmp_path / "run" / "lora.safetensors", tmp_path / "m.safetensors", tmp_path / "d.safetensors"
    status, out, err = run("lora", "convert", lora, "--to", "musubi", "-o", musubi)
    assert (status, err) == (0, "") and out == f"20 layers, rank 2, alpha 2, as musubi names them: {musubi}\n"
    assert run("lora", "convert", musubi, "--to", "diffusers", "-o", back)[0] == 0
    theirs, ours = load_file(back), load_file(lora)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], value) for name, value in ours.items())
    status, out, _ = run(*solve(out=tmp_path / "more", rank=None, max_steps=1), "--lora", musubi)
    first, second = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "more"))
    assert status == 0 and second["p_yes_before"] == first["p_yes_after"] and second["config"]["rank"] == 2
    for arguments, message in (
        (("lora", "convert", tmp_path / "x", "--to", "musubi", "-o", back), "x cannot be read (No such file"),
        (("lora", "convert", lora, "--to", "musubi", "-o", tmp_path), "give the name of a file"),
        (("lora", "convert", lora, "--to", "kohya", "-o", back), "invalid choice: 'kohya'"),
        ((*solve(out=tmp_path / "bad"), "--lora", tmp_path / "run" / "run.json"), "give a complete .safetensors file"),
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "") and message in err and err.count("\n") == 1
    assert not (tmp_path / "bad").exists()


def test_the_documented_commands_for_loras() -> None:
    text = (Path(__file__).parent.parent / "docs" / "guides" / "lora_files.md").read_text()
    commands = re.findall(r"^    (vlmteacher .+)$", text, re.MULTILINE)
    parsed = [parser().parse_args(shlex.split(command)[1:]) for command in commands]
    assert [arguments.run for arguments in parsed] == [cli.lora.run, cli.lora.run, cli.solve.run]


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
    docs = (Path(__file__).parents[1] / "docs" / "guides" / "placement.md").read_text()
    commands = [shlex.split(line)[1:] for line in docs.splitlines() if line.startswith("    vlmteacher ")]
    one, two, small = (parser().parse_args(command) for command in commands)
    assert (one.device, one.device_map, one.offload, one.quantize) == ("cuda", None, False, None)
    assert parse_device_map(two.device_map) == {"reasoner": "cuda:0", "teacher": "cuda:1"} and two.device is None
    assert (small.device, small.offload, small.quantize) == ("cuda", True, "4bit")


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_the_extra_for_quantised_teachers_is_named(run: Run, solve: Any, tmp_path: Path) -> None:
    for command in (["queries", "--prompt", PROMPT], solve(out=tmp_path / "run")):
        status, out, err = run(*command, "--quantize", "4bit")
        assert status == 2 and re.fullmatch(r"(cpu \(.*\), float32\n)?", out)
        assert "pip install 'vlmteacher[quantized]'" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


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


def test_bench_of_what_is_not_there(run: Run, tmp_path: Path) -> None:
    for benchmark in ("vbvr", "ruler"):
        status, _, err = run("bench", benchmark, "--method", "base", "--out", tmp_path / "a")
        assert status == 2 and "not there yet" in err
    status, _, err = run("bench", "microworld", "--method", "base", "--limit", 0, "--out", tmp_path / "a")
    assert status == 2 and "--limit" in err
    assert list(tmp_path.iterdir()) == []


def test_env(run: Run) -> None:
    status, out, _ = run("env", "--json")
    assert status == 0 and {"cpu", "triton", "cuda"} <= set(json.loads(out)["backends"])
    status, out, _ = run("env")
    assert status == 0 and "torch" in out


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
        assert record["loss_after"] < record["loss_before"]
    assert run("demo", "--out", "runs/demo")[0] == 2


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

    docs = (Path(__file__).parents[1] / "docs" / "guides" / "queries.md").read_text()
    commands = [shlex.split(line)[1:] for line in docs.splitlines() if line.startswith("    vlmteacher ")]
    assert [command[0] for command in commands] == ["queries", "solve"]
    monkeypatch.chdir(tmp_path)
    example = json.loads((PACKAGED_PAIR / "pair.json").read_text())["example"]
    frame = (render(Scene.from_json(example["scene"]))[0] * 255).round().astype("uint8")
    Image.fromarray(frame).save("first.png")
    assert run(*commands[0])[0] == 0
    assert run(*commands[1], "--max-steps", 0)[0] == 0
    assert json.loads(Path("runs/edited/run.json").read_text())["queries"] == json.loads(Path("q.json").read_text())


def test_an_unknown_flag_is_one_line(run: Run) -> None:
    status, _, err = run("queries", "--prompt", "x", "--what\x85ever\nelse")
    assert status == 2 and len(err.splitlines()) == 1 and "--what ever else" in err
