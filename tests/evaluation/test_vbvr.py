"""VBVR-Bench from an exported microworld to its means, through a stand-in kit in a process of its own; faults."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.evaluation import stand_in_kit
from tests.evaluation.test_tables import pair, written  # noqa: F401 (fixtures)
from vlmteacher.errors import InputError, Notice
from vlmteacher.evaluation import vbvr
from vlmteacher.evaluation.methods import METHODS
from vlmteacher.evaluation.paper import IN, OUT
from vlmteacher.evaluation.tables import TABLES, run_table
from vlmteacher.evaluation.vbvr import Bench, verdict

FAMILIES = ["--family", "move", "--family", "maze"]
Benchmark = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vlmteacher.cli import main

    out = tmp_path_factory.mktemp("bench") / "data"
    assert main(["microworld", "export", "--layout", "bench", "--limit", "4", "--out", str(out), *FAMILIES]) == 0
    return out


@pytest.fixture
def data(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "data")


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    folder = tmp_path / "kit"
    folder.mkdir()
    for name in ("run_evaluation.py", "run_evaluation_video.py"):
        shutil.copy(stand_in_kit.__file__, folder / name)
    return folder


@pytest.fixture
def bench(run: Run, data: Path, kit: Path, tmp_path: Path) -> Benchmark:
    """Run `vlmteacher bench vbvr` on these data."""

    def bench(method: str, out: str, *flags: object) -> tuple[int, str, str]:
        command = ["bench", "vbvr", "--method", method, "--data", data, "--evalkit", kit, "--out", tmp_path / out]
        return run(*command, "--limit", 2, *flags)

    return bench


def read(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def test_the_layout_is_the_bench_s(exported: Path, run: Run, tmp_path: Path) -> None:
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    names = ("final_frame.png", "first_frame.png", "ground_truth.mp4", "metadata.json", "prompt.txt")
    assert files == {
        f"{split}/{task}_data-generator/0000{k}/{name}"
        for split in vbvr.SPLITS
        for task in ("move", "maze")
        for k in range(2)
        for name in names
    }
    command = ["microworld", "export", "--layout", "bench", *FAMILIES]
    assert run(*command, "--limit", 6, "--out", shutil.copytree(exported, tmp_path / "more"))[0] == 0
    assert len(list((tmp_path / "more").rglob("prompt.txt"))) == 12
    for flags, message in ((["--flawed"], "goes without --split, --flawed"), (["--limit", 0], "at least 1")):
        status, _, err = run(*command, *flags, "--out", tmp_path / "none")
        assert status == 2 and message in err and not (tmp_path / "none").exists()


def test_the_controls_and_the_kit_s_own_means(bench: Benchmark, data: Path, kit: Path, tmp_path: Path) -> None:
    status, text, _ = bench("static", "out", "--num-frames", 9)
    assert status == 0 and "entry point run_evaluation.py" in text and "--method final-frame" in text
    results = read(tmp_path / "out")
    assert results["n"] == 4 and results["missing"] == results["errors"] == 0
    assert results["scorer"] == {"kit": "VBVR-EvalKit", "entry_point": "run_evaluation.py"} | {
        "sha256": Bench(data=str(data), evalkit=str(kit)).kit.fingerprint()
    }
    command = [sys.executable, kit / "run_evaluation.py", "--model_path", tmp_path / "out/videos/static"]
    subprocess.run([*command, "--gt_base", data, "--output_dir", tmp_path], check=True)
    own = json.loads((tmp_path / "static_vbvr_results.json").read_text())
    assert len(own["samples"]) == 4
    means = results["as_the_kit"]
    assert means == results["missing_is_0"] and means["score"] == pytest.approx(own["summary"]["overall"]["mean_score"])
    for name, split in stand_in_kit.SPLITS.items():
        assert means["splits"][name]["score"] == pytest.approx(own["summary"][split]["mean_score"])
    assert means["mean_of_splits"] == pytest.approx(sum(cell["score"] for cell in means["splits"].values()) / 2)
    assert set(means["categories"]) == {"spatiality"} and len(means["tasks"]) == 2
    # index by index, so that a few instances are of many tasks
    assert [row["task"] for row in results["instances"][:2]] == ["maze_data-generator", "move_data-generator"]

    assert bench("final-frame", "last")[0] == 0
    assert read(tmp_path / "last")["score"] != results["score"] > 0


def test_a_reasoner_generates_and_the_scorer_s_pick_stands_beside_the_teacher_s(
    pair: Path,  # noqa: F811
    bench: Benchmark,
    tmp_path: Path,
) -> None:
    flags = ["--pair", pair, "--limit", 1, "--split", "Out-of-Domain_50"]
    status, _, err = bench("pass@2", "out", *flags)
    assert status == 0, err
    (row,) = read(tmp_path / "out")["instances"]
    assert row["video"] == "videos/pass@2/Out-of-Domain_50/maze_data-generator/00000.mp4" and len(row["samples"]) == 2
    assert row["score"] == row["sample_scores"][row["picked"]] <= row["oracle_score"]


def test_a_changed_kit_is_refused_and_judges_anew(bench: Benchmark, kit: Path, data: Path, tmp_path: Path) -> None:
    assert bench("static", "out")[0] == 0
    before = read(tmp_path / "out")
    script = kit / "run_evaluation.py"
    script.write_text(script.read_text().replace("mean()) / 16", "mean()) / 64"))
    status, _, err = bench("static", "out", "--resume")
    assert status == 2 and "another version of the scorer" in err and read(tmp_path / "out") == before
    assert bench("static", "out", "--rescore")[0] == 0
    assert read(tmp_path / "out")["score"] > before["score"]
    (data / "In-Domain_50/maze_data-generator/00000/prompt.txt").write_text("Go.")
    status, _, err = bench("static", "out", "--resume")
    assert status == 2 and "holds other results" in err


def test_a_corrupt_video_is_the_kit_s_0_and_a_missing_one_is_counted_apart(
    bench: Benchmark, data: Path, tmp_path: Path
) -> None:
    assert bench("static", "out")[0] == 0
    videos = tmp_path / "out/videos/static/In-Domain_50/maze_data-generator"
    (videos / "00000.mp4").write_bytes(b"no video")
    (videos.parent / "move_data-generator/00000.mp4").unlink()
    status, text, err = bench("static", "out", "--rescore")
    assert status == 1 and "move_data-generator/00000.mp4 is gone: --resume makes it again" in err
    results = read(tmp_path / "out")
    assert (results["n"], results["missing"], results["errors"]) == (3, 1, 1)
    (corrupt,) = [row for row in results["instances"] if "error" in row]
    assert corrupt["score"] == 0 and corrupt["id"] == "In-Domain_50/maze_data-generator/00000"
    kit, zero = results["as_the_kit"], results["missing_is_0"]
    assert kit["n"] == 3 and zero["n"] == 4 and zero["score"] == pytest.approx(kit["score"] * 3 / 4)
    assert zero["categories"]["spatiality"]["n"] == 4
    text = "\n".join(Bench(data=str(data), evalkit=str(tmp_path / "kit")).lines(results))
    assert "1 evaluator errors, each a 0 by the kit's rule" in text and corrupt["error"] in text
    assert bench("static", "out", "--resume")[0] == 0 and read(tmp_path / "out")["n"] == 4


def test_a_task_that_the_kit_does_not_know_is_no_0(bench: Benchmark, data: Path, tmp_path: Path) -> None:
    (data / "In-Domain_50/move_data-generator").rename(data / "In-Domain_50/chess_data-generator")
    with pytest.warns(Notice, match="chess_data-generator first: it may have no evaluator"):
        status, _, err = bench("static", "out")
    assert status == 1 and "has it an evaluator for the task chess_data-generator?" in err
    results = read(tmp_path / "out")
    assert (results["n"], results["missing"]) == (3, 1)
    assert results["as_the_kit"]["n"] == 3 and results["missing_is_0"]["categories"]["unknown"] == {"n": 1, "score": 0}


def test_a_kit_that_fails_on_a_video_judges_the_others(bench: Benchmark, kit: Path, tmp_path: Path) -> None:
    script = kit / "run_evaluation.py"
    script.write_text(
        script.read_text().replace(
            "def evaluate(path: Path, truth: Path) -> dict[str, Any]:\n",
            "def evaluate(path: Path, truth: Path) -> dict[str, Any]:\n"
            "    if path.name == '00000.mp4' and 'In-Domain_50' in path.parts and 'maze' in str(path):\n"
            "        sys.exit('the evaluator broke down')\n",
        )
    )
    status, _, err = bench("static", "out")
    assert status == 1 and "ended with exit status 1: the evaluator broke down" in err
    assert read(tmp_path / "out")["n"] == 3 and "broke down" in (tmp_path / "out/poison.jsonl").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda script: script.write_text("import a_package_of_nobody\n"),
            "requirements.txt into an environment",
        ),
        (
            lambda script: script.write_text("raise SystemExit('no licence')\n"),
            "run_evaluation.py does not start",
        ),
        (lambda script: script.unlink(), "it is VBVR-Pro-Bench's kit: give --pro"),
        (lambda script: shutil.rmtree(script.parent), "it is no folder of a kit"),
    ],
)
def test_a_kit_that_does_not_start_is_refused_before_anything_is_generated(
    bench: Benchmark, kit: Path, tmp_path: Path, change: Any, message: str
) -> None:
    change(kit / "run_evaluation.py")
    status, _, err = bench("static", "out")
    assert status == 2 and message in err and not (tmp_path / "out").exists()


def test_a_python_that_is_none(bench: Benchmark) -> None:
    status, _, err = bench("static", "out", "--evalkit-python", "/no/python")
    assert status == 2 and "--evalkit-python /no/python cannot be run" in err


def test_other_layouts_are_named_with_what_was_looked_for(data: Path, kit: Path, run: Run, tmp_path: Path) -> None:
    def refused(folder: Path, *flags: object) -> str:
        command = ["bench", "vbvr", "--method", "static", "--data", folder, "--evalkit", kit, "--out", tmp_path / "out"]
        status, _, err = run(*command, *flags)
        assert status == 2 and not (tmp_path / "out").exists()
        return err

    looked_for = "In-Domain_50 or Out-of-Domain_50, then TASK/00000/{first_frame.png, final_frame.png"
    assert looked_for in (err := refused(tmp_path)) and f"give {data}" in err
    assert looked_for in refused(data / "In-Domain_50") and "does not exist" in refused(tmp_path / "none")
    assert "unknown split 'id'" in refused(data, "--split", "id")
    maze = data / "In-Domain_50/maze_data-generator"
    (maze / "00001/metadata.json").unlink()
    assert "00001 has no metadata.json" in refused(data, "--pro")
    (maze / "00001").rename(maze / "0001")
    assert "0001: an instance is named by five digits" in refused(data)
    (maze / "0001").rename(maze / "00001")
    (maze / "00001/ground_truth.mp4").unlink()
    assert "00001 has no ground_truth.mp4" in refused(data)
    shutil.rmtree(data / "In-Domain_50")
    assert "has no instances in In-Domain_50" in refused(data, "--split", "In-Domain_50")
    status, _, err = run("bench", "vbvr", "--method", "static", "--out", tmp_path / "out")
    assert status == 2 and "needs --data DIR" in err
    status, _, err = run("bench", "microworld", "--method", "static", "--pro", "--out", tmp_path / "out")
    assert status == 2 and "--pro is not for the benchmark microworld" in err


def test_pro_has_an_entry_point_of_its_own_and_counts_missing_videos(
    bench: Benchmark, data: Path, kit: Path, tmp_path: Path
) -> None:
    assert bench("static", "out", "--pro", "--limit", 3)[0] == 0
    results = read(tmp_path / "out")
    assert results["scorer"]["entry_point"] == "run_evaluation_video.py" and results["n"] == 6
    assert results["instances"][0]["subscores"]["task_specific"] == results["instances"][0]["score"] > 0
    missing = Bench(data=str(data), evalkit=str(kit), pro=True).instances(["In-Domain_50"], 4, 1)[3:]
    summary = Bench(data=str(data), evalkit=str(kit), pro=True).summarize(results["instances"], missing)
    assert summary["as_the_kit"] == summary["missing_is_0"] and summary["as_the_kit"]["n"] == 7
    status, _, err = bench("static", "out", "--limit", 3, "--resume")
    assert status == 2 and "holds other results" in err


@pytest.mark.parametrize("text", ["No module named 'easyocr'", "CUDA error: 2", "[Errno 28] No space left on device"])
def test_an_infrastructure_error_is_never_a_0(text: str) -> None:
    assert verdict({"score": 0.0, "error": text}).score is None
    assert verdict({"score": 0.0, "error": "no frame could be read"}).score == 0
    assert verdict({"score": float("nan")}).score is None and verdict({"score": None}).score is None


def test_results_of_another_format_are_refused(tmp_path: Path) -> None:
    for content in ("{}", '{"samples": [{"video_path": "a"}]}', "[", '{"samples": 3}'):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(InputError, match="not of the known format"):
            vbvr.read_samples(tmp_path / "results.json")


def test_an_environment_in_the_kit_s_folder_is_no_source(kit: Path, data: Path) -> None:
    bench = Bench(data=str(data), evalkit=str(kit))
    before = bench.kit.fingerprint()
    for name in (".venv", "venv"):
        (kit / name).mkdir()
        (kit / name / "module.py").write_text("")
    (kit / "venv/pyvenv.cfg").write_text("")
    assert bench.kit.fingerprint() == before
    bench.check(METHODS["static"])
    assert not list(kit.rglob("__pycache__"))


def test_a_table_has_the_paper_s_overall_score_and_figures(data: Path, kit: Path, tmp_path: Path) -> None:
    bench, table = Bench(data=str(data), evalkit=str(kit)), replace(TABLES["I"], main=("static",), others=())
    content = run_table(table, bench, 2, 1, tmp_path / "table")
    for name in ("static", "final-frame"):
        entry, results = content["methods"][name], read(tmp_path / "table" / name)
        assert entry["overall"]["overall"]["value"] == pytest.approx(results["as_the_kit"]["mean_of_splits"])
        assert set(entry["parts"]) == {f"{split}/spatiality" for split in vbvr.SPLITS}
        assert entry["generator_calls_mean"] == entry["vlm_calls_mean"] == 0
    text = (tmp_path / "table" / "table.md").read_text()
    assert text.startswith("VBVR-Bench, scored by run_evaluation.py of VBVR-EvalKit") and "paper" not in text
    assert (Bench(data=str(data), evalkit=str(kit), pro=True).printed_as(), bench.printed_as()) == ("", "vbvr")
    assert vbvr.SPLITS == (IN, OUT)
