from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Run
from tests.tiny_models import tiny_wan_pipeline
from tools import models_page
from vlmteacher.lora.adapter import add_lora
from vlmteacher.planning import GB, Step
from vlmteacher.planning.costs import META
from vlmteacher.planning.decoder import stock_decoder_cost
from vlmteacher.planning.models import PACKAGED, build_decoder, build_reasoner, build_teacher, known_models
from vlmteacher.planning.reasoner import ReasonerCosts
from vlmteacher.planning.teacher import Video, language_costs, preprocessing_cost, query_set, vision_costs
from vlmteacher.planning.tracing import tracing
from vlmteacher.reasoners.checkpointing import Keep, keep_activations
from vlmteacher.reasoners.condition import Condition, Noise
from vlmteacher.reasoners.presets import PRESETS
from vlmteacher.reasoners.sampling import SamplerSettings
from vlmteacher.teachers import shared_prefix
from vlmteacher.teachers.prompt import Clip

PAPER = (
    "--reasoner",
    "quanhaol/Wan2.2-TI2V-5B-Turbo",
    "--teacher",
    "qwen3-vl-4b",
    "--num-frames",
    89,
    "--height",
    704,
    "--width",
    1280,
)


@pytest.mark.parametrize("level", [Keep.ALL, Keep.ATTENTION])
def test_parts_add_up_to_a_whole_step(level: Keep, narrow: None) -> None:
    """Trace Reasoner, plain decoder and Teacher in one piece, as `Optimization` runs them."""
    reasoner, _ = build_reasoner("packaged")
    teacher, decoder = build_teacher("packaged"), build_decoder("packaged")
    shape, indices = (13, 64, 64), list(range(0, 13, 2))
    video = Video(tuple(indices), 8.0, 64, 64)
    add_lora(reasoner.transformer)
    latents = reasoner.latent_shape(*shape)
    planned = Step(
        ReasonerCosts.of(reasoner, shape).total([level] * 5),
        stock_decoder_cost(decoder, latents, indices),
        preprocessing_cost(teacher, video),
        vision_costs(teacher, video, [2])[2],
        language_costs(teacher, video, 3)[shared_prefix.Keep.INPUT],
        weights={},
    )

    keep_activations(reasoner.transformer, level)
    teacher.activation_bytes, teacher.chunk_patches = 0, 64
    size = teacher.resized(len(indices), 64, 64)
    layout = teacher.layout(Clip(video.indices, 8.0, size), query_set(3))
    with META:
        text = torch.empty(1, 24, 128, dtype=torch.bfloat16)
        first, noise = torch.empty(1, latents[1], 1, *latents[3:]), Noise(torch.empty(latents), ())
    with tracing() as trace:
        trace.weights(reasoner.transformer, decoder, teacher.model)
        trace.inputs(text, first, noise.z1)
        z0 = reasoner.predict_clean(Condition(text, first, *shape), noise)
        losses = teacher.packed_losses(decoder.decode_batch(z0)[0][indices], layout, size)
        torch.autograd.backward(losses.sum())
    assert planned.flops == sum(trace.flops.values())
    assert trace.peak[""] <= planned.peak_bytes <= 1.1 * trace.peak[""]


def test_plan_of_the_packaged_pair(run: Run) -> None:
    status, out, err = run("plan", "--reasoner", "packaged", "--teacher", "packaged", "--json")
    assert (status, err) == (0, "")
    plan = json.loads(out)
    for part in ("ours", "stock"):
        step = plan[part]
        assert step["flops"] == sum(stage["flops"] for stage in step["stages"].values()) > 0
        assert step["peak_bytes"] == max(stage["peak_bytes"] for stage in step["stages"].values())
        assert step["peak_bytes"] > sum(step["weights"].values())
    assert plan["fits"] and plan["ours"]["flops"] < plan["stock"]["flops"]
    assert (plan["num_frames"], plan["height"], plan["width"]) == (13, 64, 64)


def test_plan_of_directories_says_what_does_not_fit(models: dict[str, str], run: Run) -> None:
    weights = list(Path(models["reasoner"]).rglob("*.safetensors"))
    for file in weights:  # are not read
        file.rename(file.with_suffix(".away"))
    try:
        arguments = [f"--{name}={value}" for name, value in models.items()]
        status, out, err = run("plan", *arguments, "--teacher-frames", 4, "--memory", 1e-4)
    finally:
        for file in weights:
            file.with_suffix(".away").rename(file)
    assert (status, err) == (0, "")
    assert "does not fit in 0.0001 GB" in out and "the weights alone" in out and "--text-encoder cpu" in out


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"reasoner": "wan9"}, "wan2.2-i2v-a14b, wan2.2-t2v-a14b, wan2.2-ti2v-5b, packaged"),
        ({"reasoner": "../../etc/passwd"}, "unknown --reasoner"),
        ({"reasoner": "qwen3-vl-4b"}, "unknown --reasoner"),
        ({"teacher": "gpt"}, "qwen2.5-vl-7b, qwen3-vl-2b, qwen3-vl-30b-a3b"),
        ({"decoder": "taew9"}, "taew2_1, taew2_2"),
        ({"decoder": "taew2_1"}, "decodes latents of 16 channels"),
        ({"num_frames": 12}, "the nearest are 9 and 13"),
        ({"height": 60}, "the nearest are 48 and 64"),
        ({"width": 0}, "the nearest are"),
        ({"memory": 0}, "--memory must be a number of GB above 0, not 0"),
        ({"memory": "nan"}, "--memory must be"),
        ({"memory": "inf"}, "--memory must be"),
        ({"questions": 0}, "--questions must be at least 1"),
        ({"teacher_frames": 14}, "cannot see 14 frames"),
        ({"rank": 0}, "--rank must be at least 1"),
    ],
)
def test_bad_input(changed: dict[str, Any], said: str, run: Run) -> None:
    values = {"reasoner": "packaged", "teacher": "packaged"} | changed
    status, out, err = run("plan", *(f"--{k.replace('_', '-')}={v}" for k, v in values.items()))
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1


def test_broken_directories(tmp_path: Path, run: Run) -> None:
    assert "model_index.json" in run("plan", "--reasoner", tmp_path, "--teacher", "packaged")[2]
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in run("plan", "--reasoner", "packaged", "--teacher", tmp_path)[2]
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert (
        "is a FluxPipeline: the known Reasoners are WanPipeline"
        in run("plan", "--reasoner", tmp_path, "--teacher", "packaged")[2]
    )
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    said = run("plan", "--reasoner", "packaged", "--teacher", tmp_path)[2]
    assert "is of the model type 'llava'; known types: qwen3_vl, " in said
    tiny = tiny_wan_pipeline(tmp_path / "wan")
    assert "--decoder is needed" in run("plan", "--reasoner", tiny, "--teacher", "packaged")[2]


@pytest.mark.slow
def test_plan_at_the_papers_scale(run: Run) -> None:
    """One plan takes at most 60% of stock's FLOPs and at most 48 GB, weights included."""
    status, out, _ = run("plan", *PAPER, "--questions", 4, "--memory", 48, "--json")
    plan = json.loads(out)
    assert status == 0 and plan["fits"] and plan["reasoner_tokens"] == 20240
    assert plan["ours"]["peak_bytes"] <= 48 * GB
    assert plan["ours"]["flops"] <= 0.6 * plan["stock"]["flops"]
    # measured before on fake CPU tensors, with other means (TFLOP)
    stages = {name: stage["flops"] / 1e12 for name, stage in plan["ours"]["stages"].items()}
    for name, expected in {
        "reasoner.forward": 333,
        "reasoner.backward": 564,
        "teacher.vision.forward": 42,
        "teacher.language.forward": 112,
    }.items():
        assert stages[name] == pytest.approx(expected, rel=0.04)
    stock = {name: stage["flops"] / 1e12 for name, stage in plan["stock"]["stages"].items() if "reasoner" in name}
    assert sum(stock.values()) == pytest.approx(1229, rel=0.01)


@pytest.mark.parametrize(
    "teacher",
    [
        "OpenGVLab/InternVL3-2B-hf",
        pytest.param("qwen2.5-vl-3b", marks=pytest.mark.slow),
        pytest.param("qwen3-vl-30b-a3b", marks=pytest.mark.slow),
        pytest.param("qwen3.5-0.8b", marks=pytest.mark.slow),
    ],
)
def test_plans_of_other_teacher_families(teacher: str, run: Run) -> None:
    status, out, err = run("plan", *PAPER[:2], "--teacher", teacher, "--memory", 160, "--json")
    plan = json.loads(out)
    assert (status, err) == (0, "") and plan["fits"]
    ours, stock = (
        {name: stage["flops"] for name, stage in plan[part]["stages"].items() if "teacher" in name}
        for part in ("ours", "stock")
    )
    assert stock["teacher.vision.forward"] == 4 * ours["teacher.vision.forward"]  # a pass for each question
    assert 3 < stock["teacher.language.forward"] / ours["teacher.language.forward"] <= 4.3


def test_a_base_model_is_planned_with_its_guidance_and_a_distilled_one_without() -> None:
    assert build_reasoner("wan2.2-ti2v-5b")[0].settings == PRESETS["wan2.2-ti2v-5b"]
    turbo = build_reasoner("quanhaol/Wan2.2-TI2V-5B-Turbo")[0]
    assert turbo.settings == PRESETS["wan2.2-ti2v-5b-turbo"] and not turbo.settings.guided


@pytest.mark.slow
def test_every_known_model_is_planned_by_its_preset() -> None:
    for name in known_models("reasoner"):
        assert build_reasoner(name)[0].settings != SamplerSettings(), name


def test_what_a_plan_needs(run: Run) -> None:
    for given in ([], ["--reasoner", "packaged"], ["--teacher", "packaged"]):
        status, out, err = run("plan", *given)
        assert (status, out) == (2, "") and "--reasoner and --teacher are needed" in err and err.count("\n") == 1


@pytest.mark.slow
def test_verify_runs_a_whole_step_at_full_size(run: Run) -> None:
    status, out, err = run("plan", "--verify", "--reasoner", "ltx-0.9.8-2b-distilled", "--json")
    row = json.loads(out)
    assert (status, err) == (0, "") and row["parameters"] == pytest.approx(1.92e9, rel=0.01)  # "2B"
    assert row["latents"] == [1, 128, 16, 22, 38] and row["tokens"] == 16 * 22 * 38
    assert row["frames"] == [24, 3, 704, 1216] and row["losses"] == [4]
    assert row["lora_gradients"] == row["lora_tensors"] == 28 * 10 * 2  # blocks, layers, A and B
    assert row["peak_bytes"] > row["weights_bytes"] > 2 * (row["parameters"] + 4e9)  # and the Teacher's, bfloat16
    choices = f"choose from {known_models('reasoner')[0]}, "
    assert choices in run("plan", "--verify", "--reasoner", "wan9")[2]
    assert choices in run("plan", "--verify", "--reasoner", PACKAGED / "reasoner")[2]


def test_the_documented_models_are_those_that_are_known() -> None:
    """Where this fails: `python -m tools.models_page` (with --keep where no model was added)."""
    text = models_page.PAGE.read_text()
    assert models_page.page(text, keep=True) == text
    for table, kind in (("steps", "reasoner"), ("teachers", "teacher")):
        rows = text.split(models_page.marks(table)[0])[1].split("<!-- end -->")[0].splitlines()[2:]
        assert [row.split("|")[1].strip() for row in rows] == known_models(kind)
