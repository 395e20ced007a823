"""A tiny Wan pipeline and its Reasoner, for the tests of this folder."""

import pytest

from tests.tiny_models import tiny_wan_pipeline
from vlmteacher.reasoners.loading import load_reasoner


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_wan_pipeline(tmp_path_factory.mktemp("wan"))


@pytest.fixture()
def reasoner(directory):
    return load_reasoner(directory)
