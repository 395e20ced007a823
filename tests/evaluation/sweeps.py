"""Folders of sweeps with small videos, as `bench --keep-videos` writes them, without any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlmteacher.files import write_json
from vlmteacher.media import write_video

FRAMES, FPS = 5, 8.0


def clip(seed: int, frames: int = FRAMES) -> np.ndarray:
    """A square that moves over a colour, (F, 32, 32, 3) uint8."""
    video = np.empty((frames, 32, 32, 3), np.uint8)
    video[:] = np.random.default_rng(seed).integers(60, 255, 3, np.uint8)
    for frame in range(frames):
        video[frame, 10:20, 3 + 4 * frame : 13 + 4 * frame] = 20
    return video


def sweep(folder: Path, method: str, successes: list[bool | None], scores: list[float], **changed: Any) -> Path:
    """A sweep over two families whose instances alternate."""
    rows = []
    for index, (success, score) in enumerate(zip(successes, scores, strict=True)):
        task = ("move", "maze")[index % 2]
        video = f"videos/{method}/id/{task}/{index:05d}.mp4"
        (folder / video).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / video, clip(index), FPS)
        row = {"id": f"{task}/1/{index:04d}", "method": method, "split": "id", "index": index, "noise": 0, "task": task}
        row |= {"prompt": f"Task <b>{index}</b> & more", "success": success, "score": score, "subscores": {}}
        rows.append(
            row | {"video": video, "updates": 0, "seconds": 1.5, "generator_calls": 1, "vlm_calls": 2} | changed
        )
    write_json(folder / "results.json", {"benchmark": "microworld", "method": method, "instances": rows})
    return folder


def sweeps(folder: Path) -> Path:
    """A table of base and teacher: the teacher gains two instances, loses one, and both solve one."""
    sweep(folder / "base", "base", [True, False, False, True, False], [1.0, 0.2, 0.3, 0.9, 0.1])
    sweep(folder / "teacher", "teacher", [True, True, True, False, False], [1.0, 0.9, 0.8, 0.4, 0.2])
    return folder
