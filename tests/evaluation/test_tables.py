"""A whole table on tiny models of the real classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.progress_output import check_events, curves, tracked_settings
from tests.tiny_pair import QUERIES
from vlmteacher.errors import InputError
from vlmteacher.evaluation import microworld, sweep, tables
from vlmteacher.evaluation.failures import CAUSES
from vlmteacher.evaluation.formats import format_table
from vlmteacher.evaluation.microworld import Bench
from vlmteacher.evaluation.tables import Table, run_table
from vlmteacher.microworld import world
from vlmteacher.queries import QuerySet

SMALL = Table(
    main=("base", "pass@2", "teacher"),
    others=("steps@0", "steps@1", "steps@3", "goal-only", "many-step"),
    against=("base", "pass@2"),
)


@pytest.fixture(scope="module")
def pair(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random pair, in the microworld's size, and its Reasoner sampled in many steps beside it."""
    folder = tmp_path_factory.mktemp("world-pair")
    for name, changes in (("reasoner", {}), ("many", {"sampler": "euler", "timesteps": [1000, 800, 600, 400, 200]})):
        shutil.copytree(models["reasoner"], folder / name)
        settings = json.loads((folder / name / "reasoner.json").read_text())
        settings |= {"num_frames": world.NUM_FRAMES, "height": world.SIZE, "width": world.SIZE} | changes
        (folder / name / "reasoner.json").write_text(json.dumps(settings))
    defaults = {"max_steps": 2, "threshold": 1e-6, "learning_rate": 0.03, "rank": 2, "teacher_frames": 4}
    description = {**models, "reasoner": "reasoner", "defaults": defaults}
    (folder / "pair.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(autouse=True)
def written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights write nothing."""
    asked = QuerySet.from_dict(QUERIES)
    monkeypatch.setattr("vlmteacher.teachers.qwen_vl.QwenVLTeacher.write_queries", lambda *_: asked)


@pytest.mark.slow
def test_a_table_is_taken_up_and_says_what_is_missing(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, out = Bench(pair=str(pair), trace=True), tmp_path / "table"
    done: list[str] = []
    work = sweep._work

    def interrupted(bench: Bench, job: Any) -> Any:
        if len(done) == 9:
            raise KeyboardInterrupt
        done.append(job.method.name)
        return work(bench, job)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "_work", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_table(SMALL, bench, 1, 2, out)
    assert not (out / "table.json").exists() and json.loads((out / "base" / "results.json").read_text())["n"] == 4
    with (out / "teacher" / "instances.jsonl").open("a") as log:
        log.write('{"cut')
    with pytest.raises(InputError, match="is not empty"):
        run_table(SMALL, bench, 1, 2, out)
    monkeypatch.setattr(sweep, "_work", lambda bench, job: (done.append(job.method.name), work(bench, job))[1])
    result = run_table(SMALL, bench, 1, 2, out, resume=True)
    # 2 splits, of the main methods 2 noises; one run for all numbers of steps, none for 0
    assert {name: done.count(name) for name in done} == {
        **{"base": 4, "pass@2": 4, "teacher": 4},
        **{"steps": 2, "goal-only": 2},
    }
    assert result == json.loads((out / "table.json").read_text())
    assert set(result["missing"]) == {"many-step"} and "--many-step" in result["missing"]["many-step"]
    assert list(result["methods"]) == ["base", "pass@2", "teacher", "steps@0", "steps@1", "steps@3", "goal-only"]
    for name, entry in result["methods"].items():
        results = json.loads((out / name / "results.json").read_text())
        here = results["instances"]
        assert results["method"] == name and results["n"] == entry["n"] == len(here)
        assert entry["success_rate"] == results["success_rate"] and entry["score"] == pytest.approx(results["score"])
        assert entry["low"] <= entry["success_rate"] <= entry["high"]
        assert {row["split"] for row in here} == {"id", "ood"} and {row["method"] for row in here} == {name}
        assert all(row["success"] == (min(row["subscores"].values()) == 1) for row in here)
        assert all(row["truths"] == [["goal", None]] * 3 for row in here)  # no query is one of the world's
        if not name.startswith("pass@"):
            assert sum(entry["failures"].values()) == sum(not row["success"] for row in here)
            assert entry["failures"] == results["failures"] and entry["judgements"] == len(here)
    again = run_table(SMALL, bench, 1, 2, out, resume=True)
    assert again == result and len(done) == 16
    text = format_table(result)
    caption, methods, failures, missing = text.split("\n\n")
    assert caption == "The microworld, seed 1, judged by its rule scorer." and missing.startswith(
        "Not run: many-step: "
    )
    assert "| pass@2, the scorer's choice |" in methods and "| many-step | not run |" in methods
    assert {line.count("|") for line in methods.splitlines()} == {len(SMALL.against) + 11}
    assert {line.count("|") for line in failures.splitlines()} == {len(CAUSES) + 6}
    assert [line.split(" | ")[0] for line in failures.splitlines()[2:]] == [
        f"| {name}" for name in result["methods"] if name != "pass@2"
    ]
    assert (out / "table.md").read_text() == text + "\n" and (out / "table.tex").exists()
    assert f"teacher,,score,{result['methods']['teacher']['score']}" in (out / "table.csv").read_text()


def test_many_steps_need_their_reasoner(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--many-step"):
        microworld.run_benchmark("many-step", 1, 1, tmp_path / "a", pair=str(pair))
    few = microworld.run_benchmark("teacher", 1, 1, tmp_path / "b", pair=str(pair))
    many = microworld.run_benchmark("many-step", 1, 1, tmp_path / "c", pair=str(pair), many_step=str(pair / "many"))
    assert many["instances"][0]["loss_first"] == few["instances"][0]["loss_first"]  # the same one-step prediction
    assert many["instances"][0]["loss_final"] != few["instances"][0]["loss_final"]
    assert many["instances"][0]["updates"] == 2


@pytest.mark.slow
def test_warm_methods_start_from_the_instances_before(pair: Path, tmp_path: Path) -> None:
    """In this process (only here are the queries written), with any number of workers."""
    plain = microworld.run_benchmark("teacher", 2, 1, tmp_path / "plain", pair=str(pair))
    before, after = (step["loss"] for step in plain["instances"][0]["steps"][:2])
    assert after < before
    own = tmp_path / "pair"
    shutil.copytree(pair, own)
    description = json.loads((own / "pair.json").read_text())
    description["defaults"] |= {"threshold": (before + after) / 2}  # the first instance reaches it by one update
    (own / "pair.json").write_text(json.dumps(description))
    alone = microworld.run_benchmark("warm", 2, 1, tmp_path / "alone", workers=2, pair=str(own))
    first, second = alone["instances"]
    assert first["updates"] == 1 and "warm_start" not in first and first["queries"] == QUERIES
    (entry, *_) = sorted((tmp_path / "alone" / "warm_starts").glob("*.json"))
    assert json.loads(entry.read_text())["updates"] == 1 and second["warm_start"]["from"] == entry.stem

    table = Table(main=("base", "teacher", "warm", "warm-mean"), against=("base", "teacher"))
    run_table(table, Bench(pair=str(own)), 1, 1, tmp_path / "table", keep_videos=True)
    rows = {
        name: json.loads((tmp_path / "table" / name / "results.json").read_text())["instances"] for name in table.main
    }
    assert {name for name in table.main if "warm_start" in rows[name][1]} == {"warm", "warm-mean"}
    assert rows["warm"][0]["steps"] == rows["teacher"][0]["steps"]
    assert rows["warm-mean"][1]["warm_start"]["from"] == "mean"
    assert all((tmp_path / "table" / name / row["video"]).is_file() for name in table.main for row in rows[name])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "videos", "calls"), [("pe", 1, 1), ("videotpo@2", 4, 8)])
def test_methods_that_rewrite_prompts_are_kept_and_taken_up(
    pair: Path, tmp_path: Path, run: Run, name: str, videos: int, calls: int
) -> None:
    """Texts of random weights are nonsense, and the sweep goes on."""
    command = ["bench", "microworld", "--method", name, "--pair", pair, "--limit", 1, "--out", tmp_path / "a"]
    status, printed, err = run(*command, "--json", "--tracker", "tensorboard")
    assert status == 0, err
    lines = check_events(printed, "bench", name, 1, "id", "success", "score", "loss_final", "seconds", "memory")
    assert lines[-1]["n"] == 1 and (tmp_path / "a" / "results.json") == Path(lines[-1]["results"])
    assert curves(tmp_path / "a" / "logs")[f"{name}/score"][0][0] == 1
    assert tracked_settings(tmp_path / "a" / "logs")["method"] == name
    first = json.loads((tmp_path / "a" / "results.json").read_text())
    both = microworld.run_benchmark(name, 2, 1, tmp_path / "a", pair=str(pair), resume=True)
    assert both["method"] == name and both["instances"][0] == first["instances"][0] and both["n"] == 2
    for row in both["instances"]:
        assert (row["generator_calls"], row["vlm_calls"]) == (videos, calls)
        assert row["prompt"] == world.instance(row["index"], 1, "id")[1]


def test_the_command_line_says_what_is_wrong(run: Run, tmp_path: Path) -> None:
    for arguments, message in (
        (["--table", "chess"], "choose from I, II, III, IV, paper, rewards, warm, remedies"),
        (["--table", "I", "--other-teacher", "a/b"], "--table IV"),
        (["--table", "paper", "--split", "ood"], "--split"),
        (["--table", "paper", "--lora-blocks", "last:1"], "--lora-blocks"),
        (["--table", "paper", "--method", "base"], "not allowed"),
        (["--method", "pe"], "method 'pe' rewrites prompts, and the teacher of the packaged pair writes queries"),
        (["--method", "videotpo@2"], "take an instruction-tuned VLM as the Teacher"),
        (["--method", "base", "--seeds", 0], "--seeds"),
        ([], "required"),
    ):
        status, _, err = run("bench", "microworld", *arguments, "--out", tmp_path / "a")
        assert status == 2 and message in err and err.count("\n") == 1, arguments
    assert list(tmp_path.iterdir()) == []


def test_the_tables_name_methods_that_are_there() -> None:
    for table in tables.TABLES.values():
        assert table.main[0] == "base" and set(table.against) <= set(table.main)
        assert {*table.teachers, *table.reasoners} <= set(table.main)
        for name in {*table.main, *table.others}:
            assert tables.find_method(name).rows == (name,)
