"""Draw the picture of docs/guides/ui.md: the page of `vlmteacher ui` in the middle of a run of the packaged example.

    python -m tools.ui_picture

Needs the extra `ui`, playwright and a chromium.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from vlmteacher.app.server import listen, serve
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.quiet import quiet

OUT = Path(__file__).parents[1] / "docs/guides/reports/ui.webp"
STEPS = 6  # after which the picture is taken


def main() -> None:
    from playwright.sync_api import sync_playwright

    quiet()
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with TemporaryDirectory() as runs, listen("127.0.0.1", 0) as sock:
        pipe = TeacherPipeline.from_pretrained()
        with serve(pipe, sock, Path(runs)) as served, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1240, "height": 1010})
            page.goto(served.url)
            page.locator("#examples button").first.click()
            page.get_by_alt_text("the first frame").wait_for()
            page.locator("#run").click()
            bar = page.locator("[role=progressbar]")
            while int(bar.get_attribute("aria-valuenow") or 0) < STEPS:
                page.wait_for_timeout(100)
            page.evaluate("scrollTo(0, 0)")
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            browser.close()
    picture.save(OUT, quality=85, method=6)


if __name__ == "__main__":
    main()
