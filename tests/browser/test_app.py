"""The page of `vlmteacher ui` in a browser: a packaged example from end to end, stop and go on, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.browser.conftest import Open, shot, until
from tests.evaluation.sweeps import sweeps
from vlmteacher.app.server import Served, listen, serve
from vlmteacher.pipeline import TeacherPipeline

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'vlmteacher[ui]'")

STEPS = 2  # of a run, unless a test wants more
LONG = "300"
EVIL = '<img src=x onerror="alert(1)"> {{ 7 * 6 }} ${alert(1)}'


@pytest.fixture(scope="module")
def served(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    runs = tmp_path_factory.mktemp("ui") / "runs"
    sweeps(runs / "sweeps")
    settings: Any = {"max_steps": STEPS, "final_samples": 1}
    with listen("127.0.0.1", 0) as sock, serve(TeacherPipeline.from_pretrained(), sock, runs, settings) as served:
        yield served


@pytest.fixture
def open_app(served: Served, open_page: Open) -> Iterator[Open]:
    def open_app(**options: Any) -> Any:
        page = open_page(served.url, **options)
        page.locator("#view section").wait_for()
        return page

    yield open_app
    for job in served.app.worker.line():  # of a test that failed
        served.app.worker.stop(job)


def choose(page: Any, steps: str | None = None) -> None:
    """Choose the first packaged example, with at most so many steps and no threshold that ends it earlier."""
    page.locator("#examples button").first.click()
    page.get_by_alt_text("the first frame").wait_for()
    if steps is not None:
        if not page.get_by_label("Stop at a loss of").is_visible():
            page.get_by_text("Settings", exact=True).click()
        page.get_by_label("Stop at a loss of").fill("0.000001")
        page.locator("#settings").get_by_label("Steps at most").fill(steps)


def wait_for_state(page: Any, state: str) -> None:
    page.locator(f"#view .vt-run[data-state='{state}']").wait_for()


def wait_for_step(page: Any, step: int) -> None:
    until(page, "(step) => Number(document.querySelector('[role=progressbar]')?.ariaValueNow) >= step", step)


def read_record(served: Served, page: Any) -> tuple[Path, dict[str, Any]]:
    """The folder and run.json of the run that is open."""
    name = page.locator("#view .vt-kicker").inner_text().lower()
    folder = next(path for path in served.app.runs.root.iterdir() if path.name.lower() == name)
    return folder, json.loads((folder / "run.json").read_text())


def test_a_packaged_example_from_end_to_end(served: Served, open_app: Open) -> None:
    page = open_app()
    choose(page)
    page.locator("#write").click()
    page.locator("#question-1 textarea").wait_for()
    assert page.locator("#question-0 textarea").input_value().endswith("?")
    assert "50% of the loss" in page.locator("#question-0").inner_text()
    edited = f"Is there one blue ball? {EVIL}"
    page.locator("#question-1 textarea").fill(edited)
    page.locator("#run").click()
    page.get_by_alt_text("the one-step prediction").wait_for()
    assert page.locator("#view svg.chart").count() == 2
    page.locator("#view .facts .badge").wait_for()
    folder, record = read_record(served, page)
    assert record["queries"]["process"][0] == edited and len(record["steps"]) == STEPS
    assert page.locator("#view .badge").inner_text().lower() == record["verdict"]["outcome"]
    assert page.locator("#view td", has_text=edited).count() == 1 and page.locator("#view img[onerror]").count() == 0
    until(page, "[...document.querySelectorAll('#view video')].every((video) => video.readyState >= 2)")
    with page.expect_download() as download:
        page.get_by_role("link", name="LoRA").click()
    assert Path(download.value.path()).read_bytes() == (folder / "lora.safetensors").read_bytes()
    with page.context.expect_page() as report:
        page.get_by_role("link", name="Open the report").click()
    report.value.locator("#verdict").wait_for()
    assert record["prompt"] in report.value.locator("h1").inner_text()
    report.value.close()
    page.get_by_role("tab", name="Runs").click()
    assert record["prompt"] in page.locator("#runs [aria-pressed=true]").inner_text()
    shot(page, "app-desktop")


@pytest.mark.slow
def test_stop_and_go_on(served: Served, open_app: Open) -> None:
    page = open_app()
    choose(page, LONG)
    page.locator("#run").click()
    wait_for_step(page, 1)
    shot(page, "app-running")
    page.locator("#stop").click()
    wait_for_state(page, "unfinished")
    folder, record = read_record(served, page)
    made = len(record["steps"])
    assert record["stopped"] == "interrupted" and (folder / "first_frame.png").exists()
    assert f"Stopped after {made} step" in page.locator("#view").inner_text()
    page.locator(".vt-viewer").get_by_label("Steps at most").fill("0")
    page.locator("#go-on").click()
    page.locator("#view [role=alert]").wait_for()  # fewer steps than it has made
    page.locator(".vt-viewer").get_by_label("Steps at most").fill(str(made + 1))
    page.locator("#go-on").click()
    page.locator("#view .facts .badge:not(:text('not finished'))").wait_for()
    again = json.loads((folder / "run.json").read_text())
    assert again["steps"][:made] == record["steps"] and len(again["steps"]) == made + 1


@pytest.mark.slow
def test_a_second_browser_waits_and_a_closed_page_stops_nothing(served: Served, open_app: Open) -> None:
    first, second = open_app(), open_app()
    for page in (first, second):
        choose(page, LONG)
        page.locator("#run").click()
        page.locator("#view [role=status]").first.wait_for()
    wait_for_state(second, "waiting")
    assert "1 piece of work is before this run" in second.locator("#view").inner_text()
    wait_for_step(first, 1)
    assert "You can close this page: the run goes on" in first.locator("#view").inner_text()
    first.close()
    at_work, waiting = served.app.worker.line()
    steps = len(at_work.rows)  # type: ignore[attr-defined]
    third = open_app()
    third.get_by_role("tab", name="Runs").click()
    third.locator("#runs button", has_text="at work").click()
    wait_for_step(third, steps + 1)  # it has gone on, and can be watched from here
    third.locator("#stop").click()
    wait_for_state(third, "unfinished")
    wait_for_state(second, "at work")  # by itself
    assert served.app.worker.line() == [waiting]
    second.locator("#stop").click()
    assert waiting.ended.wait(60)


def test_what_is_no_first_frame_is_refused(open_app: Open, tmp_path: Path) -> None:
    page = open_app()
    (tmp_path / "text.png").write_text("no picture")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(200 * 2**20)
    Image.new("RGB", (300, 200), "red").save(tmp_path / "photo.png")

    def upload(name: str) -> None:
        with page.expect_file_chooser() as chooser:
            page.locator("#upload").click()
        chooser.value.set_files(tmp_path / name)

    upload("text.png")
    page.locator("#message [role=alert]").wait_for()
    message = "image text.png cannot be read: give a PNG, JPEG, WebP, BMP, TIFF or GIF file"
    assert page.locator("#message").inner_text().strip() == message
    upload("large.png")
    page.get_by_text("exceed the maximum allowed size of 20").wait_for()
    assert page.get_by_alt_text("the first frame").count() == 0
    upload("photo.png")
    page.get_by_text("made of 300").wait_for()  # cropped
    assert page.locator("#message").inner_text().strip() == ""
    page.locator("#clear").click()
    page.get_by_alt_text("the first frame").wait_for(state="detached")
    page.locator("#run").click()  # without a prompt
    page.locator("#message", has_text="the prompt is empty").wait_for()


def test_it_fits_a_dark_phone_and_text_stays_text(open_app: Open) -> None:
    width = 390
    page = open_app(width=width, dark=True)
    page.get_by_label("Prompt").fill(EVIL)
    page.locator("#question-0 textarea").fill(EVIL)
    page.locator("#run").click()
    page.get_by_alt_text("the one-step prediction").or_(page.locator("#view .facts")).first.wait_for()
    assert page.locator("#view h2").inner_text() == EVIL and page.locator("img[onerror]").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    form, view = (page.locator(name).bounding_box() for name in ("#run", "#view"))
    assert view["width"] > 0.9 * width and view["y"] > form["y"]  # below the form, not beside it
    colour = page.evaluate("getComputedStyle(document.querySelector('.gradio-container')).backgroundColor")
    assert sum(json.loads(colour.replace("rgb(", "[").replace(")", "]"))) < 128
    page.locator("#view .facts").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shot(page, "app-phone")


@pytest.mark.slow
def test_reports_of_sweeps_are_those_in_the_folder(open_app: Open) -> None:
    page = open_app()
    page.get_by_role("tab", name="Sweeps").click()
    boxes = page.locator("#sweeps input[type=checkbox]")
    boxes.first.wait_for()
    for box in boxes.all():
        box.check()
    page.locator("#report").click()
    report = page.frame_locator("#gallery iframe")
    report.locator("#count", has_text="5 of 5 shown").wait_for()  # by the page's script
    report.locator("article img").first.wait_for()
    page.wait_for_timeout(500)  # it is drawn by another process
    shot(page, "app-sweeps")
