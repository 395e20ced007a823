from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_pair import PROMPT
from tests.trust.forking import Forks, build
from vlmteacher.cli import main


@pytest.fixture(scope="session")
def solve(models: dict[str, str], queries_file: Path) -> Callable[..., list[str]]:
    """Arguments of a small `solve`; a keyword changes one of them, None leaves it out."""

    def solve(out: Path, *flags: str, **changed: Any) -> list[str]:
        values: dict[str, Any] = {
            **models,
            "prompt": PROMPT,
            "queries": queries_file,
            "max_steps": 3,
            "rank": 2,
            "frames": 4,
            "lr": 0.03,
            "out": out,
            **changed,
        }
        pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in values.items() if value is not None)
        return ["solve", *(part for pair in pairs for part in pair), *flags]

    return solve


@pytest.fixture(scope="session")
def forks(solve: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Where the command line runs in forks, whose changes of files can be made to fail."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("forks")
    forks = Forks(solve(folder / "warm-up", max_steps=1), build(folder))
    yield forks
    forks.close()


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return run
