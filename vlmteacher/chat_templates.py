"""Render chat templates: programs in Jinja, of a model's directory, that may run forever or fill the memory.

Jinja's sandbox keeps a template from files and from Python, but bounds single loops only. So a template runs in a
forked process with limits of its own, which the caller's process survives.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from vlmteacher.errors import InputError, first_line
from vlmteacher.interruption import uninterrupted

SECONDS = 5  # of processor time; templates take milliseconds
MOST_SECONDS = 20.0  # of wall time, on a machine that is busy
TRIES = 3  # a process that is forked beside threads may wait for ever for a lock that one of them held
MEMORY = 2**29  # bytes beyond those of the process
LONGEST = 2**23  # bytes of the answer
KEPT = 256
Messages = Sequence[Mapping[str, Any]]  # of a chat: roles and contents, as `apply_chat_template` takes them
_rendered: dict[str, str] = {}  # the last chats: many questions are asked again


def render(tokenizer: Any, chat: Messages, label: str, *, asks: bool = True) -> str:
    """`render_all` of one chat."""
    return render_all(tokenizer, [chat], label, asks=asks)[0]


def render_all(tokenizer: Any, chats: Sequence[Messages], label: str, *, asks: bool = True) -> list[str]:
    """The texts of chats by the tokenizer's chat template, in one process; `asks` for the next answer at their ends.

    A template that knows ``enable_thinking`` closes the thought at once. label: the template's name in messages.

    Raises InputError: the template is invalid, refuses a chat, or needs more than the limits above.
    """
    known = [tokenizer.chat_template, tokenizer.special_tokens_map, asks]
    keys = [json.dumps([*known, chat], default=str) for chat in chats]
    texts = {key: _rendered[key] for key in keys if key in _rendered}
    if new := {key: chat for key, chat in zip(keys, chats, strict=True) if key not in texts}:
        made = dict(zip(new, _render(tokenizer, list(new.values()), label, asks), strict=True))
        texts |= made
        _rendered.update(made)
        while len(_rendered) > KEPT:
            _rendered.pop(next(iter(_rendered)), None)
    return [texts[key] for key in keys]


def _render(tokenizer: Any, chats: Sequence[Messages], label: str, asks: bool) -> list[str]:
    answers = (_ask(tokenizer, chats, asks) for _ in range(TRIES))
    if not (answer := next((answer for answer in answers if answer is not None), b"")):
        raise InputError(
            f"{label} needs more than {SECONDS} s, {MEMORY >> 20} MiB or {LONGEST >> 20} MiB of text: its loops have no"
            " end; take the template of a checkpoint that you trust"
        )
    reply = json.loads(answer)
    if "error" in reply:
        raise InputError(f"{label} cannot be used ({reply['error']:.200}): is the copy complete?")
    texts: list[str] = reply["texts"]
    return texts


def _ask(tokenizer: Any, chats: Sequence[Messages], asks: bool) -> bytes | None:
    """The answer of a process of its own; nothing where it ended at a limit, None where it did not end in time."""
    with uninterrupted():
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child uses none
            child = os.fork()
        if child == 0:
            _answer(write, tokenizer, chats, asks)
        os.close(write)
        try:
            return _read_line(read)
        finally:
            os.close(read)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(child, 0)


def _answer(write: int, tokenizer: Any, chats: Sequence[Messages], asks: bool) -> NoReturn:
    """Write the texts, or the error, as a line of JSON; ends the process."""
    try:
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_CPU, SECONDS)
        with suppress(OSError):  # where the size is not known, the time alone is limited
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY)
        reply: dict[str, Any] = {
            "texts": [
                tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=asks, enable_thinking=False)
                for chat in chats
            ]
        }
    except MemoryError:
        os._exit(1)
    except BaseException as error:
        reply = {"error": first_line(error)}
    with suppress(BaseException):
        data = json.dumps(reply).encode() + b"\n"
        while data:
            data = data[os.write(write, data) :]
    os._exit(0)


def _limit(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def _read_line(handle: int) -> bytes | None:
    """The line; nothing where it ends before or exceeds `LONGEST`, None where it takes more than `MOST_SECONDS`."""
    data, end = b"", time.monotonic() + MOST_SECONDS
    while not data.endswith(b"\n"):
        if not select.select([handle], [], [], max(0.0, end - time.monotonic()))[0]:
            return None
        part = os.read(handle, 2**16)
        data += part
        if not part or len(data) > LONGEST:
            return b""
    return data
