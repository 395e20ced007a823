"""What the tests of trust tried, for the table in docs/results/trust.md.

With VLMTEACHER_TRUST_REPORT=FILE every count is appended to FILE as a line of JSON, by however many processes.
"""

from __future__ import annotations

import json
import os


def count(name: str, tried: int, outcome: str) -> None:
    """Note how often something was tried (`name`: "SIGKILL of solve at a random moment") and what came of it."""
    if file := os.environ.get("VLMTEACHER_TRUST_REPORT"):
        with open(file, "a", encoding="utf-8") as report:
            report.write(json.dumps({"name": name, "tried": tried, "outcome": outcome}) + "\n")
