"""Causes of failed instances: the Teacher's perception, its queries, or an optimisation that stops too early.

Computed from the rows of results.json: the Teacher's answers about the final video (``p_yes``), the true answers from
the labeller (``truths``, see `microworld.questions.Truth`) and the scorer's sub-scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

YES = 0.5
CAUSES = ("perception", "query", "few_steps", "threshold", "updates")
"""Causes of a failed instance.

If the Teacher answers Yes to all queries about the final video, at least one of these answers is wrong
(``perception``), or all are right and no query asks about the fault (``query``). If it answers No to a query, it
answered Yes to all queries about the last one-step prediction (``few_steps``), or it answered No there too although the
loss was below the threshold (``threshold``), or the loss never fell below the threshold (``updates``).
"""


def cause(row: dict[str, Any]) -> str | None:
    """Return the entry of `CAUSES` for a row of results.json, None for a success."""
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
    """For each rule of the scorer with queries about it: the Teacher's answer, the true answer, the scorer's verdict.

    Several queries about one rule count as one, Yes if all are.
    """
    rules: dict[str, list[tuple[bool, bool]]] = {}
    for p, (rule, answer) in zip(row["p_yes"], row["truths"], strict=True):
        if rule in row["subscores"]:
            rules.setdefault(rule, []).append((p > YES, bool(answer)))
    return [
        (all(yes for yes, _ in group), all(truth for _, truth in group), row["subscores"][rule] == 1.0)
        for rule, group in rules.items()
    ]


def explain(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Error rates of the Teacher's answers and queries, and the number of failures per cause.

    Returns:
        ``judgements``: the number of `judgements`. ``perception``: the share in which the Teacher's answer is not the
        true one. ``wrong_query``: the share in which the true answer is not the scorer's verdict on the rule.
        ``failures``: the number of failed instances per entry of `CAUSES`. Empty if no row has answers and truths.
    """
    complete = [row for row in rows if row.get("truths") is not None and "p_yes" in row]
    if not complete:
        return {}
    triples = [triple for row in complete for triple in judgements(row)]
    teacher, true, scorer = np.asarray(triples, bool).reshape(-1, 3).T
    causes = [cause(row) for row in complete]
    return {
        "judgements": len(teacher),
        "perception": float(np.mean(teacher != true)),
        "wrong_query": float(np.mean(true != scorer)),
        "failures": {name: causes.count(name) for name in CAUSES},
    }
