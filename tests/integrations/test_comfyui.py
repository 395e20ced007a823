"""The ComfyUI nodes: what they do without ComfyUI, and, where VLMTEACHER_COMFYUI names its folder, in a real one."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from integrations.comfyui import teaching
from tests.other_device import other_device
from tests.reasoners.tiny_hunyuan import tiny_hunyuan_pipeline
from tests.reasoners.tiny_ltx import tiny_ltx_pipeline
from tests.tiny_pair import PROMPT
from vlmteacher import InputError, __version__, packaged_example
from vlmteacher.lora.adapter import add_lora, export_lora, remove_lora
from vlmteacher.lora.formats import read_lora
from vlmteacher.reasoners.loading import load_reasoner

ROOT = Path(__file__).parents[2]
NODES = ROOT / "integrations/comfyui"
COMFYUI = os.environ.get("VLMTEACHER_COMFYUI")
PYTHON = os.environ.get("VLMTEACHER_COMFYUI_PYTHON", sys.executable)
QUERIES = "Is the ball on the square?\n\n  Is there one ball?  \n"
FLAGS = "--max-steps 3 --rank 2 --teacher-frames 4 --lr 0.03"


def test_settings_are_the_flags_of_solve() -> None:
    assert teaching.parse_settings("") == {}
    text = "--max-steps 3 --lr 6e-4 --check-final  # a comment\n--lora-blocks last:2 --no-fused-lora"
    assert teaching.parse_settings(text) == {
        "max_steps": 3, "learning_rate": 6e-4, "check_final": True, "lora_blocks": "last:2", "fused_lora": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--max-step 3", "did you mean --max-steps"),
        ("max_steps: 3", "unknown max_steps:"),
        ("--lr fast", "--lr: invalid float value: 'fast'"),
        ("--rank 0", "rank must be a whole number of at least 1"),
        ("--keep 'last", "No closing quotation"),
        ("--out elsewhere", "unknown --out"),
    ],
)
def test_settings_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)) as error:
        teaching.parse_settings(text)
    assert "\n" not in str(error.value)


def test_queries_are_lines() -> None:
    assert teaching.parse_queries(" \n") is None
    queries = teaching.parse_queries(QUERIES)
    assert queries is not None and queries.questions == ("Is the ball on the square?", "Is there one ball?")
    with pytest.raises(InputError, match="9 questions"):
        teaching.parse_queries("Is it?\n" * 9)


def test_a_run_folder_stays_in_the_output_folder(tmp_path: Path) -> None:
    assert teaching.run_folder("  ", tmp_path) is None
    assert teaching.run_folder("a/b", tmp_path) == tmp_path / "vlmteacher/a/b"
    (tmp_path / "vlmteacher").mkdir()
    (tmp_path / "vlmteacher/link").symlink_to("/")
    for name in ("..", ".", "../x", "/etc", "a/../../..", "link/etc"):
        with pytest.raises(InputError, match="is not inside"):
            teaching.run_folder(name, tmp_path)


def test_the_first_frame() -> None:
    assert teaching.first_frame(None) is None
    picture = teaching.first_frame(torch.tensor([1.02, 0.5, -0.01]).expand(1, 4, 6, 3))
    assert picture is not None and picture.size == (6, 4) and picture.getpixel((0, 0)) == (255, 128, 0)
    with pytest.raises(InputError, match="a batch of 2"):
        teaching.first_frame(torch.zeros(2, 4, 6, 3))
    with pytest.raises(InputError, match="channels last"):
        teaching.first_frame(torch.zeros(1, 4, 6, 4))


def test_a_changed_file_changes_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    file = tmp_path / "model/config.json"
    file.write_text("{}")
    before = teaching.fingerprint(str(tmp_path / "model"), "OWNER/NAME", "", None)
    assert before == teaching.fingerprint(str(tmp_path / "model")) and "config.json" in before
    file.write_text("{ }")
    assert teaching.fingerprint(str(tmp_path / "model")) != before


@torch.inference_mode()  # as ComfyUI calls its nodes
def test_an_instance_is_interrupted_and_goes_on(models: dict[str, str], tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    pipe = teaching.load(cpu, **models)
    image = torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(0))

    def optimise(run: Path | None, on_step: Any = lambda *_: None) -> teaching.Taught:
        with teaching.at_work(pipe, cpu):
            return teaching.optimise(
                pipe, PROMPT, image, queries=QUERIES, flags=FLAGS, seed=3, run_dir=run, on_step=on_step
            )

    reports: list[tuple[int, int, Image.Image | None]] = []

    def stop(done: int, most: int, strip: Image.Image | None) -> None:
        reports.append((done, most, strip))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimise(tmp_path / "run", stop)
    assert [report[:2] for report in reports] == [(0, 3), (1, 3), (2, 3)]
    assert reports[0][2] is None and reports[2][2] is not None and reports[2][2].width > reports[2][2].height
    assert not getattr(pipe.reasoner.transformer, "peft_config", None), "the LoRA stayed on the Reasoner"
    assert json.loads((tmp_path / "run/run.json").read_text())["stopped"] == "interrupted"
    resumed, whole = optimise(tmp_path / "run"), optimise(None)

    assert resumed.lora.keys() == whole.lora.keys()
    assert all(torch.equal(value, resumed.lora[name]) for name, value in whole.lora.items())
    assert torch.equal(resumed.frames, whole.frames) and (tmp_path / "run/report.html").exists()
    assert whole.frames.shape == whole.before.shape == (5, 32, 48, 3) and whole.frames.dtype == torch.float32
    assert whole.frames.min() >= 0 and whole.frames.max() <= 1 and not torch.equal(whole.frames, whole.before)
    assert whole.plot.shape[0] == 1 and whole.plot.shape[3] == 3 and len(whole.plot.unique()) > 10
    assert whole.queries == "Is the ball on the square?\nIs there one ball?" and whole.fps == 8
    assert "Verdict" in whole.summary and "Is there one ball?" in whole.summary
    layers = teaching.lora_layers(pipe.reasoner.transformer)
    assert {key.rpartition(".lora_")[0] for key in whole.lora} == layers.keys()
    with pytest.raises(InputError, match="prompt is empty"):
        teaching.optimise(pipe, " ")
    with pytest.raises(InputError, match="another seed"):
        teaching.optimise(pipe, PROMPT, image, queries=QUERIES, flags=FLAGS, seed=4, run_dir=tmp_path / "run")


def test_the_models_are_on_the_device_for_the_time_of_the_work(models: dict[str, str]) -> None:
    cpu, other = torch.device("cpu"), torch.device("meta")
    pipe = teaching.load(other, **models)
    assert {*pipe.devices.values()} == {cpu}, "it waits in main memory"
    done: list[int] = []
    with other_device():
        with teaching.at_work(pipe, other):
            assert {*pipe.devices.values()} == {other}
            flags = "--max-steps 1 --rank 2 --teacher-frames 4 --no-fused-lora"
            taught = teaching.optimise(
                pipe, PROMPT, queries=QUERIES, flags=flags, on_step=lambda step, *_: done.append(step)
            )
        assert done == [0, 1] and taught.frames.device == taught.lora.popitem()[1].device == cpu
        with pytest.raises(InputError, match="prompt"), teaching.at_work(pipe, other):
            teaching.optimise(pipe, "")
        pipe.teacher.quantized = True
        with teaching.at_work(pipe, other):
            assert pipe.devices["reasoner"] == other and pipe.devices["teacher"] == cpu, "a quantised Teacher stays"
        assert {*pipe.devices.values()} == {cpu} == {weight.device for weight in pipe.reasoner.transformer.parameters()}


@pytest.mark.parametrize("tiny", [tiny_ltx_pipeline, tiny_hunyuan_pipeline])
def test_the_layers_are_those_of_the_exported_lora(tmp_path: Path, tiny: Any) -> None:
    transformer = load_reasoner(tiny(tmp_path)).transformer
    layers = teaching.lora_layers(transformer, "last:1")
    add_lora(transformer, 2, blocks="last:1")
    tensors = safetensors.torch.load(read_lora(export_lora(transformer), "it").to_bytes("comfyui"))
    remove_lora(transformer)
    a, b = (
        {key.removesuffix(end): value for key, value in tensors.items() if key.endswith(end)}
        for end in (".lora_A.weight", ".lora_B.weight")
    )
    assert layers == {name: (b[name].shape[0], a[name].shape[1]) for name in a}


def schema() -> dict[str, tuple[list[str], list[str]]]:
    """The ids of inputs and outputs of each node, from the source: ComfyUI may not be here."""
    nodes = {}
    for tree in ast.walk(ast.parse((NODES / "nodes.py").read_text())):
        if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Attribute) and tree.func.attr == "Schema"):
            continue
        parts = {keyword.arg: keyword.value for keyword in tree.keywords}
        ids = [
            [call.args[0].value for call in parts[name].elts]  # type: ignore[attr-defined]
            for name in ("inputs", "outputs")
        ]
        nodes[parts["node_id"].value] = (ids[0], ids[1])  # type: ignore[attr-defined]
    return nodes


def test_the_workflow_fits_the_nodes() -> None:
    nodes, workflow = schema(), json.loads((NODES / "workflow_api.json").read_text())
    assert len(nodes) == 3
    ours = {number: node for number, node in workflow.items() if node["class_type"] in nodes}
    assert {node["class_type"] for node in ours.values()} == nodes.keys()
    for node in ours.values():
        inputs, _ = nodes[node["class_type"]]
        assert node["inputs"].keys() <= set(inputs)
    for node in workflow.values():
        for value in node["inputs"].values():
            if isinstance(value, list) and value[0] in ours:
                assert value[1] < len(nodes[ours[value[0]]["class_type"]][1])
    graph = json.loads((NODES / "example_workflows/packaged_pair.json").read_text())
    assert {node["type"] for node in graph["nodes"]} == {node["class_type"] for node in workflow.values()}
    with Image.open(NODES / "vlmteacher_example.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(packaged_example().image))


def test_the_registry_file() -> None:
    project = tomllib.loads((NODES / "pyproject.toml").read_text())
    assert project["project"]["version"] == __version__
    assert project["tool"]["comfy"].keys() >= {"PublisherId", "DisplayName"}
    assert f"vlmteacher=={__version__}" in project["project"]["dependencies"]


# ---------------------------------------------------------------- in ComfyUI


@pytest.mark.skipif(COMFYUI is None, reason="VLMTEACHER_COMFYUI does not name a folder of ComfyUI")
def test_the_loras_of_all_families_in_comfyui() -> None:
    script = ROOT / "tests/integrations/comfyui_process.py"
    result = subprocess.run([PYTHON, str(script), str(COMFYUI)], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    assert all(f"{name}: " in result.stdout for name in ("wan", "ltx", "hunyuan", "VLMTeacherOptimize"))


@pytest.mark.skipif(COMFYUI is None, reason="VLMTEACHER_COMFYUI does not name a folder of ComfyUI")
def test_workflows_in_comfyui(tmp_path: Path) -> None:
    script = ROOT / "tests/integrations/comfyui_server.py"
    command = [PYTHON, str(script), str(COMFYUI), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "previews" in result.stdout and "the interrupted run went on" in result.stdout
