"""The benchmark at the paper's scale: all of its stages at tiny sizes, and its deadlines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import paper_scale
from benchmarks.gpu.paper_parts import group
from benchmarks.gpu.stages import Clock, Stage

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu" / "run_all.sh"


def main(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["paper_scale", *flags])
    return paper_scale.main()


@pytest.mark.slow
def test_all_stages_at_tiny_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(monkeypatch, "--preset=smoke", "--device=cpu", f"--out={tmp_path}", "--json")
    out = capsys.readouterr().out
    stages: dict[str, Any] = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert status == 0, stages
    names = ["environment", "ours", "profile", "stock", "agreement", "parts", "around"]
    assert sorted(stages) == [*(f"{number}_{name}" for number, name in enumerate(names, 1)), "summary"]
    first, ours, stock = stages["1_environment"], stages["2_ours"], stages["4_stock"]
    assert first["copy"]["gb_per_s"] > 0 and first["product_bfloat16"]["tflop_per_s"] > 0
    assert "8.9 or more" in first["product_fp8"]["absent"]
    assert sum(name.startswith("attention: ") for name in first) == 6
    for steps in (ours["default"], ours["plan"], ours["long"], stock["checkpointed"]):
        assert len(steps["steps"]) == 3 and steps["seconds"] == pytest.approx(sum(steps["parts_s"].values()), rel=0.5)
    assert [ours[name]["steps"][0]["activations"] for name in ("default", "long")] == ["all:5", "long:5"]
    assert stages["5_agreement"]["losses"]["same"] and min(stages["5_agreement"]["losses"]["gradient_cosines"]) > 0.9999
    ladder = stages["7_around"]["ladder"]
    assert ladder["steps"][1]["rungs"] == ["activations=products", "activations=long"]
    assert ladder["loss_spread"] < 1e-5
    assert stages["7_around"]["vae"]["bfloat16, contiguous"]["psnr"] > 30
    summary = json.loads(out.splitlines()[-1])
    assert summary == stages["summary"] and not summary["failed"] and not summary["skipped"]
    assert [row["part"] for row in summary["table"]] == ["Reasoner", "decoder", "Teacher", "step"]
    assert all(row["ours_ratio"] == row["ours_s"] / row["ours_predicted_s"] for row in summary["table"])


def test_nothing_begins_after_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(monkeypatch, "--preset=smoke", "--device=cpu", f"--out={tmp_path}", "--minutes=1e-9") == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["skipped"]["2_ours"] == ["build"] and "environment" in summary["skipped"]["1_environment"]
    assert all(row["ours_s"] is None for row in summary["table"])
    assert main(monkeypatch, "--preset=paper", "--device=cpu", f"--out={tmp_path}") == 2
    assert main(monkeypatch, "--preset=smoke", "--device=cpu", "--minutes=nan", f"--out={tmp_path}") == 2


def test_a_piece_that_fails_leaves_the_others(tmp_path: Path) -> None:
    stage = Stage("1_some", tmp_path, Clock(1))
    assert stage.piece("first", lambda: {"ms": 1.0}) == {"ms": 1.0}
    assert stage.piece("second", lambda: 1 / 0) is None
    assert stage.piece("third", lambda: 3, needs=61) is None
    written = json.loads((tmp_path / "1_some.json").read_text())
    assert written["first"] == {"ms": 1.0} and "ZeroDivisionError" in written["second"]["error"]
    assert (written["failed"], written["skipped"]) == (["second"], ["third"]) and "third" not in written


def test_kernels_belong_to_groups() -> None:
    kernels = {
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": "attention",
        "sm90_xmma_fprop_implicit_gemm_bf16": "convolution",
        "nvjet_tst_256x128_64x4_2x1_v_bz_TNT": "product",
        "void at::native::vectorized_elementwise_kernel<4, MulFunctor>": "element-wise",
        "Memcpy DtoD (Device -> Device)": "copy",
        "void vlmteacher::ada_norm_backward": "LoRA and glue",
        "unknown": "other",
    }
    assert {kernel: group(kernel) for kernel in kernels} == kernels


def script(tmp_path: Path, **environment: str) -> tuple[int, str, list[str]]:
    """Run run_all.sh with a stand-in for Python that only notes what it is asked for."""
    python = tmp_path / "python"
    asked = tmp_path / "asked.txt"
    python.write_text(f'#!/bin/sh\necho "$*" >> {asked}\ncase "$*" in *manifest*) echo glue patchify;; esac\n')
    python.chmod(0o755)
    variables = {**os.environ, "PYTHON": str(python), **environment}
    made = subprocess.run(
        ["bash", SCRIPT, tmp_path / "out"], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60
    )
    return made.returncode, made.stdout, asked.read_text().splitlines()


def test_run_all_in_the_order_of_worth(tmp_path: Path) -> None:
    status, out, asked = script(tmp_path)
    names = [line.split()[0] for line in out.splitlines()[:-1]]
    assert names[:6] == ["environment", "extension", "nvidia_smi", "check_glue", "check_patchify", "paper_scale"]
    assert {"gpu_glue", "bench_glue", "step_mid", "tests_kernels"} <= {*names}
    assert "-m benchmarks.gpu.glue --check" in asked and any("paper_scale --minutes 9" in line for line in asked)
    assert status == ("nvidia_smi                   ok" not in out)  # the only command that is not Python's


def test_run_all_ends_at_its_deadline(tmp_path: Path) -> None:
    start = time.monotonic()
    status, out, asked = script(tmp_path, MINUTES="0")
    assert status == 0 and out.count("no time left") > 8 and ", 0 without" not in out
    assert asked[1:] == ["-m vlmteacher.ops.manifest"] and time.monotonic() - start < 60
    status, out, asked = script(tmp_path, PRESET="smoke")
    assert status == 0 and [line.split()[0] for line in out.splitlines()[:-1]] == ["environment", "paper_scale"]
