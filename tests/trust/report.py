"""What the tests of trust tried, for the table in docs/results/trust.md.

With VLMTEACHER_TRUST_REPORT=FILE every count is appended to FILE as a line of JSON, by however many processes.
`python -m tests.trust.report FILE` prints what was tried, and how often in all.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path


def count(name: str, tried: int, outcome: str) -> None:
    """Note how often something was tried (`name`: "SIGKILL of solve at a random moment") and what came of it."""
    if file := os.environ.get("VLMTEACHER_TRUST_REPORT"):
        with open(file, "a", encoding="utf-8") as report:
            report.write(json.dumps({"name": name, "tried": tried, "outcome": outcome}) + "\n")


def table(path: Path) -> str:
    """A line for each thing that was tried, and the sum."""
    tried: Counter[tuple[str, str]] = Counter()
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        tried[row["name"], row["outcome"]] += row["tried"]
    rows = [f"| {name} | {number} | {outcome} |" for (name, outcome), number in tried.items()]
    return "\n".join(["| tried | times | outcome |", "|---|---|---|", *rows, f"| in all | {sum(tried.values())} | |"])


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
