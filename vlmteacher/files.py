"""Files: written atomically and durably; read with a limit on their size and without trust."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import numbers
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from vlmteacher.errors import InputError, OutputError

TEXT_LIMIT = 16 * 2**20  # bytes of a file of settings, queries or names
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of file systems without locks
LARGEST_INTEGER = 2**64 - 1  # seeds are the largest integers in our files
TEMPORARY = re.compile(r"\..*\.\d+\.partial(\.[^.]*)?")  # see `replacing`
LOCK = ".lock"  # see `claimed`
GRACE = 2.0  # seconds, see `_lock`


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` to write to; at the end it is flushed to the disk and renamed to `path`.

    A reader, also after a crash or a power failure, finds either the previous file or the whole new one. The temporary
    name may be that of a folder; then there is a moment without either. Raises OutputError when the file system refuses
    (full, read-only, gone); `path` is then unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    with output_errors(path):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError(errno.EEXIST, "it is a device or a pipe, no file")  # which the renaming would replace
        try:
            yield temporary
            if temporary.is_dir():
                for each in temporary.rglob("*"):
                    _sync(each)
                shutil.rmtree(path, ignore_errors=True)
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            with suppress(OSError):
                _remove(temporary)


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Raise errors of the operating system inside the block as an OutputError about `path`."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        if (cause := _system_error(error)) is None:
            raise
        raise OutputError(path, cause) from error


def _system_error(error: Exception) -> OSError | None:
    """The system's error behind `error`, for which torch and libraries in Rust raise errors of their own."""
    if isinstance(error, OSError):
        return error
    if rust := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(rust[1]), os.strerror(int(rust[1])))
    context = error.__context__
    return context if isinstance(error, RuntimeError) and isinstance(context, OSError) else None


@contextmanager
def claimed(folder: Path, label: str = "output directory") -> Iterator[None]:
    """Make `folder` where it is missing, and lock it for this process and thread.

    The lock is the system's, on the file `LOCK`, and ends with the process. Temporary files of earlier processes are
    removed, and at the end a folder that was made here and is still empty. Raises InputError when another process holds
    `folder`, or when it is no directory or not writable; OutputError when the disk is full.
    """
    folder = Path(folder)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = _lock(folder / LOCK)
        except BlockingIOError as error:
            raise InputError(
                f"{label} {folder} is being written to by another process: wait for its end, or give another one"
            ) from error
        except OSError as error:
            if error.errno in FULL:
                raise OutputError(folder, error) from error
            raise InputError(f"{label} {folder} cannot be written to ({error.strerror}): give another one") from error
        try:
            remove_leftovers(folder)
            yield
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink()  # while locked: a process that waits then sees another file
            os.close(handle)
    finally:
        for each in made:
            with suppress(OSError):  # it is not empty
                each.rmdir()


def _lock(path: Path) -> int:
    """A locked handle of the file `path`. Raises BlockingIOError when another handle keeps the lock.

    It may be that of a killed process, whose child has it until it runs another program: so this waits for `GRACE`.
    """
    deadline = time.monotonic() + GRACE
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(handle)
                if not isinstance(error, BlockingIOError) or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
                continue
        try:
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)  # its last holder has removed it


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file (see `replacing`)."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file (see `replacing`)."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented UTF-8 JSON (see `replacing`)."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)  # never the whole text at once
        file.write("\n")


def append_text(path: Path, text: str) -> None:
    """Append to a UTF-8 file and wait until it is on the disk. Raises OutputError, possibly after a part is written."""
    with output_errors(path), path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents. Raises OutputError."""
    with output_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Remove a file if it exists. Raises OutputError."""
    with output_errors(path):
        path.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of `replacing` in `folder`, which must be locked (see `claimed`)."""
    for each in folder.iterdir():
        if TEMPORARY.fullmatch(each.name):
            _remove(each)


def read_text(path: str | os.PathLike[str], label: str, limit: int = TEXT_LIMIT) -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    label: the kind of file, for messages ("queries file"). limit: bytes; at most one more is read, so that a device
    or a wrong file costs nothing. Raises InputError when it is missing, unreadable, longer than `limit` or not UTF-8.
    """
    name = f"{label} {os.fspath(path)}"
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"{name} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(data) > limit:
        raise InputError(f"{name} is larger than {limit} bytes: is it the right file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is no UTF-8 text (byte {error.start}): save it as UTF-8") from error


def read_json(path: str | os.PathLike[str], label: str, limit: int = TEXT_LIMIT) -> Any:
    """Read a JSON file of a user or a hub (see `read_text` and `parse_json`). Raises InputError."""
    return parse_json(read_text(path, label, limit), f"{label} {os.fspath(path)}")


def parse_json(text: str, name: str) -> Any:
    """Parse JSON more strictly than Python: no NaN, no integer beyond 64 bits, no duplicate names in an object.

    name: of the text, for messages. Raises InputError for these, for values nested too deep and for text that cannot be
    encoded (see `check_text`).
    """
    try:
        value = json.loads(
            text, parse_int=_integer, parse_float=_float, parse_constant=_no_constant, object_pairs_hook=_object
        )
    except RecursionError as error:
        raise InputError(f"{name} is nested too deep") from error
    except ValueError as error:
        raise InputError(f"{name} is not JSON ({error})") from error
    _check_plain(value, name)
    return value


def read_yaml(path: str | os.PathLike[str], label: str) -> Any:
    """Read a YAML file of plain values: no tags, no aliases, no duplicate names. Raises InputError."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few aliases can expand to gigabytes
                raise yaml.YAMLError("an alias (*name): write the value out")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [each.value for each, _ in node.value if isinstance(each.value, str)]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise yaml.YAMLError(f"{twice!r} stands twice in one mapping")
            return super().construct_mapping(node, deep)

    text, name = read_text(path, label), f"{label} {os.fspath(path)}"
    try:
        value = yaml.load(text, Loader)
    except RecursionError as error:
        raise InputError(f"{name} is nested too deep") from error
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:  # malformed dates and numbers raise these
        raise InputError(f"{name} is no YAML that can be used ({' '.join(str(error).split())[:200]})") from error
    _check_plain(value, name)
    return value


def _check_plain(value: Any, name: str) -> None:
    """Raise InputError for dates, sets, bytes, NaN, infinite and very large numbers, and text that is not UTF-8."""
    if isinstance(value, dict):
        for key, each in value.items():
            _check_plain(key, name)
            _check_plain(each, name)
    elif isinstance(value, list):
        for each in value:
            _check_plain(each, name)
    elif isinstance(value, str):
        check_text(value, name)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"{name} holds {value}, which is no number to work with")
    elif isinstance(value, int):
        if abs(value) > LARGEST_INTEGER:
            raise InputError(f"{name} holds an integer of more than 64 bits")
    elif value is not None:
        raise InputError(f"{name} holds a {type(value).__name__} where a text, a number or a list is expected")


def check_text(text: str, name: str, most: int | None = None) -> str:
    """Return `text`. Raise InputError when it holds a lone surrogate, a NUL or more than `most` characters."""
    if most is not None and len(text) > most:
        raise InputError(f"{name} has {len(text)} characters, at most {most} are allowed: shorten it")
    at = next((i for i, c in enumerate(text) if c == "\0" or "\ud800" <= c <= "\udfff"), None)
    if at is not None:
        what = "a NUL" if text[at] == "\0" else f"a byte or half a character ({ascii(text[at])[1:-1]})"
        raise InputError(f"{name} holds {what} at position {at}, which is no text: remove it, or save it as UTF-8")
    return text


def check_number(
    value: Any, name: str, *, whole: bool = False, least: float = -math.inf, above: float = -math.inf
) -> None:
    """Raise InputError unless `value` is a finite number of this range; true and false are not numbers."""
    shown = repr(value) if len(repr(value)) <= 40 else f"{value!r:.40}..."
    kind: Any = numbers.Integral if whole else numbers.Real
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{name} must be a {'whole ' if whole else ''}number, not {shown}")
    if not value >= least or not value > above or not value < math.inf:
        limit = f"at least {least:g}" if value < least else f"greater than {above:g}" if value <= above else "finite"
        raise InputError(f"{name} must be {limit}, not {shown}")


def _integer(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) > LARGEST_INTEGER:
        raise ValueError(f"the integer {digits[:20]}{'...' if len(digits) > 20 else ''} has more than 64 bits")
    return int(digits)


def _float(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return value


def _sync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EROFS):  # file systems without anything to flush
            raise
    finally:
        os.close(handle)
