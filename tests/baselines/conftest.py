from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlmteacher.pipeline import TeacherPipeline


@pytest.fixture(scope="module")
def pipe(models: dict[str, str]) -> TeacherPipeline:
    """Random models of the real classes."""
    loaded = TeacherPipeline.from_pretrained(**models)
    return TeacherPipeline(loaded.reasoner, loaded.teacher, loaded.decoder, {"teacher_frames": 2})


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
