"""The page of several sweeps in a browser: filters, order, all videos in step, phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Open, shot, until
from tests.evaluation.sweeps import FPS, FRAMES, sweeps
from vlmteacher.evaluation.gallery import report

IN_STEP = """([frame, fps, count]) => {
    const videos = [...document.querySelectorAll('video')].filter((video) => video.readyState >= 2);
    return videos.length >= count
        && videos.every((video) => !video.seeking && Math.floor(video.currentTime * fps) === frame)}"""


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "page.html").write_text(report([sweeps(folder / "table")]))
    return folder / "page.html"


def shown(page: Any) -> list[str]:
    """The ids of the instances that are shown, in their order."""
    ids: list[str] = page.evaluate("[...document.querySelectorAll('article:not([hidden])')].map((entry) => entry.id)")
    return [name.rsplit("/", 1)[1].lstrip("0") or "0" for name in ids]


def test_filters_and_order(gallery: Path, open_page: Open) -> None:
    page = open_page(gallery)
    assert shown(page) == ["0", "1", "2", "3", "4"]
    page.select_option("#family", "maze")
    assert shown(page) == ["1", "3"] and page.locator("#count").inner_text() == "2 of 5 shown"
    page.select_option("#outcome", "lost")
    assert shown(page) == ["3"]
    page.select_option("#family", "")
    page.select_option("#outcome", "gained")
    assert shown(page) == ["1", "2"]
    page.select_option("#outcome", "")
    page.select_option("#order", "-1")
    assert shown(page) == ["1", "2", "4", "0", "3"]
    page.select_option("#order", "1")
    assert shown(page)[0] == "3"


def test_all_videos_move_in_step(gallery: Path, open_page: Open) -> None:
    page = open_page(gallery)
    page.locator(".filters").scroll_into_view_if_needed()
    page.get_by_label("frame", exact=True).fill("3")
    until(page, IN_STEP, [3, FPS, 4])
    page.keyboard.press("End")
    until(page, IN_STEP, [FRAMES - 1, FPS, 4])
    page.select_option("#outcome", "lost")  # a video that comes into sight shows the same frame
    until(page, IN_STEP, [FRAMES - 1, FPS, 2])


@pytest.mark.parametrize(("name", "width", "dark"), [("desktop", 1280, False), ("phone", 390, True)])
def test_it_fits_every_screen(gallery: Path, open_page: Open, name: str, width: int, dark: bool) -> None:
    page = open_page(gallery, width, dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    until(page, IN_STEP, [0, FPS, 2])
    shot(page, f"gallery-{name}")


def test_a_link_leads_to_its_instance(gallery: Path, open_page: Open) -> None:
    page = open_page(gallery)
    page.locator(".picks a").first.click()
    assert page.evaluate("decodeURI(location.hash)") == "#id/maze/1/0001"
    assert page.locator("article:target").count() == 1
