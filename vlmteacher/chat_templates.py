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
MOST_SECONDS = 60.0  # of wall time, on a machine that is busy
MEMORY = 2**29  # bytes beyond those of the process
LONGEST = 2**23  # bytes of the answer
KEPT = 256
_rendered: dict[str, str] = {}  # the last chats: many questions are asked again


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], label: str, *, asks: bool = True) -> str:
    """The text of a chat by the tokenizer's chat template; `asks` for the next answer at its end.

    messages: roles and contents, as `apply_chat_template` takes them. A template that knows ``enable_thinking`` closes
    the thought at once. label: the template's name in messages.

    Raises InputError: the template is invalid, refuses the messages, or needs more than the limits above.
    """
    key = json.dumps([tokenizer.chat_template, tokenizer.special_tokens_map, messages, asks], default=str)
    if key not in _rendered:
        while len(_rendered) >= KEPT:
            _rendered.pop(next(iter(_rendered)), None)
        _rendered[key] = _render(tokenizer, messages, label, asks)
    return _rendered[key]


def _render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], label: str, asks: bool) -> str:
    with uninterrupted():
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child uses none
            child = os.fork()
        if child == 0:
            _answer(write, tokenizer, messages, asks)
        os.close(write)
        try:
            answer = _read_line(read)
        finally:
            os.close(read)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(child, 0)
    if not answer:
        raise InputError(
            f"{label} needs more than {SECONDS} s, {MEMORY >> 20} MiB or {LONGEST >> 20} MiB of text: its loops have no"
            " end; take the template of a checkpoint that you trust"
        )
    reply = json.loads(answer)
    if "error" in reply:
        raise InputError(f"{label} cannot be used ({reply['error']:.200}): is the copy complete?")
    return reply["text"]


def _answer(write: int, tokenizer: Any, messages: Sequence[Mapping[str, Any]], asks: bool) -> NoReturn:
    """Write the chat, or the error, as a line of JSON; ends the process."""
    try:
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_CPU, SECONDS)
        with suppress(OSError):  # where the size is not known, the time alone is limited
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY)
        reply = {
            "text": tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asks, enable_thinking=False
            )
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


def _read_line(handle: int) -> bytes:
    """The line, or nothing where it does not come whole within `MOST_SECONDS` and `LONGEST`."""
    data, end = b"", time.monotonic() + MOST_SECONDS
    while not data.endswith(b"\n"):
        if not select.select([handle], [], [], max(0.0, end - time.monotonic()))[0]:
            return b""
        part = os.read(handle, 2**16)
        data += part
        if not part or len(data) > LONGEST:
            return b""
    return data
