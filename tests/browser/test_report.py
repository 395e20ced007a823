"""report.html in a browser: nothing is loaded, both videos move in step, keyboard, dark, phone, missing files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browser.conftest import Open, shot, until
from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.queries import QuerySet
from vlmteacher.runs.pages import video_url
from vlmteacher.runs.report import run_report

IN_STEP = """([frame, fps]) => [...document.querySelectorAll('video')].every(
    (video) => !video.seeking && video.readyState >= 2 && Math.floor(video.currentTime * fps) === frame)"""


@pytest.fixture(scope="module")
def run_folder(pipe: TeacherPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    queries = QuerySet(
        'Is <b onclick=alert(1)>it</b> " in?', (QUERIES["process"][0], "</script><script>alert(1)</script>?")
    )
    settings: dict[str, Any] = {"max_steps": 12, "teacher_frames": 4, "rank": 2, "learning_rate": 0.03}
    pipe(PROMPT + " <img src=x onerror=alert(1)>", queries=queries, run_dir=folder, progress=False, **settings)
    return folder


@pytest.fixture
def copy(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


def rendered(folder: Path, **changed: Any) -> Path:
    record = json.loads((folder / "run.json").read_text())
    (folder / "report.html").write_text(run_report(folder, record | changed))
    return folder / "report.html"


def wait_for_frame(page: Any, frame: int, fps: float) -> None:
    until(page, IN_STEP, [frame, fps])


def test_scrubber_and_keys_move_both_videos(run_folder: Path, open_page: Open) -> None:
    page = open_page(run_folder / "report.html")
    record = json.loads((run_folder / "run.json").read_text())
    fps, last = record["fps"], record["config"]["num_frames"] - 1
    assert page.locator("video").count() == 2
    wait_for_frame(page, 0, fps)
    page.get_by_label("frame", exact=True).fill("2")
    wait_for_frame(page, 2, fps)
    for key, frame in (("ArrowRight", 3), ("ArrowLeft", 2), ("End", last), ("ArrowRight", last), ("Home", 0)):
        page.keyboard.press(key)
        wait_for_frame(page, frame, fps)
    page.get_by_label("one frame forward").click()
    wait_for_frame(page, 1, fps)
    assert page.locator("output").inner_text() == f"frame 2 of {last + 1}"
    page.evaluate("document.activeElement.blur()")  # a button has the space bar to itself
    page.keyboard.press(" ")
    until(page, "[...document.querySelectorAll('video')].every((video) => !video.paused)")
    page.keyboard.press(" ")
    until(page, "[...document.querySelectorAll('video')].every((video) => video.paused)")
    # the difference is drawn: neither empty nor of one colour
    page.keyboard.press("End")
    wait_for_frame(page, last, fps)
    values = "(canvas) => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
    assert len({*page.locator("canvas").evaluate(values)}) > 3


def test_it_plays_by_itself_unless_less_motion_is_wanted(run_folder: Path, open_page: Open) -> None:
    page = open_page(run_folder / "report.html", moving=True)
    until(page, "document.querySelector('video').currentTime > 0.3")
    assert open_page(run_folder / "report.html").evaluate("document.querySelector('video').paused")


@pytest.mark.parametrize(
    ("name", "width", "dark"), [("desktop", 1280, False), ("dark", 1280, True), ("phone", 390, True)]
)
def test_it_fits_every_screen(run_folder: Path, open_page: Open, name: str, width: int, dark: bool) -> None:
    page = open_page(run_folder / "report.html", width, dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    red, green, blue = json.loads(
        page.evaluate("getComputedStyle(document.body).backgroundColor").replace("rgb(", "[").replace(")", "]")
    )
    assert (red + green + blue < 128) == dark
    assert page.locator("svg.chart").count() == 2 and page.locator(".sheet figure").count() == 6  # 0, 5, 10, 11
    boxes = [page.locator(f"video[data-name={which}]").bounding_box() for which in ("before", "after")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    page.locator("summary").focus()
    page.keyboard.press("Enter")
    assert page.locator("details").get_attribute("open") is not None
    shot(page, f"report-{name}")


def test_text_of_users_stays_text(run_folder: Path, open_page: Open) -> None:
    page = open_page(run_folder / "report.html")  # a script that ran, or a picture that was asked for, would fail it
    assert page.locator("h1").inner_text().endswith("<img src=x onerror=alert(1)>")
    assert page.locator("img[onerror], [onclick]").count() == 0
    assert page.locator("td", has_text="</script><script>alert(1)</script>?").count() == 1


def test_a_command_can_be_copied(copy: Path, open_page: Open) -> None:
    page = open_page(rendered(copy, command="vlmteacher solve --prompt 'a <b>'"))
    page.get_by_role("button", name="copy").click()
    assert page.evaluate("String(getSelection())") == "vlmteacher solve --prompt 'a <b>'"


def test_a_page_without_a_video_opens(copy: Path, open_page: Open) -> None:
    (copy / "before.mp4").unlink()
    (copy / "after.mp4").write_bytes(b"no video")
    (copy / "frames.webp").unlink()
    page = open_page(rendered(copy))
    assert page.get_by_text("before.mp4 is missing").is_visible()
    page.get_by_text("this video cannot be played").wait_for()
    page.keyboard.press("End")
    assert page.locator("output").inner_text() == "frame 5 of 5"


def test_a_drifting_guard_a_roll_back_and_rewards_are_shown(copy: Path, open_page: Open) -> None:
    steps = json.loads((copy / "run.json").read_text())["steps"]
    steps[-1]["guards"]["brightness"] = steps[0]["guards"]["brightness"] + 0.2
    steps[5] |= {"rolled_back": "the loss <rose>", "learning_rate": 0.015}
    rewards = {"weights": {"<smooth>": 0.5}, "before": {"<smooth>": 2.0}, "after": {"<smooth>": 1.25}}
    page = open_page(rendered(copy, steps=steps, rewards=rewards | {"objective_after": 3.0}))
    assert "<smooth> 0.5 2.000 1.250" in " ".join(page.locator("tr", has_text="<smooth>").inner_text().split())
    assert page.locator(".tripped").count() == 1 and "changed by more than 0.1" in page.locator(".tripped").inner_text()
    assert page.get_by_text("back to the best LoRA so far (the loss <rose>), learning rate 0.015").is_visible()


def test_a_run_that_has_not_finished_has_a_page(copy: Path, open_page: Open) -> None:
    record = json.loads((copy / "run.json").read_text())
    kept = ("prompt", "config", "queries", "models", "steps", "updates", "fps")
    unfinished = {name: record[name] for name in kept} | {"stopped": "interrupted", "seconds": {}}
    (copy / "report.html").write_text(run_report(copy, unfinished))
    page = open_page(copy / "report.html")
    assert page.locator("#verdict").inner_text().lower() == "not finished"


def test_a_large_video_is_recoded(tmp_path: Path) -> None:
    from vlmteacher.media import write_video

    noise = np.random.default_rng(0).integers(0, 256, (12, 192, 256, 3), np.uint8)
    write_video(tmp_path / "noise.mp4", noise, 8)
    size = (tmp_path / "noise.mp4").stat().st_size
    url = video_url(tmp_path / "noise.mp4", size // 4)
    assert url is not None and url.startswith("data:video/mp4;base64,") and len(url) <= size // 4
    assert video_url(tmp_path / "noise.mp4", 500) is None
    assert video_url(tmp_path / "none.mp4", 500) is None
