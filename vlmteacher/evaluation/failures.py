"""Where failures come from: the Teacher's eyes, its queries, or an optimisation that does not get there.

All from the rows of results.json: the Teacher's answers about the final video (``p_yes``), the right ones (``truths``,
from the labeller, see ``microworld.questions.Truth``) and the scorer's sub-scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

YES = 0.5
CAUSES = ("perception", "query", "few_steps", "threshold", "updates")
"""Of a failed instance. The Teacher answers Yes to all of its queries about the final video, wrongly to one at least
(``perception``) or rightly, so that what is wrong it does not ask about (``query``). Or it answers No to one, after it
answered Yes to all about the last prediction (``few_steps``), or No there too while the mean of the losses was good
enough to stop (``threshold``), or its loss was not low enough at any step (``updates``)."""


def cause(row: dict[str, Any]) -> str | None:
    """The entry of `CAUSES` that a row belongs to, None for a success."""
    if row["success"]:
        return None
    if _all_yes(row["p_yes"]):
        return "perception" if any(answer is False for _, answer in row["truths"]) else "query"
    if row.get("stopped") != "threshold":
        return "updates"
    return "few_steps" if _all_yes(row["steps"][-1]["p_yes"]) else "threshold"


def _all_yes(p_yes: Sequence[float]) -> bool:
    return all(p > YES for p in p_yes)


def judgements(row: dict[str, Any]) -> list[tuple[bool, bool, bool]]:
    """For each rule of the scorer that the queries are about: the Teacher's verdict, the truth, the scorer's verdict.

    Several questions about one rule count as one, Yes when all are.
    """
    rules: dict[str, list[tuple[bool, bool]]] = {}
    for p, (rule, answer) in zip(row["p_yes"], row["truths"], strict=True):
        if rule in row["subscores"]:
            rules.setdefault(rule, []).append((p > YES, bool(answer)))
    return [
        (all(said for said, _ in group), all(true for _, true in group), row["subscores"][rule] == 1.0)
        for rule, group in rules.items()
    ]


def explain(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """How good eyes and queries are, and how many of the failures each cause has; empty where no row tells.

    ``perception``: the share of `judgements` in which the Teacher's answer is not the truth; ``wrong_query``: in which
    the truth is not what the scorer says of the rule. ``judgements``: their number.
    """
    told = [row for row in rows if "truths" in row and "p_yes" in row]
    if not told:
        return {}
    said, true, scored = np.asarray([each for row in told for each in judgements(row)], bool).reshape(-1, 3).T
    causes = [cause(row) for row in told]
    return {
        "judgements": len(said),
        "perception": float(np.mean(said != true)),
        "wrong_query": float(np.mean(true != scored)),
        "failures": {name: causes.count(name) for name in CAUSES},
    }
