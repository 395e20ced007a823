from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video
from PIL import Image

from tests.tiny_pair import PROMPT, QUERIES, tiny_decoder
from vlmteacher import InputError, QuerySet, TeacherPipeline
from vlmteacher.errors import NonFiniteError
from vlmteacher.reasoners.wan.reasoner import WanReasoner

FAST: dict[str, Any] = {"max_steps": 2, "rank": 2, "teacher_frames": 4, "learning_rate": 0.03, "progress": False}


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def call(pipe: TeacherPipeline, **keywords: Any) -> Any:
    values = {"generator": seed(), "queries": QuerySet.from_dict(QUERIES), **FAST, **keywords}
    return pipe(values.pop("prompt", PROMPT), values.pop("image", None), **values)


def test_one_instance_end_to_end(pipe: TeacherPipeline, image: Image.Image) -> None:
    steps = []
    out = call(pipe, image=image, callback_on_step_end=lambda p, step, row: steps.append((p, step, row)))
    assert [(p, n) for p, n, _ in steps] == [(pipe, 0), (pipe, 1)] and [row for *_, row in steps] == out.history
    assert out.stopped == "max_steps" and out.updates == 2 and out.queries.goal == QUERIES["goal"]
    assert len(out.frames) == 5 and out.frames[0].size == (48, 32)
    assert np.abs(out.uint8(out.frames).astype(int) - out.uint8(out.frames_before)).max() > 0
    assert len(out.p_yes_before) == len(out.p_yes_after) == 3 and out.p_yes_before != out.p_yes_after
    goal, *process = -np.log(out.p_yes_after)
    assert out.loss_after == pytest.approx(0.5 * goal + 0.5 * np.mean(process), rel=1e-5)


def test_the_pipeline_is_left_as_it_was(pipe: TeacherPipeline) -> None:
    before = {name: value.clone() for name, value in pipe.reasoner.transformer.state_dict().items()}
    first, other, again = call(pipe), call(pipe, generator=seed(1)), call(pipe)
    after = pipe.reasoner.transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert first.lora == again.lora and first.lora != other.lora
    assert [row["loss"] for row in first.history] == [row["loss"] for row in again.history]
    with pytest.raises(RuntimeError, match="enough"):
        call(pipe, callback_on_step_end=_fail)
    assert pipe.reasoner.transformer.state_dict().keys() == before.keys()


def _fail(*_: Any) -> None:
    raise RuntimeError("enough")


def test_no_update_gives_the_base_video(pipe: TeacherPipeline) -> None:
    out = call(pipe, max_steps=0, output_type="pt")
    reasoner = pipe.reasoner
    condition = reasoner.encode(PROMPT, None, 5, 32, 48)
    base = reasoner.decode(reasoner.sample(condition, reasoner.noise(condition, seed())))
    assert torch.equal(out.frames, out.frames_before)
    torch.testing.assert_close(out.frames, base)  # by diffusers' own blocks, which round in other places
    assert out.updates == 0 and out.history == [] and out.p_yes_before == out.p_yes_after
    out = call(pipe, threshold=50.0)
    assert (out.stopped, out.updates, len(out.history)) == ("threshold", 0, 1)


def test_output_types_hold_the_same_video(pipe: TeacherPipeline) -> None:
    pt, array, pil = (call(pipe, output_type=kind) for kind in ("pt", "np", "pil"))
    assert pt.frames.shape == (5, 3, 32, 48) and array.frames.shape == (5, 32, 48, 3)
    assert torch.equal(pt.frames.permute(0, 2, 3, 1), torch.from_numpy(array.frames))
    assert np.array_equal(pil.uint8(pil.frames), np.stack([np.asarray(frame) for frame in pil.frames]))
    assert np.array_equal(pt.uint8(pt.frames), pil.uint8(pil.frames))
    (frames,) = call(pipe, output_type="pt", return_dict=False)
    assert torch.equal(frames, pt.frames)


def test_diffusers_makes_the_same_video_with_the_lora_file(
    pipe: TeacherPipeline, models: dict[str, str], tmp_path: Path
) -> None:
    out = call(pipe, output_type="pt")
    out.save(tmp_path)
    theirs = WanPipeline.from_pretrained(models["reasoner"])
    theirs.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    parts = theirs.transformer, theirs.vae, theirs.text_encoder, theirs.tokenizer
    reasoner = WanReasoner(*parts, image_conditioning=True, settings=pipe.reasoner.settings)
    condition = reasoner.encode(PROMPT, None, 5, 32, 48)
    video = reasoner.decode(reasoner.sample(condition, reasoner.noise(condition, seed())))
    assert torch.allclose(video, out.frames, atol=1e-5) and not torch.allclose(video, out.frames_before, atol=1e-3)


def test_the_fused_lora_optimises_as_pefts_own_layers_do(pipe: TeacherPipeline) -> None:
    ours, peft = (
        call(pipe, max_steps=4, threshold=1e-6, learning_rate=1e-2, fused_lora=fused, generator=seed()).history
        for fused in (True, False)
    )
    assert len(ours) == len(peft) and len({row["loss"] for row in ours}) > 3
    for a, b in zip(ours, peft, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_a_run_folder_holds_the_contract(pipe: TeacherPipeline, image: Image.Image, tmp_path: Path) -> None:
    import imageio.v3 as iio

    out = call(pipe, image=image)
    out.save(tmp_path / "run")
    names = {file.name for file in (tmp_path / "run").iterdir()}
    texts = {"queries.json", "run.json", "report.html", "README.md"}
    assert names == {"before.mp4", "after.mp4", "lora.safetensors", "frames.webp"} | texts
    assert Image.open(tmp_path / "run" / "frames.webp").size == (4 * 48, 4 * 32)  # before, steps 0 and 1, after
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {"version", "prompt", "config", "queries", "steps", "stopped", "updates", "seconds", "models"} <= set(record)
    assert record["steps"] == out.history and record["queries"] == QUERIES and record["updates"] == 2
    assert {"step", "loss", "p_yes", "seconds", "grad_norm", "guards"} == set(record["steps"][0])
    assert record["config"]["rank"] == 2 and record["config"]["seed"] == 0 and record["prompt"] == PROMPT
    for name, frames in (("before", out.frames_before), ("after", out.frames)):
        video = iio.imread(tmp_path / "run" / f"{name}.mp4", plugin="FFMPEG")
        assert video.shape == (5, 32, 48, 3)
        assert np.abs(video.astype(float).mean((0, 1, 2)) - out.uint8(frames).mean((0, 1, 2))).max() < 8
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<svg" in page and QUERIES["goal"] in page and page.count('src="data:video/mp4;base64,') == 2
    assert not re.search(r'(src|href)="(?!data:)|url\((?!data:)|https?:', page)
    with pytest.raises(InputError, match="already holds a run"):
        out.save(tmp_path / "run")


def test_the_report_shows_text_as_text(pipe: TeacherPipeline, tmp_path: Path) -> None:
    queries = QuerySet("<img src=x onerror=alert(1)> moves?", ("Is {{ 7 * 7 }} red?",))
    call(pipe, max_steps=0, prompt="move <script>ball</script>", queries=queries).save(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<script") == 1 and "&lt;script&gt;ball" in page
    assert "<img src=x" not in page and "{{ 7 * 7 }}" in page


@pytest.mark.parametrize("stop_at", [0, 2])
def test_an_interrupted_run_is_taken_up(pipe: TeacherPipeline, tmp_path: Path, stop_at: int) -> None:
    whole = call(pipe, max_steps=4, keep="best")

    def interrupt(_: Any, step: int, __: Any) -> None:
        if step == stop_at:
            raise KeyboardInterrupt

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        call(pipe, max_steps=4, keep="best", run_dir=run, callback_on_step_end=interrupt)
    record = json.loads((run / "run.json").read_text())
    assert record["stopped"] == "interrupted" and len(record["steps"]) == stop_at + 1
    out = call(pipe, max_steps=4, keep="best", run_dir=run, resume=True, generator=None, queries=None)
    assert out.lora == whole.lora == (run / "lora.safetensors").read_bytes()
    assert [*out.predictions] == [*whole.predictions] == [0, 3]
    assert all(np.array_equal(out.predictions[step], whole.predictions[step]) for step in (0, 3))
    assert [row["loss"] for row in out.history] == [row["loss"] for row in whole.history]
    assert json.loads((run / "run.json").read_text())["stopped"] == "max_steps"
    again = call(pipe, max_steps=4, keep="best", run_dir=run, resume=True)  # a finished one stays as it is
    assert again.lora == whole.lora and again.history == out.history


def test_resume_with_other_settings_names_them(pipe: TeacherPipeline, tmp_path: Path, image: Image.Image) -> None:
    call(pipe, run_dir=tmp_path)
    for changed, name in (
        ({"prompt": "stop the ball"}, "prompt"),
        ({"learning_rate": 0.5}, "learning_rate"),
        ({"generator": seed(1)}, "seed"),
        ({"image": image}, "image"),
        ({"queries": QuerySet("Is it red?")}, "queries.goal"),
    ):
        with pytest.raises(InputError, match=f"another {name}"):
            call(pipe, run_dir=tmp_path, resume=True, **changed)
    used = seed()
    torch.rand(1, generator=used)
    with pytest.raises(InputError, match="another generator"):
        call(pipe, run_dir=tmp_path, resume=True, generator=used)


def test_breaking_down_keeps_the_last_good_state(pipe: TeacherPipeline, tmp_path: Path) -> None:
    def poison(p: TeacherPipeline, *_: Any) -> None:
        next(iter(p.reasoner.transformer.parameters())).data.fill_(torch.nan)

    weight = next(iter(pipe.reasoner.transformer.parameters()))
    good = weight.detach().clone()
    try:
        with pytest.raises(NonFiniteError, match="step 1"):
            call(pipe, run_dir=tmp_path, callback_on_step_end=poison)
    finally:
        weight.data.copy_(good)
    assert len(json.loads((tmp_path / "run.json").read_text())["steps"]) == 1
    assert call(pipe, run_dir=tmp_path, resume=True).lora == call(pipe).lora


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"teacher_frames": 6}, "6 frames of a video of 5"),
        ({"max_steps": -1}, "max_steps"),
        ({"threshold": 0.0}, "threshold"),
        ({"rank": 0}, "rank"),
        ({"height": 40}, "32 and 48"),
        ({"num_frames": 6}, "5 and 9"),
        ({"num_frames": 0}, "num_frames"),
        ({"image": Image.new("RGB", (48, 48))}, "48x48 pixels, the video 48x32"),
        ({"target": "second_step"}, "target must be first_step"),
        ({"output_type": "latent"}, "output_type"),
    ],
)
def test_bad_input_leaves_nothing(pipe: TeacherPipeline, tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(pipe, run_dir=tmp_path / "run", **bad)
    assert list(tmp_path.iterdir()) == []


def test_a_pair_brings_its_defaults(models: dict[str, str], tmp_path: Path) -> None:
    pair = {name: models[name] for name in ("reasoner", "teacher", "decoder")}
    description = {**pair, "defaults": {"teacher_frames": 5, "learning_rate": 0.01}}
    (tmp_path / "pair.json").write_text(json.dumps(description))
    pipe = TeacherPipeline.from_pretrained(pair=tmp_path)
    assert (pipe.defaults.teacher_frames, pipe.defaults.learning_rate, pipe.defaults.max_steps) == (5, 0.01, 40)
    other = TeacherPipeline.from_pretrained(models["reasoner"], pair=tmp_path)
    assert other.defaults.teacher_frames == 24
    (tmp_path / "pair.json").write_text("{}")
    with pytest.raises(InputError, match="does not name its reasoner and teacher and decoder"):
        TeacherPipeline.from_pretrained(pair=tmp_path)
    with pytest.raises(InputError, match="no pair of models"):
        TeacherPipeline.from_pretrained(pair=tmp_path / "nowhere")


def test_a_decoder_of_another_family(models: dict[str, str], tmp_path: Path) -> None:
    other = tiny_decoder(tmp_path / "other.safetensors", latent_channels=16)
    with pytest.raises(InputError, match=r"16 channels.*8"):
        TeacherPipeline.from_pretrained(**{**models, "decoder": str(other)})


def test_outputs_are_read_as_those_of_diffusers(pipe: TeacherPipeline, tmp_path: Path) -> None:
    out = call(pipe)
    assert out[0] is out.frames and out["updates"] == out.updates == 2
    written = [
        export_to_video(frames, str(tmp_path / name))
        for frames, name in ((out.frames, "a.mp4"), (out.frames[0], "b.mp4"))
    ]
    assert Path(written[0]).read_bytes() == Path(written[1]).read_bytes() and len(out.frames[0]) == 5
    assert isinstance(out.frames[0], Image.Image) and np.asarray(out.frames[0]).shape == (32, 48, 3)
    (frames,) = call(pipe, return_dict=False)
    assert len(frames) == 5


def test_a_notebook_shows_text_as_text(pipe: TeacherPipeline) -> None:
    queries = {"goal": "Is <img src=x onerror=alert(1)> there?", "process": []}
    html = call(pipe, prompt="<script>alert(1)</script>", queries=queries, max_steps=0)._repr_html_()
    assert "<script" not in html and "<img" not in html and "&lt;script&gt;" in html and "&lt;img" in html
