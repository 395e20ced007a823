"""A VLM as the judge of a benchmark: every valid reply is kept on disk, an invalid one is asked for once more."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

from vlmteacher.evaluation.vlm import VLM, Part
from vlmteacher.files import make_folder, read_json, write_json

K = TypeVar("K")
T = TypeVar("T")
KEY = "VLMTEACHER_JUDGE_KEY"  # environment variable
CORRECTION = """
Your reply to this request was:
{reply}
It cannot be used: {reason}. Reply again, the whole of it in the form that was asked for."""
SHOWN = 4000  # characters of an invalid reply that the judge is shown again


class InvalidReply(ValueError):
    """Neither of a judge's two replies to a request can be used."""


class Judge:
    """A VLM that judges, and its replies of earlier runs.

    Only replies that the caller's `parse` takes are kept, in files named by the SHA-256 of everything that they depend
    on. A file is written whole or not at all, so that several processes, and runs that were killed, can share a folder.

    Args:
        vlm: the model.
        cache: folder of the replies; made where it is missing.
        version: of the request's wording.
    """

    def __init__(self, vlm: VLM, cache: Path, version: str) -> None:
        self.vlm, self.cache, self.version = vlm, cache, version
        self._writing = Lock()  # two threads of a process would write to one temporary file

    def ask(self, system: str, content: Sequence[Part], parse: Callable[[str], T]) -> T:
        """Return the parsed reply to a request: of an earlier run, or the model's first or second one.

        parse: raises ValueError with the reason for a reply that cannot be used. Raises InvalidReply; EndpointError and
        InputError as `VLM.ask` does, and OutputError.
        """
        key = self.key(system, content)
        file = self.cache / key[:2] / f"{key}.json"
        try:
            return parse(read_json(file, "reply")["reply"])
        except (ValueError, TypeError, KeyError):  # InputError among them: missing or damaged
            pass
        request, reason = list(content), ""
        for _ in range(2):
            reply = self.vlm.ask(system, request)
            try:
                parsed = parse(reply)
            except ValueError as error:
                reason = str(error)
                request = [*content, CORRECTION.format(reply=reply[:SHOWN], reason=reason)]
                continue
            with self._writing:
                make_folder(file.parent)
                write_json(file, {**self.vlm.described(), "version": self.version, "reply": reply})
            return parsed
        raise InvalidReply(f"two replies of the judge cannot be used ({reason})")

    def key(self, system: str, content: Sequence[Part]) -> str:
        """Return the SHA-256 of model, endpoint, settings, version and content."""
        parts = [part if isinstance(part, str) else [*part.size, _digest(part.tobytes())] for part in content]
        return _digest(json.dumps([self.vlm.described(), self.version, system, parts], sort_keys=True).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def user_cache() -> Path:
    """Return the folder of this package in the user's folder of caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmteacher"


def at_a_time(work: Callable[[K], T], items: Sequence[K], count: int) -> Iterator[tuple[K, T]]:
    """Yield items with their results, in the order in which they finish, `count` at a time; raise the first error.

    The threads end with the process and begin no item after the caller has stopped: an interruption waits for no
    request.
    """
    if count == 1:
        yield from ((item, work(item)) for item in items)
        return
    waiting = deque(items)
    done: SimpleQueue[tuple[K, Any, BaseException | None]] = SimpleQueue()

    def run() -> None:
        while waiting:
            try:
                item = waiting.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                done.put((item, work(item), None))
            except BaseException as error:
                done.put((item, None, error))

    for _ in range(min(count, len(items))):
        Thread(target=run, daemon=True).start()
    try:
        for _ in items:
            item, result, error = done.get()
            if error is not None:
                raise error
            yield item, result
    finally:
        waiting.clear()
