"""Context parallelism: two processes of torchrun on the CPU (gloo), and what is refused without one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run, Solve
from tests.reasoners import tiny_ltx
from vlmteacher.errors import InputError
from vlmteacher.optimization.engines import check_engine
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.ranks import Ranks
from vlmteacher.reasoners.context_parallel import check_ranks, check_tokens
from vlmteacher.reasoners.loading import load_reasoner

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "VLMTEACHER_CHECK_DECODER": "0"}


@pytest.mark.slow
def test_two_ranks_are_one_process(models: dict[str, str], tmp_path: Path) -> None:
    command = [*TORCHRUN, "tests.ranks_process", json.dumps(models), str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        for case in ("ours", "stock", "all steps"):
            assert result[case]["steps"] == 3 and result[case]["loss"] < 1e-6, (case, result)
            assert all(result[case][name] < 1e-4 for name in ("grad_norm", "lora_A", "lora_B", "video")), (case, result)
        assert result["rows"] < 1e-14 and result["hooks"] == []
        assert result["refused"] == (2 if rank == 0 else "rank 1 has another prompt than rank 0: give all ranks the"
                                     " same arguments and files, in one torchrun command")  # fmt: skip


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_which_goes_on(solve: Solve, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def command(**changed: Any) -> list[str]:
        return [*TORCHRUN, "vlmteacher", *solve(out, "--context-parallel", "2", device="cpu", **changed)]

    process = subprocess.Popen(
        command(max_steps=2000, threshold=1e-6), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    while not (out / "state.pt").exists():
        assert process.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    second = next(child for child in children if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes())
    os.kill(int(second), signal.SIGKILL)
    _, messages = process.communicate()
    assert process.returncode == 1 and "rank      : 1" in messages and "SIGKILL" in messages
    assert "--resume goes on" in messages and "rank 1: error" not in messages
    done = len(json.loads((out / "run.json").read_text())["steps"])
    again = subprocess.run(
        [*command(max_steps=done + 1, threshold=1e-6), "--resume"], cwd=ROOT, env=ENVIRONMENT, capture_output=True,
        text=True,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr[-3000:]
    record = json.loads((out / "run.json").read_text())
    assert [row["step"] for row in record["steps"]] == [*range(done + 1)] and record["stopped"] == "max_steps"
    assert again.stdout.count("Run folder") == 1 and (out / "after.mp4").exists()


REFUSED: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {  # environment, flags -> message
    "no torchrun": ({}, {"context_parallel": 2}, "needs 2 processes: torchrun --nproc-per-node 2 -m vlmteacher solve"),
    "one": ({}, {"context_parallel": 1}, "at least 2, not 1"),
    "another number": ({"WORLD_SIZE": "3"}, {"context_parallel": 2}, "under torchrun of 3 processes"),
    "a GPU by number": (
        {"WORLD_SIZE": "2"},
        {"context_parallel": 2, "device": "cuda:1"},
        "each rank takes its own GPU",
    ),
    "map": ({}, {"context_parallel": 2, "device_map": "reasoner=cpu,teacher=cpu"}, "exclude each other"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(run: Run, solve: Solve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    environment, flags, message = REFUSED[case]
    for name, value in {"MASTER_ADDR": "localhost", **environment}.items() if environment else ():
        monkeypatch.setenv(name, value)
    status, _, error = run(*solve(tmp_path / "run", **flags))
    assert status == 2 and message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_what_ranks_cannot_share(pipe: TeacherPipeline, tmp_path: Path) -> None:
    three = Ranks(0, 3)
    with pytest.raises(InputError, match=r"--context-parallel 3: the 2 heads of the transformer .* evenly: give 2"):
        pipe.share(three)
    with pytest.raises(InputError, match="24 tokens of a video of 13 frames of 48x32 cannot be shared evenly"):
        check_tokens(pipe.reasoner, Ranks(0, 5), {"num_frames": 13, "height": 32, "width": 48})
    ltx = load_reasoner(tiny_ltx.tiny_ltx_pipeline(tmp_path / "ltx"))
    with pytest.raises(InputError, match="context parallelism does not work for LTX-Video, only for Wan"):
        check_ranks(ltx, Ranks(0, 2))
    pipe.reasoner.transformer.set_attention_backend("_native_math")
    try:
        with pytest.raises(InputError, match=r"backend native only, the transformer has .*_native_math"):
            check_ranks(pipe.reasoner, Ranks(0, 2))
    finally:
        pipe.reasoner.transformer.reset_attention_backend()
    reasoner = pipe.reasoner.with_sampling()
    reasoner.ranks = Ranks(0, 2)
    with pytest.raises(InputError, match='engine "compile" runs in one process'):
        check_engine("compile", reasoner, pipe.teacher)
