"""A run on disk: videos, LoRA and its card, queries, run.json, a page to look at, and the state to resume from."""

from __future__ import annotations

import html
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmteacher.errors import InputError
from vlmteacher.files import replacing, write_json

if TYPE_CHECKING:
    import numpy as np

    from vlmteacher.pipeline import TeacherPipelineOutput

FILES = (
    *("run.json", "before.mp4", "after.mp4", "lora.safetensors", "queries.json"),
    *("report.html", "README.md", "state.pt"),
)
WRITING_SHARE = (
    0.05  # the state of a large LoRA is not written after every step, but for at most this share of the time
)


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write frames (F, H, W, 3) uint8 as an H.264 file of the same size that browsers play (H and W even)."""
    import imageio_ffmpeg
    import numpy as np

    height, width = frames.shape[1:3]
    with replacing(path) as temporary:
        writer = imageio_ffmpeg.write_frames(
            str(temporary),
            (width, height),
            fps=fps,
            codec="libx264",
            pix_fmt_out="yuv420p",
            quality=None,
            macro_block_size=2,
            output_params=["-crf", "8", "-movflags", "+faststart"],
        )
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()


class RunFolder:
    """The folder of one run. Opening it only checks; `begin` is what first writes.

    Raises InputError: the path is a file or cannot be written to; it holds a run and `resume` is not set; with
    `resume`, what it holds cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], resume: bool = False) -> None:
        self.path = Path(path)
        self.record: dict[str, Any] | None = None
        self._next_write = 0.0
        existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not existing.is_dir():
            raise InputError(f"output directory {self.path}: {existing} is not a directory")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(f"output directory {self.path}: {existing} is not writable")
        found = [name for name in FILES if (self.path / name).exists()]
        if not found:
            return
        if not resume:
            raise InputError(
                f"output directory {self.path} already holds a run ({found[0]}): give another one, or --resume to take"
                " it up"
            )
        try:
            self.record = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
            assert self.record is not None
            _ = self.record["config"]["seed"], self.record["queries"]
        except (OSError, ValueError, AssertionError, KeyError, TypeError) as error:
            raise InputError(
                f"output directory {self.path} holds no run.json that can be read: nothing to resume"
            ) from error

    def check_same(self, record: dict[str, Any]) -> None:
        """Raise InputError unless the run here was as `record` (prompt, config, ...) says; it names what differs."""
        assert self.record is not None
        different = [
            f"{name} ({json.dumps(old, ensure_ascii=False)}, now {json.dumps(new, ensure_ascii=False)})"
            for name, old, new in _differences(self.record, json.loads(json.dumps(record)))
        ]
        if different:
            raise InputError(f"{self.path} holds a run with another {', another '.join(different)}")

    def begin(self, record: dict[str, Any]) -> None:
        """Make the folder and write what is known of the run: `prompt`, `config`, `models`, `queries` of run.json.

        Raises InputError when that cannot be written.
        """
        new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.record = record
            write_json(self.path / "queries.json", record["queries"])
            self.interrupt([])  # which is what it is for whoever finds it before it has ended
        except OSError as error:
            if new:
                shutil.rmtree(self.path, ignore_errors=True)
            raise InputError(f"output directory {self.path} cannot be written ({error.strerror})") from error

    def interrupt(self, history: list[dict[str, Any]]) -> None:
        """Write a run.json that says how far the run has come."""
        assert self.record is not None
        updates = sum(row["grad_norm"] is not None for row in history)
        rest = {"steps": history, "stopped": "interrupted", "updates": updates, "seconds": {}}
        self.write_record({**self.record, **rest})

    def write_record(self, record: dict[str, Any]) -> None:
        from vlmteacher import __version__

        write_json(self.path / "run.json", {**record, "version": __version__})

    def save_state(self, state: Callable[[], dict[str, Any]], force: bool = False) -> None:
        """Write the loop's `state()`, unless writing already takes more than its share of the time."""
        import torch

        start = time.monotonic()
        if start < self._next_write and not force:
            return
        with replacing(self.path / "state.pt") as temporary:
            torch.save(state(), temporary)
        end = time.monotonic()
        self._next_write = end + (end - start) / WRITING_SHARE

    def load_state(self) -> dict[str, Any] | None:
        import torch

        path = self.path / "state.pt"
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None

    def finish(self, output: TeacherPipelineOutput) -> None:
        """Write the results; run.json comes last, so that a run that says it is done has all its files."""
        from vlmteacher.model_card import model_card

        write_video(self.path / "before.mp4", output.uint8(output.frames_before), output.fps)
        write_video(self.path / "after.mp4", output.uint8(output.frames), output.fps)
        with replacing(self.path / "lora.safetensors") as temporary:
            temporary.write_bytes(output.lora)
        write_json(self.path / "queries.json", output.queries.to_dict())
        with replacing(self.path / "README.md") as temporary:
            temporary.write_text(model_card(output), encoding="utf-8")
        with replacing(self.path / "report.html") as temporary:
            temporary.write_text(report(output.record()), encoding="utf-8")
        self.write_record(output.record())


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every entry of `new` that is not the same in `old`, with its name."""
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            yield from _differences(before, value, name + ".")
        elif before != value:
            yield (prefix + name).removeprefix("config."), before, value


def report(record: dict[str, Any]) -> str:
    """One HTML page about a finished run; it needs nothing but the videos beside it."""
    questions = [record["queries"]["goal"], *record["queries"]["process"]]
    rows = "".join(
        f"<tr><td>{'goal' if number == 0 else 'process'}<td>{html.escape(question)}<td>{before:.2f}<td>{after:.2f}"
        for number, (question, before, after) in enumerate(
            zip(questions, record["p_yes_before"], record["p_yes_after"], strict=True)
        )
    )
    config = "".join(f"<tr><td>{html.escape(k)}<td>{html.escape(str(v))}" for k, v in record["config"].items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>vlmteacher: {html.escape(record["prompt"][:60])}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
figure {{ display: inline-block; margin: 0 1rem 1rem 0 }}
video {{ width: 20rem; max-width: 100%; image-rendering: pixelated }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
td, th {{ padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: left }}
svg {{ width: 100%; max-width: 40rem }}
</style>
<h1>{html.escape(record["prompt"])}</h1>
<figure><video src="before.mp4" controls autoplay loop muted></video><figcaption>before</figcaption></figure>
<figure><video src="after.mp4" controls autoplay loop muted></video><figcaption>after {record["updates"]} updates \
(stopped: {record["stopped"]})</figcaption></figure>
<table><tr><th><th>question<th>P(Yes) before<th>P(Yes) after{rows}</table>
<h2>Loss</h2>
{loss_curve([row["loss"] for row in record["steps"]], record["config"]["threshold"])}
<h2>Settings</h2>
<table>{config}</table>
</html>
"""


def loss_curve(losses: list[float], threshold: float) -> str:
    """The loss over the steps and the threshold, as an SVG drawing."""
    width, height, margin = 640, 240, 40
    top = max([*losses, threshold]) * 1.05
    x = [margin + i * (width - 2 * margin) / max(len(losses) - 1, 1) for i in range(len(losses))]

    def y(value: float) -> float:
        return height - margin - value / top * (height - 2 * margin)

    points = " ".join(f"{a:.1f},{y(b):.1f}" for a, b in zip(x, losses, strict=True))
    dots = "".join(f'<circle cx="{a:.1f}" cy="{y(b):.1f}" r="2.5"/>' for a, b in zip(x, losses, strict=True))
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss over the steps" font-size="12">'
        f'<path d="M{margin},{margin}V{height - margin}H{width - margin}" fill="none" stroke="#999"/>'
        f'<line x1="{margin}" x2="{width - margin}" y1="{y(threshold):.1f}" y2="{y(threshold):.1f}" '
        f'stroke="#c33" stroke-dasharray="4"/>'
        f'<text x="{width - margin}" y="{y(threshold) - 4:.1f}" text-anchor="end" fill="#c33">'
        f"threshold {threshold:g}</text>"
        f'<polyline points="{points}" fill="none" stroke="#36c" stroke-width="2"/><g fill="#36c">{dots}</g>'
        f'<text x="{margin - 4}" y="{margin}" text-anchor="end">{top:.2f}</text>'
        f'<text x="{margin - 4}" y="{height - margin}" text-anchor="end">0</text>'
        f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">step</text></svg>'
    )
