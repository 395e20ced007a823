"""The whole method on a tiny checkpoint of each family in its hub layout: the Teacher teaches it, and it is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.other_device import other_device
from tests.reasoners import tiny_checkpoints
from tests.reasoners.tiny_checkpoints import HEIGHT, SIZE, WIDTH
from tests.test_placement import call, watched
from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher import InputError, QuerySet, TeacherPipeline
from vlmteacher.cli import main

WAN = ("wan21_t2v", "wan21_i2v", "wan22_ti2v", "wan22_t2v_a14b", "wan22_i2v_a14b")
SMALL = dict(zip(("num_frames", "height", "width"), SIZE, strict=True))


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def pipeline(directory: Path, models: dict[str, str], **options: Any) -> TeacherPipeline:
    return TeacherPipeline.from_pretrained(**models | {"reasoner": str(directory)}, **options)


@pytest.mark.parametrize("family", WAN)
def test_a_lora_is_trained_with_guidance(family: str, models: dict[str, str], image: Image.Image, tmp_path: Path):
    pipe = pipeline(getattr(tiny_checkpoints, family)(tmp_path / "reasoner"), models)
    before = {name: value.clone() for name, value in pipe.reasoner.transformer.state_dict().items()}
    out = pipe(
        PROMPT,
        image if "i2v" in family else None,
        **SMALL,
        num_inference_steps=3,
        guidance_scale=2.0,
        negative_prompt="green box",
        generator=torch.Generator().manual_seed(0),
        queries=QuerySet.from_dict(QUERIES),
        max_steps=2,
        rank=2,
        teacher_frames=4,
        learning_rate=0.03,
        output_type="pt",
        progress=False,
        run_dir=tmp_path / "run",
    )
    assert out.updates == 2 and out.history[0]["loss"] != out.history[1]["loss"]
    assert (out.frames - out.frames_before).abs().max() > 1e-3
    with safe_open(tmp_path / "run" / "lora.safetensors", "pt") as file:
        assert all(key.startswith("transformer.blocks.") for key in file.keys())  # noqa: SIM118 (a file, no dict)
    after = pipe.reasoner.transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    sampling = json.loads((tmp_path / "run" / "run.json").read_text())["config"]["sampling"]
    assert sampling["timesteps"] == pytest.approx([1000, 2000 / 3, 1000 / 3])
    assert sampling["guidance_scale"] == 2.0 and sampling["negative_prompt"] == "green box"
    assert pipe.reasoner.settings.guidance_scale == 1.0  # of that call only


def test_experts_take_turns_on_the_device(models: dict[str, str], tmp_path: Path):
    """What waits in main memory: the low-noise expert until the boundary, then the other one."""
    directory = tiny_checkpoints.wan22_t2v_a14b(tmp_path / "reasoner")
    expected = call(pipeline(directory, models), **SMALL)
    pipe = pipeline(directory, models, offload=True)
    with other_device():
        pipe.to("meta")
        with watched(pipe) as seen:
            out = call(pipe, **SMALL)
        frames = out.frames.to("cpu")
    experts = [(name, there) for name, there in seen if name.startswith("transformer")]
    turns = [("transformer", {"transformer"}), ("transformer_2", {"transformer_2"})]
    loop = [("transformer", {"transformer", "teacher"})]
    assert [e for i, e in enumerate(experts) if e != experts[i - 1]] == [*loop, *turns, *turns]
    change = (expected.frames - expected.frames_before).abs().max()
    assert (frames - expected.frames).abs().max() < 0.02 * change


def test_both_experts_stay_where_the_video_is_looked_at_in_the_loop(models: dict[str, str], tmp_path: Path):
    """The low-noise expert would drive out weights that the backward of the step needs."""
    pipe = pipeline(tiny_checkpoints.wan22_t2v_a14b(tmp_path / "reasoner"), models, offload=True)
    with other_device():
        pipe.to("meta")
        with watched(pipe) as seen:
            out = call(pipe, **SMALL, check_final=True, threshold=50.0, max_steps=1)
    assert "final_loss" in out.history[0]
    there = {"transformer", "transformer_2", "vae", "teacher"}
    in_loop = seen[[on for _, on in seen].index(there) :]
    assert {name for name, on in in_loop if on == there} == {*there, "surrogate"}


def test_solve_on_parts_from_elsewhere(models: dict[str, str], queries_file: Path, image: Image.Image, tmp_path: Path):
    base = tiny_checkpoints.wan22_i2v_a14b(tmp_path / "base")
    image.save(tmp_path / "first.png")
    arguments = [
        *("solve", "--prompt", PROMPT, "--image", tmp_path / "first.png", "--queries", queries_file),
        *("--reasoner", base, "--teacher", models["teacher"], "--decoder", models["decoder"]),
        *("--num-frames", 5, "--height", HEIGHT, "--width", WIDTH),
        *("--max-steps", 1, "--teacher-frames", 4, "--rank", 2),
    ]
    special = [
        *("--transformer", base / "transformer_2", base / "transformer"),
        *("--preset", "wan2.2-a14b-lightx2v-4step", "--num-inference-steps", 2),
        *("--guidance-scale", 1.5, "--negative-prompt", "green"),
    ]
    run = [str(part) for part in (*arguments, *special, "--out", tmp_path / "run")]
    assert main(run) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["models"]["transformer"] == f"{base / 'transformer_2'}, {base / 'transformer'}"
    assert record["config"]["sampling"] == {
        "timesteps": [1000, 500],
        "shift": 5.0,
        "sampler": "euler",
        "guidance_scale": 1.5,
        "guidance_scale_2": None,
        "negative_prompt": "green",
    }
    with pytest.raises(InputError, match=r"another sampling\.guidance_scale \(1\.5, now 1\.0\)"):
        pipe = TeacherPipeline.from_pretrained(
            str(base),
            models["teacher"],
            models["decoder"],
            transformer=[str(base / "transformer_2"), str(base / "transformer")],
            preset="wan2.2-a14b-lightx2v-4step",
        )
        pipe(
            PROMPT,
            image,
            **SMALL,
            num_inference_steps=2,
            negative_prompt="green",
            generator=torch.Generator().manual_seed(0),
            max_steps=1,
            teacher_frames=4,
            rank=2,
            run_dir=tmp_path / "run",
            resume=True,
        )


def test_an_unknown_preset_is_named_before_a_model_loads(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    status = main(["solve", "--prompt", PROMPT, "--preset", "turbo", "--out", str(tmp_path / "run")])
    assert status == 2 and "unknown preset 'turbo': choose from wan2.1-t2v-480p," in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
