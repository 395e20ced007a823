from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny_models import tiny_wan_pipeline
from vlmteacher.media import write_video


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """Pipeline directory of a tiny random Wan that makes 5 frames of 32 x 48."""
    return tiny_wan_pipeline(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Three instances for it; not to be written to."""
    folder = tmp_path_factory.mktemp("data")
    for k in range(3):
        write_instance(folder / "task" / f"{k:03d}", f"move the {('red', 'green', 'ball')[k]} box", seed=k)
    return folder


def write_instance(
    folder: Path, prompt: str, seed: int = 0, frames: int = 5, size: tuple[int, int] = (32, 48), fps: float = 8.0
) -> np.ndarray:
    """An instance of noise in VBVR's layout; returns its frames."""
    video = np.random.default_rng(seed).integers(0, 255, (frames, *size, 3)).astype(np.uint8)
    return write_clip(folder, video, fps, prompt)


def write_clip(folder: Path, video: np.ndarray, fps: float, prompt: str = "move") -> np.ndarray:
    """An instance of these frames in VBVR's layout; returns them."""
    folder.mkdir(parents=True)
    write_video(folder / "ground_truth.mp4", video, fps)
    Image.fromarray(video[0]).save(folder / "first_frame.png")
    (folder / "prompt.txt").write_text(prompt)
    return video
