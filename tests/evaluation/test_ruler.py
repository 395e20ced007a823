"""RULER-Bench: its data, the judge's message, the arithmetic against numbers by hand, and sweeps with a judge."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Run
from tests.evaluation.loopback import Endpoint, Reply, parts, serve
from tests.evaluation.test_tables import pair, written  # noqa: F401 (fixtures)
from vlmteacher.cli import main
from vlmteacher.errors import InputError, Notice
from vlmteacher.evaluation.models import Models, cover
from vlmteacher.evaluation.ruler import DIMENSIONS, REQUEST, Bench, arithmetic, message, parse_ratings, rate, read_tasks
from vlmteacher.evaluation.tables import Table, run_table
from vlmteacher.media import write_video

IF, VC, VF, RC = DIMENSIONS
QUESTIONS = [{IF: "Does it roll?"}, {VC: "Is it red?"}, {RC: "Does it roll down?"}, {IF: "Does it stop?"}]
ROWS = [
    {
        "prompt": "The ball rolls.",
        "implicit_explanation": "Things roll down.",
        "index": 0,
        "checklist": QUESTIONS,
        "task_name": "physics",
        "category": "science",
        "input_image_path": "images/ball.png",
        "gt_image_path": "images/end.png",
    },
    {
        "prompt": "A red square.",
        "implicit_explanation": "",
        "index": 0,
        "checklist": json.dumps([{VC: "Is it red?"}, {VF: "Is it sharp?"}, {RC: "Is it one?"}]),
        "task_name": "color",
        "category": "vision rule",
        "input_image_path": "",
        "initial_scenario": None,
        "input_video_path": "videos/start.mp4",
    },
    {"prompt": "Go on.", "index": "1", "checklist": str([{RC: "Is it legal?"}]), "task_name": "go", "category": "game"},
    {"prompt": "It falls.", "index": 1, "checklist": QUESTIONS, "task_name": "physics", "category": "science"},
]


def video(path: Path, frames: int = 20, fps: float = 8.0, size: tuple[int, int] = (32, 48)) -> Path:
    """Write a video whose frames are of another grey each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 12
    write_video(path, np.broadcast_to(grey, (frames, *size, 3)), fps)
    return path


def write_data(folder: Path, rows: Any = ROWS) -> Path:
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (96, 64), "red").save(folder / "images/ball.png")
    Image.new("RGB", (80, 64), "blue").save(folder / "images/end.png")
    video(folder / "videos/start.mp4", 5, 2.0)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("ruler") / "data")


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serve() as served:
        yield served


@pytest.fixture
def bench(data: Path, endpoint: Endpoint, tmp_path: Path, pair: Path) -> Bench:  # noqa: F811
    cache = str(tmp_path / "cache")
    return Bench(data=str(data), judge="o", judge_url=endpoint.url, judge_cache=cache, pair=str(pair))


def all_good(request: Any) -> Reply:
    """As many ratings as there are questions: Medium for the first one, Good for the others."""
    count = str(parts(request)[-1]).count("\n")
    return Reply(f"<think>fine</think><answer>{json.dumps(['Medium', *['Good'] * (count - 1)])}</answer>")


# ---------------------------------------------------------------- data and message


def test_rows_are_read_in_each_of_their_forms(data: Path) -> None:
    ball, square, go, _ = read_tasks(data)
    assert ball.checklist == tuple((name, text) for each in QUESTIONS for name, text in each.items())
    assert [name for name, _ in square.checklist] == [VC, VF, RC] and go.checklist == ((RC, "Is it legal?"),)
    assert (ball.name, ball.index, go.index) == ("physics", "0", "1")
    assert square.image is None and square.video == data / "videos/start.mp4" and go.media == []


def test_the_message_has_the_documented_order(data: Path, tmp_path: Path) -> None:
    ball, square, _, _ = read_tasks(data)
    made = video(tmp_path / "made.mp4", 20, 8.0, (600, 1200))
    content = message(ball, made)
    kinds = ["text" if isinstance(part, str) else part.size for part in content]
    assert kinds == ["text", (96, 64), "text", "text", (80, 64), "text", "text", *[(512, 256)] * 5, "text"]
    texts = [part for part in content if isinstance(part, str)]
    assert texts[1].endswith("\nThe ball rolls.") and texts[3].endswith("\nThings roll down.")
    assert texts[-1].splitlines()[1:] == [
        "1. Does it roll?",
        "2. Is it red?",
        "3. Does it roll down?",
        "4. Does it stop?",
    ]
    greys = [np.asarray(part).mean() for part in content[7:12] if not isinstance(part, str)]
    assert greys == pytest.approx([12 * k for k in (0, 4, 8, 12, 16)], abs=4)  # every int(8 / 2)-th

    content = message(square, video(tmp_path / "odd.mp4", 7, 3.9))  # int(3.9 / 2) is 1
    kinds = ["text" if isinstance(part, str) else part.size for part in content]
    assert kinds == ["text", "text", *[(48, 32)] * 5, "text", *[(48, 32)] * 7, "text"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"category": "art"}, "unknown category 'art': choose from science, game"),
        ({"task_name": "../up"}, r"task_name '../up' cannot be part of a file's name"),
        ({"index": None}, "index None cannot be"),
        ({"index": True}, "index True cannot be"),
        ({"checklist": []}, "is no question of a checklist"),
        ({"checklist": "[{"}, "the checklist is no list of dimensions and questions"),
        ({"checklist": [{"Beauty": "Is it?"}]}, "of the dimensions Instruction Following"),
        ({"checklist": [{VC: "Is it?", VF: "Is it?"}]}, "is no question"),
        (
            {"input_image_path": "images/none.png"},
            "none.png' does not exist in .*: download the data set whole",
        ),
        ({"gt_image_path": "a" * 5000}, "does not exist in"),
        ({"task_name": "a" * 5000}, "cannot be part of a file's name"),
        ({"input_image_path": "../data.jsonl"}, "is outside of"),
        ({"input_image_path": "/etc/hostname"}, "is outside of"),
    ],
)
def test_lines_that_cannot_be_used_are_named(tmp_path: Path, change: Any, reason: str) -> None:
    folder = write_data(tmp_path / "data", [ROWS[1], ROWS[0] | change])
    with pytest.raises(InputError, match=reason) as error:
        read_tasks(folder)
    assert "data.jsonl, line 2" in str(error.value) and "\n" not in str(error.value)


def test_another_layout_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no data\.jsonl: give the folder of a whole copy"):
        read_tasks(tmp_path)
    for text, reason in (
        ("", "is empty"),
        ("[1]\n", "line 1 is no JSON object"),
        ("{}\n", "has no prompt and no index"),
        ("{\n", "line 1 is not JSON"),
    ):
        folder = tmp_path / reason.replace(" ", "")
        folder.mkdir()
        (folder / "data.jsonl").write_text(text)
        with pytest.raises(InputError, match=reason):
            read_tasks(folder)


def test_two_lines_of_one_video_count_once(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data", [ROWS[0], ROWS[0] | {"prompt": "Again."}, ROWS[1]])
    assert [task.prompt for task in read_tasks(folder)] == ["The ball rolls.", "A red square."]


# ---------------------------------------------------------------- arithmetic


def test_ratings_of_one_video_by_hand(data: Path) -> None:
    ball, square, go, _ = read_tasks(data)
    # IF: (2 + 0) / 2 = 1, VC 1, VF without a question 0, RC 2; of 2
    assert rate(ball, ["Good", "Medium", "Good", "Poor"]) == {IF: 0.5, VC: 0.5, VF: 0.0, RC: 1.0}
    assert rate(square, ["Good", "Poor", "Medium"]) == {VC: 1.0, VF: 0.0, RC: 0.5}  # the vision rule has no IF
    assert rate(go, ["Good"]) == {IF: 0.0, VC: 0.0, VF: 0.0, RC: 1.0}


def test_the_three_overall_scores_by_hand() -> None:
    def row(category: str, task: str, *values: float) -> dict[str, Any]:
        subscores = dict(zip(DIMENSIONS[-len(values) :], values, strict=True))
        return {"category": category, "task": task, "subscores": subscores, "score": sum(values) / len(values)}

    rows = [
        row("science", "physics", 0.5, 0.5, 0.0, 1.0),  # 0.5
        row("science", "physics", 1.0, 1.0, 1.0, 1.0),  # 1.0
        row("science", "math", 0.0, 0.75, 0.5, 0.25),  # 0.375
        row("vision rule", "color", 1.0, 0.0, 0.5),  # 0.5
    ]
    result = arithmetic(rows)
    # science: IF 1.5/3, VC 2.25/3, VF 1.5/3, RC 2.25/3; vision rule: VC 1, VF 0, RC 0.5
    assert result["categories"]["science"] == {IF: 50.0, VC: 75.0, VF: 50.0, RC: 75.0, "average": 62.5, "n": 3}
    assert result["categories"]["vision rule"] == {VC: 100.0, VF: 0.0, RC: 50.0, "average": 50.0, "n": 1}
    assert result["dimensions"] == {IF: 50.0, VC: 87.5, VF: 25.0, RC: 62.5}
    assert result["overall"] == pytest.approx(56.25)  # (50 + 87.5 + 25 + 62.5) / 4
    assert result["task_mean"] == pytest.approx((75 + 37.5 + 50) / 3)
    assert result["category_mean"] == pytest.approx(56.25)
    assert arithmetic(rows[3:])["overall"] == pytest.approx(50.0)  # three dimensions
    assert arithmetic([])["overall"] is arithmetic([])["task_mean"] is None


def test_ratings_are_read_as_a_json_list_or_bare_words() -> None:
    assert parse_ratings(2)('<answer>["Good", "Poor"]</answer>') == ["Good", "Poor"]
    assert parse_ratings(2)("<think>a</think>\n<answer>\n[ Good,'Medium' ]\n</answer> done") == ["Good", "Medium"]
    for reply in ('<answer>["good"]</answer>', "<answer>Good</answer>", "<answer>[Good]"):
        with pytest.raises(ValueError, match=r"it has no <answer>|is none of"):
            parse_ratings(1)(reply)


# ---------------------------------------------------------------- sweeps


def test_splits_tasks_and_limits(bench: Bench) -> None:
    every = bench.instances(bench.splits, 10, 2)
    assert [one.id for one in every] == ["physics/0", "color/0", "physics/1", "go/1"] * 2  # the tasks take turns
    assert [one.split for one in every[:4]] == ["main", "main", "main", "game"]
    assert len({one.key for one in every}) == 8 and bench.path(every[0]) == "physics/0.mp4"
    assert [one.id for one in bench.instances(["main"], 2, 1)] == ["physics/0", "color/0"]
    with pytest.raises(InputError, match="unknown split 'id': choose from main, game"):
        bench.instances(["id"], 1, 1)
    assert bench.load(every[1]) == ("A red square.", None)
    image = bench.load(every[0])[1]
    assert image is not None and image.size == (96, 64)
    truth = bench.final_frame(every[0])
    assert truth is not None and truth.getpixel((0, 0)) == (0, 0, 255)


def test_a_first_frame_gives_its_video_its_proportions() -> None:
    class Size:
        height, width, spatial_stride, patch = 704, 1280, 16, (2, 2)

    for given, expected in (((1280, 704), (704, 1280)), ((1000, 1000), (960, 960)), ((500, 1100), (1408, 640))):
        image, size = cover(Image.new("RGB", given), Size)  # type: ignore[arg-type]
        assert image is not None and size == expected and image.size == expected[::-1]
    assert cover(None, Size) == (None, (704, 1280))  # type: ignore[arg-type]


def test_a_sweep_with_a_judge(bench: Bench, endpoint: Endpoint, run: Run, tmp_path: Path) -> None:
    endpoint.replies = all_good
    flags = ["--data", bench.data, "--judge", "o", "--judge-url", endpoint.url, "--judge-cache", bench.judge_cache]
    command = ["bench", "ruler", "--method", "base", "--pair", bench.pair, *flags]
    out = tmp_path / "out"
    status, text, err = run(*command, "--out", out)
    assert status == 0, err
    assert "RULER-Bench, rated by o. From 0 to 100:" in text and "(the published evaluation's)" in text
    assert len(endpoint.requests) == 4 and endpoint.requests[0]["messages"][0]["content"] == REQUEST
    assert (out / "videos/base/physics/1.mp4").is_file() and (out / "videos/base/go/1.mp4").is_file()
    results = json.loads((out / "results.json").read_text())
    assert results["judge"] == "o" and results["scorer"]["judge_url"] == endpoint.url and results["excluded"] == 0
    # science, twice: IF (1 + 2) / 2 of 2, VC and RC full, VF none; vision rule: VC 1 of 2; game: RC 1 of 2 alone
    assert results["dimensions"] == pytest.approx({IF: 37.5, VC: 50.0, VF: 100 / 3, RC: 250 / 3})
    assert results["overall"] == pytest.approx(100 * results["score"])
    assert results["splits"]["main"]["dimensions"] == {IF: 75.0, VC: 75.0, VF: 50.0, RC: 100.0}
    assert results["splits"]["game"]["n"] == 1
    row = results["instances"][0]
    assert row["ratings"] == ["Medium", "Good", "Good", "Good"] and row["category"] == "science"
    assert row["subscores"] == {IF: 0.75, VC: 1.0, VF: 0.0, RC: 1.0} and row["score"] == 0.6875

    assert run(*command, "--out", out, "--rescore")[0] == 0
    assert run(*command, "--out", tmp_path / "again")[0] == 0  # the same videos
    assert len(endpoint.requests) == 4
    status, _, err = run(*command, "--out", out, "--resume", "--judge", "p")
    assert status == 2 and "another version of the scorer" in err
    assert run(*command, "--out", out, "--rescore", "--judge", "p")[0] == 0 and len(endpoint.requests) == 8


def test_a_table_has_the_judges_name_and_three_overall_scores(bench: Bench, endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.replies = all_good
    table = Table(name="II", main=("base", "pass@2"), against=("base",), parts="task")
    content = run_table(table, bench, 10, 1, tmp_path / "table")
    assert content["caption"] == "RULER-Bench, rated by o." and content["splits"] == ["main"]
    sampled = content["methods"]["pass@2"]
    assert list(sampled["overall"]) == ["overall", "task_mean", "category_mean"]
    # science: 75, 100, 0 and 100; the vision rule: 50, 100 and 100
    assert sampled["overall"]["overall"]["value"] == pytest.approx((75 + 75 + 50 + 100) / 4)
    assert sampled["oracle"]["overall"]["overall"]["value"] == pytest.approx(75)
    assert sampled["parts"]["color"]["score"] == pytest.approx((0.5 + 1 + 1) / 3)
    text = (tmp_path / "table/table.md").read_text()
    assert text.startswith("RULER-Bench, rated by o.") and "| paper: base |" in text
    assert (row := next(line for line in text.splitlines() if line.startswith("| color |"))) and "31.5" in row


def test_what_is_not_rated_is_excluded_and_counted(bench: Bench, endpoint: Endpoint, run: Run, tmp_path: Path) -> None:
    def refuse_some(request: Any) -> Reply:
        prompt = next(part for part in parts(request) if isinstance(part, str) and part.startswith("The prompt"))
        if "Go on." in prompt:
            return Reply("I would rather not.")
        return Reply(status=400, body="{}") if "A red square." in prompt else all_good(request)

    endpoint.replies = refuse_some
    flags = ["--data", bench.data, "--judge", "o", "--judge-url", endpoint.url, "--judge-cache", bench.judge_cache]
    command = ["bench", "ruler", "--method", "base", "--pair", bench.pair, *flags, "--out", tmp_path / "out"]
    status, _, err = run(*command)
    assert status == 1 and "2 of the instances failed" in err
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["n"], results["excluded"], list(results["categories"])) == (2, 2, ["science"])
    assert results["dimensions"][RC] == 100.0
    poison = [json.loads(line) for line in (tmp_path / "out/poison.jsonl").read_text().splitlines()]
    assert {one["id"]: one["failure"] for one in poison}["go/1"].startswith("two replies of the judge cannot be used")

    (tmp_path / "out/videos/base/physics/0.mp4").write_bytes(b"no video")
    endpoint.replies, asked = all_good, len(endpoint.requests)
    status, _, err = run(*command, "--rescore")
    assert status == 1 and len(endpoint.requests) == asked + 2  # the two that have no reply yet
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["n"], results["excluded"]) == (3, 1)
    (poison,) = map(json.loads, (tmp_path / "out/poison.jsonl").read_text().splitlines())
    assert "physics/0.mp4 cannot be read" in poison["failure"]
    (tmp_path / "out/videos/base/physics/0.mp4").unlink()
    assert run(*command, "--resume")[0] == 0  # makes it again
    assert json.loads((tmp_path / "out/results.json").read_text())["n"] == 4

    endpoint.replies = lambda _: Reply(status=401, body="{}")
    status, _, err = run(*command, "--rescore", "--judge", "q")
    assert status == 2 and "refuses the request (status 401): set VLMTEACHER_JUDGE_KEY" in err.splitlines()[-1]


@pytest.mark.parametrize(("ending", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_sweep_that_ends_while_it_is_rated_goes_on(
    endpoint: Endpoint, run: Run, tmp_path: Path, ending: signal.Signals, status: int
) -> None:
    """Neither ending waits for the requests that are under way."""
    rows = [ROWS[0] | {"index": index, "prompt": f"The ball rolls {index} times."} for index in range(5)]
    folder = write_data(tmp_path / "data", rows)
    flags = ["--data", folder, "--judge", "o", "--judge-url", endpoint.url, "--num-frames", 5]
    command = ["bench", "ruler", "--method", "static", *flags, "--judge-cache", tmp_path / "cache", "--out"]

    def rate(request: Any) -> Reply:
        stuck = any("rolls 3 times" in str(part) or "rolls 4 times" in str(part) for part in parts(request))
        return Reply("<answer>[Good, Poor, Medium, Good]</answer>", wait=stuck)

    endpoint.replies = rate
    arguments = [*map(str, command), str(tmp_path / "out")]
    child = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(main(arguments)))
    child.start()
    scores = tmp_path / "out/scores.jsonl"
    while len(endpoint.requests) < 5 or scores.read_text().count("\n") < 3:
        assert child.is_alive()
        time.sleep(0.01)
    os.kill(child.pid or 0, ending)
    child.join()
    assert child.exitcode == status
    videos = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/videos").rglob("*.mp4")}
    endpoint.replies = [Reply("<answer>[Good, Poor, Medium, Good]</answer>")]
    endpoint.requests.clear()
    assert run(*command, tmp_path / "out", "--resume")[0] == 0
    assert len(endpoint.requests) == 2 and len(videos) == 5
    assert {path: path.stat().st_mtime_ns for path in videos} == videos
    assert run(*command, tmp_path / "whole")[0] == 0 and len(endpoint.requests) == 2
    resumed, whole = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("out", "whole"))
    for results in (resumed, whole):
        for row in (results, *results["instances"]):
            for entry in [entry for entry in row if "seconds" in entry]:
                del row[entry]
    assert resumed == whole and whole["n"] == 5


def test_a_judge_that_is_the_teacher_gives_a_notice(
    data: Path, models: dict[str, str], recwarn: pytest.WarningsRecorder
) -> None:
    teacher = models["teacher"]
    for judge, url, expected in (
        (f"local:{teacher}/", None, 1),
        (teacher, "http://localhost/v1", 1),
        ("o", "http://localhost/v1", 0),
    ):
        recwarn.clear()
        Bench(data=str(data), judge=judge, judge_url=url, models=Models(teacher=teacher))
        notices = [str(each.message) for each in recwarn if each.category is Notice]
        assert len(notices) == expected and all("is the Teacher too: it rates" in text for text in notices)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": ""}, "bench ruler needs --data DIR"),
        ({"judge": ""}, "bench ruler needs --judge MODEL"),
        ({"judge_url": None}, "--judge o needs --judge-url URL"),
        ({"judge_requests": 0}, "--judge-requests must be greater than 0, not 0"),
        ({"judge_timeout": -1.0}, "--judge-timeout must be greater than 0"),
        ({"vlm_url": "http://localhost/v1"}, "needs --vlm MODEL"),
        ({"vlm": "o"}, "--vlm o needs --vlm-url URL"),
    ],
)
def test_flags_that_cannot_be_used(data: Path, given: Any, message: str) -> None:
    usable: dict[str, Any] = {"data": str(data), "judge": "o", "judge_url": "http://localhost/v1"}
    with pytest.raises(InputError, match=message):
        Bench(**usable | given)


def test_the_data_may_be_moved_but_not_changed(bench: Bench, tmp_path: Path) -> None:
    def described(folder: Path) -> Any:
        return Bench(data=str(folder), judge="p", judge_url="http://localhost/v1", pair=bench.pair).described()

    first, second = write_data(tmp_path / "a"), write_data(tmp_path / "b")
    assert described(first) == described(second)
    Image.new("RGB", (96, 64), (1, 2, 3)).resize((95, 64)).save(second / "images/ball.png")
    read_tasks.cache_clear()
    assert described(first) != described(second)
