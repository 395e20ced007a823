"""The journal of a sweep keeps what was appended, whatever cut the last line off."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from vlmteacher.errors import InputError
from vlmteacher.evaluation import journal
from vlmteacher.evaluation.journal import Journal


def check(row: dict[str, Any]) -> None:
    row["k"] + 0


def read(path: Path) -> list[dict[str, Any]]:
    return list(Journal(path).read(check, "remove it"))


def test_rows_come_back(tmp_path: Path) -> None:
    rows = [{"k": k, "text": "é\u2028\n}"} for k in range(5)]
    log = Journal(tmp_path / "log")
    assert list(log.read(check, "remove it")) == []
    with log.appending():
        log.append(rows[:3])
        assert read(log.path) == rows[:3]
        log.append(rows[3:])
    assert read(log.path) == rows


def test_a_line_cut_at_any_byte_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log"
    whole = b'{"k": 1}\n{"k": 2}\n'
    for cut in range(9, len(whole) + 1):
        path.write_bytes(whole[:cut])
        log = Journal(path)
        kept = list(log.read(check, "remove it"))
        assert path.read_bytes() == whole[:cut]  # unchanged until it is opened
        with log.appending():
            log.append([{"k": 3}])
        assert read(path) == [*kept, {"k": 3}] and len(kept) == 1 + (cut == len(whole))


def test_a_whole_journal_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"k": 1}\n')
    os.utime(path, (1, 1))
    log = Journal(path)
    assert len(list(log.read(check, "remove it"))) == 1
    with log.appending():
        pass
    assert path.stat().st_mtime == 1 and path.read_bytes() == b'{"k": 1}\n'


@pytest.mark.parametrize("line", [b"[1, 2}\n", b"{}\n", b'{"k": "a"}\n', b"\xff\n", b"[" * 100_000 + b"\n", b"\n"])
def test_other_lines_are_refused(line: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"k": 1}\n' + line)
    with pytest.raises(InputError, match="is not a row of results: remove it"):
        read(path)
    monkeypatch.setattr(journal, "LINE_LIMIT", 1000)
    with pytest.raises(InputError, match=r"'\\x00"):
        list(Journal(Path("/dev/zero")).read(check, "remove it"))


def test_it_is_flushed_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes = []
    monkeypatch.setattr(journal.os, "fsync", flushes.append)
    log, clock = Journal(tmp_path / "log"), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with log.appending():
        for _ in range(100):
            log.append([{"k": 1}])
            clock[0] += 0.1
        assert 10 <= len(flushes) <= 11
    assert 11 <= len(flushes) <= 12
