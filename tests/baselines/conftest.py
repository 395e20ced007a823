from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.tiny_pair import QUERIES
from vlmteacher.baselines.training_prompts import read_folder
from vlmteacher.pipeline import TeacherPipeline

SMALL = {
    "steps": 3,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "rank": 2,
    "save_every": 1,
    "log_every": 1,
    "held_out": 1,
    "samples": 1,
    "teacher_frames": 4,
}


@pytest.fixture(scope="module")
def pipe(models: dict[str, str]) -> TeacherPipeline:
    """Random models of the real classes."""
    loaded = TeacherPipeline.from_pretrained(**models)
    return TeacherPipeline(loaded.reasoner, loaded.teacher, loaded.decoder, {"teacher_frames": 2})


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def write_prompts(folder: Path, count: int = 4, seed: int = 0) -> Path:
    """Write instances without videos: different prompts, first frames of noise."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        place = folder / "task" / f"{k:03d}"
        place.mkdir(parents=True)
        picture = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(picture).save(place / "first_frame.png")
        (place / "prompt.txt").write_text(f"move the {('red', 'green', 'ball', 'box')[k % 4]} box\n")
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four prompts with first frames; not to be written to."""
    return write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture
def config(models: dict[str, str], prompts: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write the config of a small training of either kind; queries are there, as the random Teacher writes none."""

    def config(name: str = "run", **changed: Any) -> Path:
        values = {**models, "data": str(prompts), "out": str(tmp_path / name), **SMALL} | changed
        (tmp_path / name).mkdir(exist_ok=True)
        rows = [{"digest": one.digest, "queries": QUERIES} for one in read_folder(prompts)]
        (tmp_path / name / "queries.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return config
