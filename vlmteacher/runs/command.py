"""The command line of this process, for run.json."""

from __future__ import annotations

from contextvars import ContextVar

command_line: ContextVar[str | None] = ContextVar("command_line", default=None)
"""Set by the command line to what was typed, quoted for a shell; None in a call from Python."""
