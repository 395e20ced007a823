"""The disk is full, read-only or gone at every write of a run: one line, nothing half-written, `--resume` goes on."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run, Solve
from tests.trust.forking import Forks, Result
from tests.trust.report import count
from tests.trust.test_kills import same
from vlmteacher.files import TEMPORARY
from vlmteacher.runs.folder import RECORD, RunFolder

PARTS = 7


@pytest.fixture(scope="module")
def whole(forks: Forks, solve: Solve, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = forks.run(solve(folder), folder=str(folder))
    assert result.status == 0, result.err
    return folder, result


def check_refused(result: Result, folder: Path, whole: Path) -> None:
    """One line, exit status 1, and only whole files."""
    assert result.status == 1, result.err
    errors = [line for line in result.err.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert len(errors) == 1 and "cannot be written" in errors[0], result.err
    for file in folder.iterdir() if folder.exists() else ():
        assert not TEMPORARY.fullmatch(file.name) and file.name != ".lock"
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.name != "state.pt" and file.suffix in (".mp4", ".safetensors"):
            assert file.read_bytes() == (whole / file.name).read_bytes()
    if (folder / RECORD).exists():
        assert "--resume goes on" in errors[0]


def go_on(forks: Forks, solve: Solve, folder: Path, whole: Path) -> None:
    flags = ["--resume"] if (folder / RECORD).exists() else []
    resumed = forks.run(solve(folder, *flags))
    assert resumed.status == 0, resumed.err
    same(folder, whole)


FULL, READ_ONLY = errno.ENOSPC, errno.EROFS


@pytest.mark.parametrize(
    ("error", "lasting", "part"),
    [
        pytest.param(error, lasting, part, marks=[] if number == part == 0 else pytest.mark.slow(days=28))
        for number, (error, lasting) in enumerate([(FULL, True), (FULL, False), (READ_ONLY, True)])
        for part in range(PARTS)
    ],
)
def test_every_change_of_the_folder_fails(
    forks: Forks, solve: Solve, whole: tuple[Path, Result], tmp_path: Path, error: int, lasting: bool, part: int
) -> None:
    """The n-th change of a file or name, and all later ones with `lasting`."""
    changes = whole[1].changes
    assert changes > 30
    tried = range(1 + (part + error + lasting) % PARTS, changes + 1, PARTS)
    for nth in tried:
        folder = tmp_path / str(nth)
        failed = forks.run(solve(folder), folder=str(folder), nth=nth, error=error, lasting=lasting)
        if failed.status == 2:  # before anything was done
            assert error == READ_ONLY and not folder.exists()
            continue
        if failed.status == 0:  # the removal of the lock, or the fsync of a directory: all results are there
            same(folder, whole[0])
            continue
        check_refused(failed, folder, whole[0])
        go_on(forks, solve, folder, whole[0])
    count(f"{errno.errorcode[error]} at the n-th change of a run folder, for every n", len(tried), "resumed, equal")


@pytest.mark.slow
def test_a_small_disk(forks: Forks, solve: Solve, whole: tuple[Path, Result], tmp_path: Path) -> None:
    """A real file system, ffmpeg's writes among those that find it full."""
    used = sum(file.stat().st_size for file in whole[0].iterdir())
    mounted = tmp_path / "disk"
    mounted.mkdir()
    sizes = [used * share // 8 for share in range(1, 9)]
    for size in sizes:
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mounted], capture_output=True
        ).returncode:
            pytest.skip("mounting needs root")
        try:
            folder = mounted / "run"
            failed = forks.run(solve(folder))
            check_refused(failed, folder, whole[0])
            subprocess.run(["mount", "-o", "remount,size=64M", mounted], check=True)
            go_on(forks, solve, folder, whole[0])
        finally:
            subprocess.run(["umount", "-l", mounted], check=True)
    count("a file system too small for a run", len(sizes), "resumed with room, equal to the bit")


def test_the_folder_is_removed(run: Run, solve: Solve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    save = RunFolder.save_state

    def gone(self: RunFolder, *arguments: Any, **keywords: Any) -> None:
        shutil.rmtree(folder)
        save(self, *arguments, **keywords)

    monkeypatch.setattr(RunFolder, "save_state", gone)
    status, _, err = run(*solve(folder))
    assert status == 1 and "cannot be written (No such file or directory)" in err and "Traceback" not in err
    monkeypatch.undo()
    assert run(*solve(folder))[0] == 0


def test_standard_output_is_full() -> None:
    command = [sys.executable, "-m", "vlmteacher", "env"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1 and result.stderr == "error: [Errno 28] No space left on device\n"
