"""`solve --memory`: the steps keep what a plan for that memory keeps."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch

from tests.conftest import Run, Solve
from vlmteacher import TeacherPipeline
from vlmteacher.errors import InputError
from vlmteacher.planning.fit import fit_memory
from vlmteacher.reasoners.checkpointing import Keep, kept_levels
from vlmteacher.settings import Settings

SIZE = {"num_frames": 5, "height": 32, "width": 48}


def test_a_step_within_the_floor_and_none_below(
    solve: Solve, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vlmteacher")
    out = tmp_path / "run"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SIZE.items()]
    status, _, err = run(*solve(out, *flags, memory="0.0001"))
    assert status == 2 and err.count("\n") == 1 and not out.exists()
    floor = re.fullmatch(r"error: memory 0\.0001 is below the floor of this step, ([\d.]+) GB: give that.*\n", err)
    assert floor is not None, err
    status, _, err = run(*solve(out, *flags, memory=floor[1], max_steps=2))
    assert status == 0, err
    assert "memory: activations " in caplog.text
    status, _, err = run(*solve(tmp_path / "free", *flags, max_steps=2))
    records = [json.loads((path / "run.json").read_text()) for path in (out, tmp_path / "free")]
    assert [record["config"]["memory"] for record in records] == [floor[1], None]
    few, free = ([step["loss"] for step in record["steps"]] for record in records)
    assert few == pytest.approx(free, rel=1e-5)
    status, _, err = run(*solve(out, *flags, "--resume", max_steps=3))  # a resumed run may have another memory
    assert status == 0 and json.loads((out / "run.json").read_text())["config"]["memory"] is None, err


@pytest.mark.slow
def test_what_the_device_has_and_what_is_not_planned(pipe: TeacherPipeline) -> None:
    parts, shape = (pipe.reasoner, pipe.decoder, pipe.teacher), (5, 32, 48)
    fit = fit_memory(*parts, shape, range(4), 4, Settings(memory="auto", rank=2, teacher_frames=4))
    assert fit.levels == [Keep.ALL] * 2 == kept_levels(pipe.reasoner.transformer)
    assert all(p.device.type == "cpu" for p in pipe.reasoner.transformer.parameters())
    with fit.on(pipe.reasoner, pipe.teacher):
        assert pipe.teacher.activation_bytes == fit.activation_bytes > 0
    assert kept_levels(pipe.reasoner.transformer) == [Keep.ALL] * 2 and pipe.teacher.activation_bytes is None
    wide = *parts, (17, 96, 160), range(2), 2
    with pytest.raises(InputError, match=r"memory 0\.001 is below") as refused:
        fit_memory(*wide, Settings(memory="0.001", rank=2), offload=True)
    (floor,) = re.findall(r"[\d.]+(?= GB)", str(refused.value))
    less = fit_memory(*wide, Settings(memory=floor, rank=2), offload=True)
    assert less.levels != fit.levels and less.peak_bytes > fit.peak_bytes
    with pytest.raises(InputError, match='memory cannot be planned for target "full"'):
        fit_memory(*parts, shape, range(4), 4, Settings(memory="auto", target="full"))
    pipe.teacher.quantized = True
    with pytest.raises(InputError, match="memory cannot be planned for a quantised Teacher"):
        fit_memory(*parts, shape, range(4), 4, Settings(memory="auto"))
    pipe.teacher.quantized, pipe.reasoner.device = False, torch.device("meta")
    with pytest.raises(InputError, match="memory plans one device, Reasoner and Teacher are on meta and cpu"):
        fit_memory(*parts, shape, range(4), 4, Settings(memory="auto"))
    pipe.reasoner.device = torch.device("cpu")


def test_bad_values(solve: Solve, run: Run, tmp_path: Path) -> None:
    for value in ("0", "-1", "nan", "inf", "much"):
        status, _, err = run(*solve(tmp_path / "run", f"--memory={value}"))
        assert status == 2 and "memory must be auto, or a number of GB above 0" in err and repr(value) in err
    status, _, err = run(*solve(tmp_path / "run", memory="8", activations="long"))
    assert status == 2 and "--activations long and --memory 8 exclude each other" in err
    assert Settings(memory=48).memory == "48"  # type: ignore[arg-type]
