"""Tiny Wan checkpoints and an image, for the tests of this folder."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.reasoners import tiny_checkpoints
from tests.tiny_models import tiny_wan_pipeline
from vlmteacher.reasoners.loading import load_reasoner


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_wan_pipeline(tmp_path_factory.mktemp("wan"))


@pytest.fixture()
def reasoner(directory):
    return load_reasoner(directory)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Directories of checkpoints by family, each written once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = getattr(tiny_checkpoints, family)(tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (tiny_checkpoints.HEIGHT, tiny_checkpoints.WIDTH, 3), dtype=np.uint8)
    )
