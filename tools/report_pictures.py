"""Draw the pictures of docs/guides/reports.md: a run's report, a sweep's, and videos before and after in motion.

    python -m tools.report_pictures RUN SWEEPS

RUN: a run folder. SWEEPS: a folder with the sweeps `base` and `teacher`, made with --keep-videos. Needs playwright and
a chromium.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vlmteacher.evaluation.gallery import report
from vlmteacher.media import read_clip

OUT = Path(__file__).parents[1] / "docs/guides/reports"
FRAMES, FRAME_MS, LAST_MS = 13, 125, 900
CELL, GAP, LEFT, TOP = 144, 6, 58, 26  # pixels of `motion`
COLUMNS = 5


def motion(sweeps: Path, out: Path) -> None:
    """Write an animation of the largest gains, one for each family: the base videos above, the teacher's below."""
    rows = {
        name: {row["id"]: row for row in json.loads((sweeps / name / "results.json").read_text())["instances"]}
        for name in ("base", "teacher")
    }
    gained = [row for row in rows["teacher"].values() if row["success"] and not rows["base"][row["id"]]["success"]]
    gained.sort(key=lambda row: rows["base"][row["id"]]["score"] - row["score"])
    best: dict[str, str] = {}
    for row in gained:
        best.setdefault(row["task"], row["id"])
    chosen = [*best.values()][:COLUMNS]
    clips = [[read_clip(sweeps / name / rows[name][one]["video"], FRAMES) for one in chosen] for name in rows]
    font = ImageFont.load_default(15)
    frames = []
    for frame in range(FRAMES):
        sheet = Image.new("RGB", (LEFT + len(chosen) * (CELL + GAP), TOP + 2 * (CELL + GAP)), "white")
        draw = ImageDraw.Draw(sheet)
        for column, one in enumerate(chosen):
            draw.text((LEFT + column * (CELL + GAP), 4), rows["base"][one]["task"], "#62656f", font)
            for line in range(2):
                picture = Image.fromarray(clips[line][column][frame]).resize((CELL, CELL), Image.Resampling.NEAREST)
                sheet.paste(picture, (LEFT + column * (CELL + GAP), TOP + line * (CELL + GAP)))
        for line, text in enumerate(("before", "after")):
            draw.text((4, TOP + line * (CELL + GAP) + CELL // 2 - 8), text, "#1d1e24", font)
        frames.append(sheet)
    times = [FRAME_MS] * (FRAMES - 1) + [LAST_MS]
    frames[0].save(out, save_all=True, append_images=frames[1:], duration=times, loop=0, quality=85, method=6)


def screenshots(pages: dict[str, tuple[Path, dict[str, Any]]], out: Path) -> None:
    """Write a WebP of each page, with its videos at their last frame."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for name, (page_path, options) in pages.items():
            page = browser.new_page(reduced_motion="reduce", **options)
            page.goto(page_path.absolute().as_uri())
            page.keyboard.press("End")
            page.wait_for_timeout(1500)
            Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(out / f"{name}.webp", quality=85, method=6)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("sweeps", type=Path)
    given = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    motion(given.sweeps, OUT / "before_after.webp")
    with TemporaryDirectory() as folder:
        gallery = Path(folder) / "gallery.html"
        gallery.write_text(report([given.sweeps]))
        phone = {"viewport": {"width": 390, "height": 780}, "color_scheme": "dark", "device_scale_factor": 1.5}
        screenshots(
            {
                "report": (given.run / "report.html", {"viewport": {"width": 1180, "height": 1180}}),
                "gallery": (gallery, {"viewport": {"width": 1180, "height": 1500}, "color_scheme": "dark"}),
                "phone": (given.run / "report.html", phone),
            },
            OUT,
        )


if __name__ == "__main__":
    main()
