"""Measure a run's report.html: bytes, and seconds in a headless Chromium until it can be used.

python -m benchmarks.report FILE.html [--json] [--runs N] [--limit SECONDS]

A page can be used when the scrubber answers: from the navigation until both videos show their last frame after a press
of End. The exit status is 1 when the median is above `--limit` or the file is not below 5 MB. Needs playwright and a
chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vlmteacher.placement import describe

MEGABYTES = 5
LOADED = "() => performance.getEntriesByType('navigation')[0].domInteractive / 1000"
LAST = """() => [...document.querySelectorAll('video')].every(
    (video) => video.readyState >= 2 && !video.seeking && video.currentTime > video.duration * 0.8)"""


def measure(browser: Any, file: Path) -> dict[str, float]:
    """Open a page in a window of its own; return the seconds until its DOM and its scrubber are ready."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    began = time.perf_counter()
    page.goto(file.absolute().as_uri(), wait_until="domcontentloaded")
    page.keyboard.press("End")
    while not page.evaluate(LAST):
        page.wait_for_timeout(5)
    row = {"scrubber_s": time.perf_counter() - began, "dom_interactive_s": page.evaluate(LOADED)}
    context.close()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--runs", type=int, default=7, help="the first one also warms the browser up, and is left out")
    parser.add_argument("--limit", type=float, default=1.0, help="largest median in seconds")
    given = parser.parse_args()

    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        rows = [measure(browser, given.file) for _ in range(given.runs)][1:]
        version = browser.version
        browser.close()
    size = given.file.stat().st_size
    summary = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    processor = describe({"reasoner": torch.device("cpu")}, torch.float32).partition(",")[0]
    print(f"{given.file}: {size / 1e6:.2f} MB; Chromium {version}, {processor}")
    print(", ".join(f"{name} {value:.3f}" for name, value in summary.items()), f"(medians of {len(rows)})")
    if given.json:
        print(json.dumps({"benchmark": "report", "bytes": size, "rows": rows, "summary": summary}))
    if summary["scrubber_s"] > given.limit or size >= MEGABYTES * 1e6:
        sys.exit(f"the report must be below {MEGABYTES} MB and ready within {given.limit:g} s")


if __name__ == "__main__":
    main()
