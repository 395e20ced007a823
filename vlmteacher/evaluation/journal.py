"""Rows of results in an append-only file, which a killed sweep keeps."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from vlmteacher.errors import InputError
from vlmteacher.files import output_errors

LINE_LIMIT = 2**26  # bytes of a row: a wrong file or a device costs no more memory
SYNC = 1.0  # seconds: a flush to the disk costs milliseconds, which many workers would wait for

Row = dict[str, Any]


class Journal:
    """A file with a row of JSON on each line.

    A row is in the system's hands once it is appended, so that no killed process loses it; on the disk when the last
    flush is `SYNC` seconds old, and at the end. A last line that a full disk or a power failure cut off is dropped.

    First `read` all rows there are, then `append` within `appending`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._length = 0  # bytes of the rows that are kept
        self._file: FileIO
        self._flushed = 0.0

    def read(self, check: Callable[[Row], object], remedy: str) -> Iterator[Row]:
        """Yield the rows of the file, none if it is missing; it stays as it is.

        check: raises KeyError or TypeError for a row without the right entries. remedy: the end of the message.
        Raises InputError: a line is no such row, or the file cannot be read.
        """
        self._length = 0
        try:
            with self.path.open("rb") as file:
                while (line := file.readline(LINE_LIMIT)).endswith(b"\n") or len(line) == LINE_LIMIT:
                    yield self._parse(line, check, remedy)
                    self._length += len(line)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise InputError(f"{self.path} cannot be read ({error.strerror}): {remedy}") from error

    def _parse(self, line: bytes, check: Callable[[Row], object], remedy: str) -> Row:
        try:
            row: Row = json.loads(line.decode())
            check(row)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            shown = line[:40].decode(errors="backslashreplace")
            raise InputError(f"{self.path}: {shown!r}... is not a row of results: {remedy}") from error
        return row

    @contextmanager
    def appending(self) -> Iterator[None]:
        """Keep the rows that `read` yielded, without `read` none; let others be appended. Raises OutputError."""
        with output_errors(self.path):
            self._file = FileIO(self.path, "a")
        try:
            with output_errors(self.path):
                if os.fstat(self._file.fileno()).st_size != self._length:
                    self._file.truncate(self._length)
            yield
        finally:
            with output_errors(self.path), self._file:
                os.fsync(self._file.fileno())

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows. Raises OutputError, possibly after a part is written."""
        data = memoryview("".join(json.dumps(row) + "\n" for row in rows).encode())
        with output_errors(self.path):
            while data:
                data = data[self._file.write(data) :]
            if time.monotonic() - self._flushed >= SYNC:
                os.fsync(self._file.fileno())
                self._flushed = time.monotonic()
