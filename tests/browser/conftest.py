"""A chromium of the system, driven by Playwright; without one the tests are skipped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SHOTS = Path(__file__).parents[2] / "build" / "screenshots"
Open = Callable[..., Any]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        # The sandbox needs rights that a container may not have; the pages are our own.
        try:
            chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"{path} does not start: {str(error).splitlines()[0][:200]}")
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Open a file, or the address of a server: `open_page(path, width=..., dark=...)`. The test fails where the page
    writes to the console, raises, or asks for anything but itself or, of a server, but the server's."""
    contexts: list[Any] = []
    complaints: list[str] = []

    def request(asked: Any, address: str, server: bool) -> None:
        known = asked.url.startswith(address) if server else asked.url == address
        if not known and not asked.url.startswith(("data:", "blob:")):
            complaints.append(f"asks for {asked.url[:80]}")

    def open_page(path: Path | str, width: int = 1280, dark: bool = False, moving: bool = False, **options: Any) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 844},
            color_scheme="dark" if dark else "light",
            reduced_motion="no-preference" if moving else "reduce",
            **options,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        address = path if isinstance(path, str) else path.as_uri()
        page.on("request", lambda asked: request(asked, address, isinstance(path, str)))
        page.set_default_timeout(120_000)  # on a busy machine
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def until(page: Any, expression: str, argument: Any = None) -> None:
    """Wait until JavaScript is true. `page.wait_for_function` would evaluate text, which the pages' policy forbids."""
    end = time.monotonic() + 20
    while not page.evaluate(expression, argument):
        assert time.monotonic() < end, f"never true: {expression}"
        page.wait_for_timeout(30)


def shot(page: Any, name: str) -> None:
    """Leave a screenshot in build/screenshots, for CI."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)
