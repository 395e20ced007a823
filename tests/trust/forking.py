"""The command line in a fork of a process that has all its imports, so that killing it costs a second and not ten.

`python -m tests.trust.forking` answers lines of JSON (see `Command`) on standard input; `Forks` is the other end.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT


@dataclass
class Command:
    """One call of the command line.

    folder, nth, error, lasting, renames: see `fault_set` in faults.c. signals: sent after so many seconds, in order,
    from the start on, or from when the file `when` is there.
    """

    arguments: Sequence[str]
    folder: str = ""
    nth: int = 0
    error: int = 0
    lasting: bool = True
    renames: bool = False
    signals: Sequence[tuple[float, int]] = ()
    when: str | None = None


@dataclass
class Result:
    """status: as a shell has it, 128 + n after a signal n that was not caught. changes: how many were counted."""

    status: int
    out: str
    err: str
    seconds: float
    changes: int


class Forks:
    """A process of this file. `run` runs the command line in a fork of it."""

    def __init__(self, warm_up: Sequence[str], library: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LD_PRELOAD": str(library)}
        command = [sys.executable, "-m", "tests.trust.forking", json.dumps(list(warm_up))]
        self._process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        assert self._process.stdout.readline() == "ready\n"

    def run(self, arguments: Sequence[str], **keywords: Any) -> Result:
        """Run `Command(arguments, **keywords)` to its end."""
        self._process.stdin.write(json.dumps(asdict(Command([*arguments], **keywords))) + "\n")
        self._process.stdin.flush()
        return Result(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def build(folder: Path) -> Path:
    """faults.c as a library."""
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def serve() -> None:
    from tqdm import tqdm

    from vlmteacher.cli import main

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the warm-up prints is no reply
    tqdm.set_lock(threading.RLock())  # the usual one is shared by all forks: who is killed with it stops the others
    assert main(json.loads(sys.argv[1])) == 0
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            replies.write(json.dumps(asdict(_answer(Command(**json.loads(line)), Path(folder)))) + "\n")
            replies.flush()


def _answer(command: Command, folder: Path) -> Result:
    out, err, changes = (folder / name for name in ("out", "err", "changes"))
    out.touch()
    err.touch()
    began = time.monotonic()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a child that is interrupted before it has begun is no child
    pid = os.fork()
    if pid == 0:
        _child(command, out, err, changes)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    while command.when and not os.path.exists(command.when) and not os.waitid(os.P_PID, pid, ENDED):
        time.sleep(0.002)
    sending = time.monotonic() if command.when else began
    for after, number in command.signals:
        time.sleep(max(0.0, sending + after - time.monotonic()))
        os.kill(pid, number)  # it may have ended: it stays until it is waited for
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    counted = int(changes.read_text()) if changes.exists() else 0
    status = 128 - status if status < 0 else status
    return Result(status, out.read_text(), err.read_text(), time.monotonic() - began, counted)


def _child(command: Command, out: Path, err: Path, changes: Path) -> None:
    from vlmteacher.cli import main

    status = 70
    try:
        for handle, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), handle)
        libc = ctypes.CDLL(None)
        rest = command.nth, command.error, command.lasting, command.renames
        libc.fault_set(command.folder.encode(), *rest)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        status = main([*command.arguments])
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        changes.write_text(str(libc.fault_count()))
        sys.stdout.flush()
        sys.stderr.flush()
    except KeyboardInterrupt:  # before `main` or after it
        status = 128 + signal.SIGINT
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    serve()
