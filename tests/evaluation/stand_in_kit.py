"""Stands in for the kits of VBVR-Bench and VBVR-Pro-Bench: the same command line, layout, rules and JSON.

Tests copy it into a folder under the name of a kit's entry point, and run it from there. A video's score is its
similarity with the ground truth; as in the kits, an evaluator that fails scores 0 with its error's text, tasks that it
does not know and names without five digits are skipped, and means are plain. `run_evaluation.py` skips missing videos,
`run_evaluation_video.py` counts them as 0 and needs metadata.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np

SPLITS = {"In-Domain_50": "In_Domain", "Out-of-Domain_50": "Out_of_Domain"}
CATEGORIES = {
    "move_data-generator": "Spatiality",
    "maze_data-generator": "Spatiality",
    "recolor_data-generator": "Transformation",
    "sort_data-generator": "Abstraction",
}
PRO = Path(__file__).name == "run_evaluation_video.py"


def frames(path: Path) -> np.ndarray:
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]).astype(float)


def evaluate(path: Path, truth: Path) -> dict[str, Any]:
    try:
        ours, right = (frames(each) for each in (path, truth / "ground_truth.mp4"))
        if PRO:
            json.loads((truth / "metadata.json").read_text())
        ours = ours[np.linspace(0, len(ours) - 1, len(right)).round().astype(int)]
        score = max(0.0, 1 - float(np.abs(ours - right).mean()) / 16)
        return {"score": score, "dimensions": {"task_specific": score}, "error": None}
    except Exception as error:
        return {"score": 0.0, "dimensions": {}, "error": str(error)}


def collect(model: Path, truth: Path) -> list[dict[str, Any]]:
    videos = []
    for folder, split in SPLITS.items():
        for task in sorted(((truth if PRO else model) / folder).glob("*")):
            if task.name not in CATEGORIES:
                print(f"Warning: No evaluator for task {task.name}")
                continue
            for each in sorted(task.iterdir()):
                if not re.fullmatch(r"\d{5}", each.stem):
                    continue
                path = model / folder / task.name / f"{each.stem}.mp4"
                missing = {"score": 0.0, "dimensions": {}, "error": "no prediction"}
                result = evaluate(path, truth / folder / task.name / each.stem) if path.exists() else missing
                videos.append(
                    {
                        "video_path": str(path) if path.exists() else None,
                        "video_file": f"{each.stem}.mp4",
                        "task_name": task.name,
                        "split": split,
                        "category": CATEGORIES[task.name],
                        "folder": folder,
                        **result,
                    }
                )
    return videos


def main() -> None:
    parser = argparse.ArgumentParser()
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--model_path")
    group.add_argument("--models_base")
    parser.add_argument("--gt_base", required=True)
    parser.add_argument("--output_dir")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    model = Path(arguments.model_path)
    samples = collect(model, Path(arguments.gt_base))
    if not samples:
        print(f"No videos found in {model}")
        return
    summary = {}
    for split in (*SPLITS.values(), "overall"):
        scores = [each["score"] for each in samples if split in ("overall", each["split"])]
        summary[split] = {"mean_score": sum(scores) / len(scores) if scores else 0.0, "num_samples": len(scores)}
    content = {"model_name": model.name, "samples": samples, "summary": summary}
    Path(arguments.output_dir, f"{model.name}_vbvr_results.json").write_text(json.dumps(content))


if __name__ == "__main__":
    sys.exit(main())
