"""Stands in for VR-Bench's kit: the same command line, layout and JSON; the metrics are plain pixel comparisons.

Tests copy it to ``evaluation/videomodel_eval/batch_evaluate.py`` of a folder, and run it from there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np


def frames(path: Path) -> np.ndarray:
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]).astype(float)


def evaluate(path: Path, data: Path, tolerance: float) -> dict[str, Any]:
    if not (data / "states" / f"{path.stem}.json").exists():
        return {"video": path.name, "status": "error", "error": "State file not found"}
    try:
        ours, right = frames(path), frames(data / "videos" / f"{path.stem}_0.mp4")
    except Exception:
        return {"video": path.name, "status": "error", "error": f"Cannot open video: {path}"}
    ours = ours[np.linspace(0, len(ours) - 1, len(right)).round().astype(int)]
    near = (np.abs(ours - right).max(-1) > 60).mean((1, 2)) < tolerance  # a codec changes pixels by less
    reached = float(near[-1])
    return {
        "video": path.name,
        "status": "success",
        "pr": float(near.mean()),
        "sr": reached,
        "sd": 0.25 if reached else None,
        "em": float(near.all()),
        "mf": 0.5,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("dataset_dir", "output_dir", "result_dir"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--threshold", type=float, default=0.01)
    parser.add_argument("--num-samples", type=int, default=100)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--tracker-type", default="ncc", choices=["csrt", "ncc", "optical_flow"])
    arguments = parser.parse_args()
    for difficulty in ("easy", "medium", "hard"):
        videos = sorted(path for path in arguments.output_dir.rglob("*.mp4") if path.stem.startswith(difficulty))
        if not videos or not (arguments.dataset_dir / difficulty).exists():
            continue
        results = [evaluate(path, arguments.dataset_dir / difficulty, arguments.threshold) for path in videos]
        out = arguments.result_dir / difficulty
        out.mkdir(parents=True)
        (out / "evaluation_results.json").write_text(json.dumps({"summary": {}, "results": results}))


if __name__ == "__main__":
    main()
