"""VR-Bench on mazes of the microworld in its layout, through a stand-in kit in a process of its own; faults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Run
from tests.evaluation import stand_in_vr_kit
from vlmteacher.errors import InputError
from vlmteacher.evaluation.vr_bench import Bench, kit_means, read_results, verdict
from vlmteacher.media import write_video
from vlmteacher.microworld import world

PROMPTS = """
import json
from pathlib import Path
def get_dynamic_prompt(game_type, skin_id):
    skin = Path(__file__).parents[1] / "skins" / game_type / skin_id / "description.json"
    return "Lead the " + json.loads(skin.read_text())["visual_description"]["player"] + " to the goal."
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two easy mazes and a hard one, of one skin, and the kit."""
    root = tmp_path_factory.mktemp("vr")
    for index, name in enumerate(("easy_1", "easy_2", "hard_1")):
        folder = root / "data/eval/maze/1" / name.partition("_")[0]
        for kind in ("images", "states", "videos"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        frames = (world.render(world.instance(index, 3, "id", ["maze"])[0]) * 255).round().astype(np.uint8)
        Image.fromarray(frames[0]).save(folder / "images" / f"{name}.png")
        (folder / "states" / f"{name}.json").write_text("{}")
        write_video(folder / "videos" / f"{name}_0.mp4", frames, world.FPS)
    kit = root / "kit"
    for path in ("evaluation/videomodel_eval", "prompts", "skins/maze/1"):
        (kit / path).mkdir(parents=True)
    shutil.copy(stand_in_vr_kit.__file__, kit / "evaluation/videomodel_eval/batch_evaluate.py")
    (kit / "prompts/__init__.py").write_text(PROMPTS)
    (kit / "skins/maze/1/description.json").write_text('{"visual_description": {"player": "red disc"}}')
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "vr")


@pytest.fixture
def bench(run: Run, root: Path) -> Callable[..., tuple[int, str, str]]:
    def bench(method: str, *flags: object) -> tuple[int, str, str]:
        command = ["bench", "vr-bench", "--method", method, "--data", root / "data", "--evalkit", root / "kit"]
        return run(*command, "--out", root / method, *flags)

    return bench


def read(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def test_the_controls_and_the_kit_s_metrics(bench: Any, root: Path) -> None:
    status, text, err = bench("final-frame", "--num-frames", 5)
    assert status == 0, err
    assert "batch_evaluate.py, tracker ncc, tolerance 0.01" in text and "missing = 0, all" in text
    results = read(root / "final-frame")
    assert [row["id"] for row in results["instances"]] == [
        f"eval/maze/1/{name}" for name in ("easy_1", "hard_1", "easy_2")
    ]
    assert {row["prompt"] for row in results["instances"]} == {"Lead the red disc to the goal."}
    assert (root / "final-frame/videos/final-frame/eval/maze/1/hard_1.mp4").is_file()
    assert results["success_rate"] == 1 and 0 < results["score"] < 1
    cells = results["as_the_kit"]
    assert cells["all"]["sr"] == 1 and cells["all"]["sd"] == 0.25 and cells["all"]["em"] == 0
    assert cells["easy"]["n"] == 2 and cells["hard"]["n"] == 1 and cells == results["missing_is_0"]
    pr = [cells[name]["pr"] for name in ("easy", "hard")]
    assert cells["mean of difficulties"]["pr"] == pytest.approx(sum(pr) / 2)
    assert bench("static", "--path-tracker", "csrt", "--path-tolerance", 0.0001)[0] == 0
    still = read(root / "static")
    assert still["success_rate"] == 0 and still["as_the_kit"]["all"]["sd"] is None
    assert still["scorer"]["tracker"] == "csrt" and still["scorer"]["path_tolerance"] == 0.0001
    status, _, err = bench("static", "--resume")
    assert status == 2 and "another version of the scorer" in err


def test_what_the_kit_cannot_judge_is_no_0(bench: Any, root: Path) -> None:
    assert bench("static")[0] == 0
    (root / "static/videos/static/eval/maze/1/easy_1.mp4").write_bytes(b"no video")
    status, _, err = bench("static", "--rescore")
    assert status == 1 and "Cannot open video" in err
    results = read(root / "static")
    assert results["n"] == 2 and results["missing"] == 1 and results["missing_is_0"]["all"]["n"] == 3
    script = root / "kit/evaluation/videomodel_eval/batch_evaluate.py"
    script.write_text(
        script.read_text().replace(
            "    try:\n", "    if path.stem == 'easy_2': raise SystemExit('gone')\n    try:\n", 1
        )
    )
    status, _, err = bench("static", "--rescore")
    assert status == 1 and [row["id"] for row in read(root / "static")["instances"]] == ["eval/maze/1/hard_1"]
    assert "VR-Bench ended with exit status 1: gone" in (root / "static/poison.jsonl").read_text()


def test_other_layouts_and_kits_are_refused(bench: Any, root: Path, run: Run) -> None:
    def refused(*flags: object) -> str:
        status, _, err = bench("static", *flags)
        assert status == 2 and not (root / "static").exists()
        return str(err)

    looked_for = "looked for eval or train, then GAME/SKIN/easy|medium|hard/"
    assert looked_for in refused("--data", root / "data/eval")
    assert "has no instances in train" in refused("--split", "train")
    assert "unknown split 'id'" in refused("--split", "id")
    assert "is no folder of a kit" in refused("--evalkit", root / "none")
    assert "--path-tolerance must be" in refused("--path-tolerance", 1)
    easy = root / "data/eval/maze/1/easy"
    (easy / "videos/easy_1_0.mp4").unlink()
    assert "no videos/easy_1.mp4 or easy_1_0.mp4" in refused()
    (easy / "states/easy_1.json").unlink()
    assert "no states/easy_1.json" in refused()
    (easy / "images/easy_1.png").rename(easy / "images/1.png")
    assert "is not named easy_NUMBER.png" in refused()
    (easy / "images/1.png").unlink()
    (root / "kit/skins/maze/1/description.json").unlink()
    status, _, err = bench("static")
    assert status == 2 and "VR-Bench ended with exit status 1: FileNotFoundError" in err
    status, _, err = run("bench", "vr-bench", "--method", "static", "--out", root / "out")
    assert status == 2 and "needs --data DIR" in err
    status, _, err = bench("static", "--vlm-url", "http://127.0.0.1:1/v1")
    assert status == 2 and "--vlm-url http://127.0.0.1:1/v1 needs --vlm MODEL" in err


def test_verdicts_of_the_kit() -> None:
    whole = {"status": "success", "pr": 0.5, "sr": 1.0, "em": 0.0, "mf": 0.9, "sd": None}
    score = verdict(whole)
    assert (score.success, score.score, "sd" in score.subscores) == (True, 0.5, False)
    assert verdict(whole | {"sr": 0.0}).success is False
    assert verdict(whole | {"pr": None}).score is None and verdict({"status": "error", "error": "x"}).score is None


def test_means_are_the_kit_s() -> None:
    rows = [
        {"category": name, "subscores": {"pr": pr, "sr": 1.0, "em": 0.0, "mf": 1.0, **more}}
        for name, pr, more in (("easy", 0.0, {"sd": 0.5}), ("easy", 0.5, {}), ("hard", 1.0, {}))
    ]
    means = kit_means(rows)
    assert means["easy"] == {"n": 2, "pr": 0.25, "sr": 1, "em": 0, "mf": 1, "sd": 0.5}
    assert means["all"]["pr"] == 0.5 and means["all"]["sd"] == 0.5
    assert means["mean of difficulties"]["pr"] == 0.625 and means["mean of difficulties"]["sd"] == 0.25
    assert "medium" not in means


def test_results_of_another_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "easy").mkdir()
    for content in ("{}", '{"results": [{}]}', "["):
        (tmp_path / "easy/evaluation_results.json").write_text(content)
        with pytest.raises(InputError, match="not of the known format"):
            read_results(tmp_path)


def test_the_mazes_without_a_path_number_are_found(root: Path) -> None:
    videos = root / "data/eval/maze/1/easy/videos"
    (videos / "easy_1_0.mp4").rename(videos / "easy_1.mp4")
    bench = Bench(data=str(root / "data"), evalkit=str(root / "kit"))
    assert bench.final_frame(bench.instances(["eval"], 1, 1)[0]).size == (world.SIZE, world.SIZE)
