from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny_pair import QUERIES, tiny_pair
from vlmteacher.pipeline import TeacherPipeline


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of a random Reasoner, Teacher and decoder that fit together."""
    return tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def pipe(models: dict[str, str]) -> TeacherPipeline:
    """These models as a pipeline, for the tests of one file."""
    return TeacherPipeline.from_pretrained(**models)


@pytest.fixture(scope="session")
def queries_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("queries") / "queries.json"
    path.write_text(json.dumps(QUERIES))
    return path
