"""The video from before the first update: made when it is asked for, the same as if it had been made first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import Run, Solve
from tests.test_pipeline import FAST, seed
from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher import TeacherPipeline
from vlmteacher.errors import InputError
from vlmteacher.runs.folder import FILES


def test_it_is_made_when_it_is_asked_for(pipe: TeacherPipeline, tmp_path: Path) -> None:
    base = pipe(PROMPT, generator=seed(), queries=QUERIES, **{**FAST, "max_steps": 0, "output_type": "pt"})
    names = pipe.reasoner.transformer.state_dict().keys()
    settings = {**FAST, "output_type": "pt", "keep": "best"}  # the check of the last update needs it otherwise
    out, last = (pipe(PROMPT, generator=seed(), queries=QUERIES, **settings) for _ in range(2))
    assert not out.before_made and "before" not in out.seconds and out.updates
    shown = repr(out)
    assert "->" not in shown and ("unsolved" in shown or "(solved" in shown) and not out.before_made
    assert torch.equal(out.frames_before, base.frames) and out.p_yes_before == base.p_yes_after
    assert out.loss_before == base.loss_after and out.before_made and out.seconds["before"] > 0
    assert " -> " in repr(out) and out.verdict.mean_before is not None
    assert pipe.reasoner.transformer.state_dict().keys() == names and torch.equal(out.frames, last.frames)
    last.save(tmp_path / "saved")  # asks for it
    assert json.loads((tmp_path / "saved" / "run.json").read_text())["p_yes_before"] == base.p_yes_after
    stale = pipe(PROMPT, generator=seed(), queries=QUERIES, **settings)
    pipe.models = {**pipe.models, "fused": "another"}
    with pytest.raises(InputError, match="cannot be made any more: a LoRA was fused after the call"):
        stale.loss_before  # noqa: B018
    del pipe.models["fused"]


def test_a_run_without_it(solve: Solve, run: Run, tmp_path: Path) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    flags = ("--num-frames=5", "--height=32", "--width=48")
    status, text, err = run(*solve(out, *flags, "--no-before"))
    assert status == 0, err
    assert "P(Yes)\n" in text and "before" not in text.replace("--no-before", "")
    record = json.loads((out / "run.json").read_text())
    assert record["p_yes_before"] is record["loss_before"] is record["verdict"]["mean_before"] is None
    assert record["verdict"]["outcome"] in ("solved", "unsolved") and not record["verdict"]["worse"]
    assert {file.name for file in out.iterdir()} == {*FILES} - {"before.mp4"}
    page = (out / "report.html").read_text()
    assert "before.mp4 is missing" not in page and "What changed" not in page
    assert "The objective went to" in (out / "README.md").read_text()
    assert run("report", out, "-o", tmp_path / "page.html")[0] == 0
    status, _, err = run(*solve(whole, *flags))
    other = json.loads((whole / "run.json").read_text())
    assert status == 0 and (whole / "before.mp4").exists(), err
    assert [row["loss"] for row in other["steps"]] == [row["loss"] for row in record["steps"]]
    assert (whole / "lora.safetensors").read_bytes() == (out / "lora.safetensors").read_bytes()
    assert other["p_yes_after"] == record["p_yes_after"] and other["p_yes_before"] is not None
    status, _, err = run(*solve(out, *flags, "--resume"))  # which asks for it
    assert status == 0 and json.loads((out / "run.json").read_text())["p_yes_before"] == other["p_yes_before"], err
    assert (out / "before.mp4").read_bytes() == (whole / "before.mp4").read_bytes()


def test_the_vae_in_bfloat16(models: dict[str, str]) -> None:
    half = TeacherPipeline.from_pretrained(**models, vae_dtype="bfloat16")
    assert (half.reasoner.vae.dtype, half.dtype) == (torch.bfloat16, torch.float32)
    how = {**FAST, "max_steps": 0, "output_type": "pt"}
    video = half(PROMPT, generator=seed(), queries=QUERIES, **how).frames
    assert isinstance(video, torch.Tensor) and video.dtype == torch.float32
    half.reasoner.vae.float()
    error = (video - half(PROMPT, generator=seed(), queries=QUERIES, **how).frames).square().mean()
    assert 0 < error < 1e-3
    with pytest.raises(InputError, match="vae_dtype must be one of float32"):
        TeacherPipeline.from_pretrained(**models, vae_dtype="half precision")
