from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest

from tests.trust.forking import Forks, build


@pytest.fixture(scope="session")
def forks(solve: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Where the command line runs in forks, whose changes of files can be made to fail."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("forks")
    forks = Forks(solve(folder / "warm-up", max_steps=1), build(folder))
    yield forks
    forks.close()
