"""All training stages in their order, with next to no steps, on the real classes; the last writes a pair that loads."""

import json
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file

from recipes.microworld import stages, training
from recipes.microworld.both import BOTH
from recipes.microworld.keep import keep
from recipes.microworld.manifest import SINGLE
from recipes.microworld.package import DEFAULTS
from recipes.microworld.replay import JOURNAL, replay
from recipes.microworld.teacher import point
from recipes.microworld.teacher.average import average
from recipes.microworld.teacher.pointing import Pointing
from vlmteacher.distillation.trainer import STATE
from vlmteacher.errors import InputError
from vlmteacher.evaluation.microworld import first_frame, run_benchmark
from vlmteacher.microworld import world
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.queries import QuerySet
from vlmteacher.teachers.vlm import VLMTeacher

SMALL = {
    "world": {},
    "encoder": {"batch": 2, "steps": 2},
    "vae": {"base_dim": 8, "batch": 3, "steps": 4},
    "vae_decoder": {"batch": 1, "steps": 1},
    "decoder": {"widths": [16, 8, 8, 8], "batch": 1, "steps": 1},
    "latents": {"shards": 1, "videos": 16},
    "distil": {"videos": {"count": 4, "seed": 0}, "steps": 1, "batch_size": 1, "dmd2": {"fake_updates": 1}},
    "reasoner": {"layers": 1, "heads": 1, "ffn_dim": 64, "batch": 2, "steps": 2},
    "teacher": {"width": 32, "layers": 3, "mlp": 48, "vision_layers": 2, "vision_mlp": 48, "batch": 1, "steps": 2},
    "teacher_finetune": {"steps": 2, "collected": {"lessons": 1, "optimised": 1}, "keep": 1.0, "learn": ["move"]},
    "teacher_point": {
        "steps": 6,
        "batch": 2,
        "labels": 1,
        "right": 1,
        "runs": 2,
        "scenes": 3,
        "workers": 1,
        "collected": {"lessons": 1},
    },
    "writer": {"steps": 2, "batch": 1, "rank": 2},
    "collect": {
        "lessons": {"shards": 1, "videos": 8},
        "predictions": {"shards": 1, "videos": 3},
        "optimised": {"shards": 1, "videos": 8},
    },
}


def write_configs(configs, **more):
    for name, changes in SMALL.items():
        config = training.load_config(name) | changes | more
        if name == "teacher":
            config["write_every"] = 2
        if name == "collect":
            config["settings"]["max_steps"] = 3
        (configs / f"{name}.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    configs = tmp_path_factory.mktemp("configs")
    write_configs(configs)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "CONFIGS", configs)
        for stage in stages.STAGES:
            stages.run(stage, out)
    torch.set_num_threads(threads)
    return out / "pair"


@pytest.mark.slow
def test_the_packaged_pair_loads_and_optimises(pair):
    pipe = TeacherPipeline.from_pretrained(pair=pair)
    scene, prompt = world.instance(0, seed=0)
    out = pipe(
        prompt,
        generator=torch.Generator().manual_seed(0),
        image=first_frame(scene),
        queries=QuerySet("Is the ball inside the box at the end?"),
        max_steps=2,
        threshold=1e-6,
        output_type="pt",
        progress=False,
    )
    assert out.frames.shape == (world.NUM_FRAMES, 3, world.SIZE, world.SIZE)
    assert out.updates == 2
    assert isinstance(pipe.teacher, VLMTeacher) and pipe.teacher.writer


@pytest.mark.slow
def test_pointing_resumes_to_the_same_weights(pair, tmp_path, monkeypatch):
    write_configs(tmp_path)
    monkeypatch.setattr(training, "CONFIGS", tmp_path)
    monkeypatch.setattr(point, "SAVE_EVERY", 3)
    config = stages.settings_of(stages.STAGES["teacher-point"])
    whole, parts = (
        training.Run(pair.parent, tmp_path / name, config, pair.parent / "finetune/teacher")
        for name in ("whole", "parts")
    )
    point.train_pointing(whole)
    steps, step = [], Pointing.step

    def stopped(self, rng):
        steps.append(len(steps))
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(self, rng)

    with monkeypatch.context() as patch:
        patch.setattr(Pointing, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            point.train_pointing(parts)
    point.train_pointing(parts)
    whole, parts, before = (
        load_file(folder / "teacher/model.safetensors")
        for folder in (tmp_path / "whole", tmp_path / "parts", pair.parent / "finetune")
    )
    assert any(not torch.equal(whole[name], value) for name, value in before.items())
    for name, value in whole.items():
        assert torch.equal(parts[name], value), name


def test_runs_of_the_manifest_train_earlier_ones_further(pair, tmp_path, monkeypatch):
    write_configs(tmp_path)
    monkeypatch.setattr(training, "CONFIGS", tmp_path)
    replay(pair.parent, "teacher-finetune-1", "teacher-finetune-1", shorten=1000, manifest=SINGLE)
    start, end = (
        torch.load(pair.parent / name / STATE, weights_only=True)["modules"]
        for name in ("teacher", "teacher-finetune-1")
    )
    assert start["heads"].keys() == end["heads"].keys()
    shares = {"teacher": 0.25, "teacher-finetune-1": 0.75}
    average(training.Run(pair.parent, pair.parent / "mean", {"shares": shares}))
    mean = torch.load(pair.parent / "mean" / STATE, weights_only=True)["modules"]
    for name, value in mean["teacher"].items():
        torch.testing.assert_close(value, 0.25 * start["teacher"][name] + 0.75 * end["teacher"][name])
    assert torch.equal(mean["heads"]["cells.weight"], start["heads"]["cells.weight"])
    assert load_file(pair.parent / "mean/teacher/model.safetensors").keys() <= mean["teacher"].keys()
    monkeypatch.setattr("recipes.microworld.teacher.writer.train", lambda modules, *_, **__: None)
    replay(pair.parent, "writer-2", "writer-2", manifest=SINGLE)
    first, second = (
        load_file(pair.parent / name / "adapter_model.safetensors") for name in ("writer/writer", "writer-2/writer")
    )
    assert all(torch.equal(second[name], value) for name, value in first.items())


@pytest.mark.slow
def test_the_next_pair_is_made_from_this_one_and_from_what_was_kept(pair, tmp_path, monkeypatch, capsys):
    """Its runs go on elsewhere from the results that are kept; what is drawn from seeds is drawn again."""
    write_configs(tmp_path)
    monkeypatch.setattr(training, "CONFIGS", tmp_path)
    out, kept = tmp_path / "out", tmp_path / "kept"
    replay(out, last="relearnt-1", shorten=1000, init=pair, manifest=BOTH)
    keep(out, kept, BOTH)
    finished = {"reasoner", "distil", "teacher", "relearnt-1"}
    assert json.loads((kept / JOURNAL).read_text()).keys() == {"latents", *finished}
    assert not list(kept.rglob("*.mp4")) and [path.parent.parent.name for path in kept.rglob("*.pt")] == ["relearnt-1"]
    assert {path.parent.name for path in kept.rglob("log.jsonl")} == finished
    replay(kept, shorten=1000, init=pair, manifest=BOTH)
    printed = capsys.readouterr().out
    assert "[2/19] reasoner: finished" in printed and printed.count("collect: stage collect") == 2
    assert TeacherPipeline.from_pretrained(pair=kept / "pair").teacher.writer


def test_bench_resumes_and_refuses_other_results(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "vlmteacher.teachers.qwen_vl.QwenVLTeacher.write_queries",
        lambda self, prompt, image=None: QuerySet("Is the ball inside the box at the end?"),
    )  # two training steps teach nobody to write
    first = run_benchmark("pass@2", 1, 1, tmp_path / "out", pair=str(pair))
    again = run_benchmark("pass@2", 2, 1, tmp_path / "out", resume=True, pair=str(pair))
    assert again["instances"][0] == first["instances"][0]
    assert again["n"] == 2 and set(again["tasks"]) == set(world.FAMILIES[:2])
    for row in again["instances"]:
        assert row["oracle_success"] >= row["success"] and len(row["samples"]) == 2
    for method in ("base", "teacher"):
        results = run_benchmark(method, 1, 1, tmp_path / method, pair=str(pair))
        assert results["instances"][0]["updates"] == (0 if method == "base" else DEFAULTS["max_steps"])
    far = run_benchmark("base", 1, 1, tmp_path / "far", pair=str(pair), split="ood", chosen=["maze"])
    assert far["splits"]["ood"]["n"] == far["tasks"]["maze"]["n"] == 1 and far["families"] == ["maze"]
    assert far["instances"][0]["prompt"] == world.instance(0, 1, "ood", ["maze"])[1]
    with pytest.raises(InputError, match="already holds results"):
        run_benchmark("pass@2", 2, 1, tmp_path / "out", pair=str(pair))
    with pytest.raises(InputError, match="holds other results"):
        run_benchmark("pass@2", 2, 1, tmp_path / "out", resume=True, pair=str(pair), split="ood")
    with pytest.raises(InputError, match="holds other results"):
        run_benchmark("base", 2, 1, tmp_path / "out", resume=True, pair=str(pair))
    with pytest.raises(InputError, match="unknown method 'pass@0'"):
        run_benchmark("pass@0", 2, 1, tmp_path / "new", pair=str(pair))


@pytest.mark.slow
def test_a_stage_starts_from_the_weights_of_a_pair(pair, tmp_path, monkeypatch):
    write_configs(tmp_path, steps=0)
    monkeypatch.setattr(training, "CONFIGS", tmp_path)
    out = tmp_path / "out"
    parts = {
        "vae": ("vae/vae/diffusion_pytorch_model.safetensors", "reasoner/vae/diffusion_pytorch_model.safetensors"),
        "decoder": ("decoder/decoder.safetensors", "decoder.safetensors"),
        "reasoner": (
            "reasoner/reasoner/transformer/diffusion_pytorch_model.safetensors",
            "many_step/diffusion_pytorch_model.safetensors",
        ),
        "teacher": ("teacher/teacher/model.safetensors", "teacher/model.safetensors"),
    }
    for stage in ("vae", "latents", "decoder", "reasoner", "teacher"):
        stages.run(stage, out, pair if stage in parts else None)
    for stage, (written, known) in parts.items():
        weights, start = load_file(out / written), load_file(pair / known)
        assert weights.keys() == start.keys(), stage
        for name, value in start.items():
            assert torch.equal(weights[name].half(), value.half()), (stage, name)


def test_a_stage_says_what_it_starts_from(tmp_path):
    with pytest.raises(InputError, match=r"no pair\.json"):
        stages.run("vae", tmp_path, tmp_path)
    (tmp_path / "pair.json").touch()
    with pytest.raises(InputError, match="starts from no other weights"):
        stages.run("latents", tmp_path, tmp_path)


def test_a_stage_says_where_it_works(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="stage vae is for the CPU: leave out --device cuda"):
        stages.run("vae", tmp_path, device="cuda")
    monkeypatch.setitem(stages.STAGES, "teacher-point", replace(stages.STAGES["teacher-point"], needs=(), start=None))
    with pytest.raises(InputError, match="--device abc cannot be used here"):
        stages.run("teacher-point", tmp_path, device="abc")


def test_a_stage_says_what_it_needs(tmp_path):
    with pytest.raises(InputError, match="stage reasoner needs"):
        stages.run("reasoner", tmp_path)


def test_the_table_is_in_order_and_its_functions_exist():
    made: set[str] = set()
    for stage in stages.TABLE:
        assert made.issuperset(stage.needs) and (stage.start is None or stage.start in made), stage.name
        assert {result.split("/")[0] for result in stage.makes} == {stage.folder}
        assert stages.settings_of(stage) or stage.name == "package"
        module, function = stage.function.split(":")
        assert callable(getattr(import_module(f"recipes.microworld.{module}"), function))
        made.update(stage.makes)
