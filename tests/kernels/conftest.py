"""What the tests of every operator's kernels share."""

from __future__ import annotations

import ctypes

import pytest

from tests.kernels import simt


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The operator's CUDA source as a library for the CPU: tests/kernels/simt/NAME.cpp for test_NAME.py."""
    return simt.build(f"{request.module.__name__.rpartition('.test_')[2]}.cpp")
