"""An output as a notebook shows it: both videos, side by side and in step, and P(Yes) of every question."""

from __future__ import annotations

import tempfile
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmteacher.media import data_url, write_video

if TYPE_CHECKING:
    import numpy as np

LEAST_WIDTH = 256  # pixels that a video is shown in


def video_tag(frames: np.ndarray, fps: float) -> str:
    """A <video> that holds frames (F, H, W, 3) uint8."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, frames, fps)
        source = data_url("video/mp4", path.read_bytes())
    width = max(LEAST_WIDTH, frames.shape[2])
    return (
        f'<video width="{width}" style="image-rendering: pixelated" controls autoplay loop muted playsinline '
        f'src="{source}"></video>'
    )


def as_html(record: dict[str, Any], outcome: str, before: np.ndarray, after: np.ndarray, fps: float) -> str:
    """HTML without anything from outside. record: the content of run.json, with the video from before; outcome: of the
    verdict."""
    questions = [record["queries"]["goal"], *record["queries"]["process"]]
    rows = "".join(
        f"<tr><td>{escape(question)}</td><td>{p:.2f}</td><td>{q:.2f}</td></tr>"
        for question, p, q in zip(questions, record["p_yes_before"], record["p_yes_after"], strict=True)
    )
    return (
        f"<p><b>{escape(outcome)}</b>: {escape(record['prompt'])} ({record['updates']} updates, "
        f"loss {record['loss_before']:.3f} to {record['loss_after']:.3f})</p>"
        f"<table><tr><th>before</th><th>after</th></tr><tr><td>{video_tag(before, fps)}</td>"
        f"<td>{video_tag(after, fps)}</td></tr></table>"
        f"<table><tr><th>question</th><th>P(Yes) before</th><th>after</th></tr>{rows}</table>"
    )
