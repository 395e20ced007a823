"""The verdict on a run: whether its final video solves the task, by the Teacher's answers about that video."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vlmteacher.microworld.known_tasks import unknown_task

YES = 0.5  # P(Yes) above which an answer is Yes
FALL = 0.1  # of P(Yes), from which on a question has got worse
CHANGE = 0.05  # of the mean P(Yes), from which on the video has changed


Outcome = Literal["solved", "improved", "unchanged", "worse", "unsolved"]


@dataclass(frozen=True)
class Verdict:
    """The Teacher's opinion of the final video, compared with the video before the first update.

    It is no independent measure, and it is not the one-step prediction's loss, at which the optimisation stops.

    Attributes:
        outcome: "solved": the loss of the final video is not above the threshold, and every answer is Yes.
            "worse": the mean P(Yes) fell by more than `CHANGE`, or an answer went to No and the goal's is No.
            "improved": the mean P(Yes) rose by more than `CHANGE`, or more answers went to Yes than to No.
            "unchanged": none of these.
            "unsolved": not solved, where no video from before was made.
        mean_before, mean_after: exp(-loss), the weighted geometric mean of P(Yes); mean_before is None without a video
            from before.
        worse: the questions whose P(Yes) has fallen by more than `FALL`, with P(Yes) "before" and "after".
        remedies: what to try, as flags of the command line; empty for a solved task.
    """

    outcome: Outcome
    mean_before: float | None
    mean_after: float
    worse: list[dict[str, Any]]
    remedies: list[str]

    @classmethod
    def of(cls, record: dict[str, Any]) -> Verdict:
        """The verdict on a finished run. record: the content of run.json."""
        queries = record["queries"]
        before, after = record["p_yes_before"], record["p_yes_after"]
        solved = record["loss_after"] <= record["config"]["threshold"] and min(after) > YES
        if before is None:
            outcome: Outcome = "solved" if solved else "unsolved"
            return cls(outcome, None, math.exp(-record["loss_after"]), [], _remedies(record, solved))
        rows = list(zip([queries["goal"], *queries["process"]], before, after, strict=True))
        lost = sum(a > YES >= b and a - b > FALL for _, a, b in rows)
        gained = sum(b > YES >= a for _, a, b in rows)
        means = math.exp(-record["loss_before"]), math.exp(-record["loss_after"])
        rise = means[1] - means[0]
        outcome = "unchanged"
        if solved:
            outcome = "solved"
        elif rise < -CHANGE or (lost and after[0] <= YES):
            outcome = "worse"
        elif rise > CHANGE or gained > lost:
            outcome = "improved"
        worse = [{"question": question, "before": a, "after": b} for question, a, b in rows if a - b > FALL]
        return cls(outcome, *means, worse, _remedies(record, outcome == "solved"))

    def to_dict(self) -> dict[str, Any]:
        """The entry `verdict` of run.json."""
        return asdict(self)

    def __str__(self) -> str:
        """The verdict in lines, as `solve` prints it."""
        rise = "" if self.mean_before is None else f"{self.mean_before:.2f} -> "
        lines = [f"Verdict on the final video: {self.outcome} (mean P(Yes) {rise}{self.mean_after:.2f})"]
        lines += [f"  worse: {row['before']:.2f} -> {row['after']:.2f}  {row['question']}" for row in self.worse]
        return "\n".join([*lines, *(f"  try: {remedy}" for remedy in self.remedies)])


def _remedies(record: dict[str, Any], solved: bool) -> list[str]:
    config, sampling = record["config"], record["config"].get("sampling") or {}
    remedies = []
    packaged = record["models"].get("reasoner", "").startswith("packaged/")
    if packaged and (note := unknown_task(record["prompt"])):
        remedies.append(note)
    if solved:
        return remedies
    if record["stopped"] == "diverged":
        remedies.append(f"a lower --lr than {config['learning_rate']:g}, because the optimisation diverged")
    if record["stopped"] == "max_steps":
        remedies.append(
            f"more steps than {config['max_steps']}: the same command with --resume and a higher --max-steps"
        )
    if record["stopped"] == "threshold" and not config["check_final"]:
        remedies.append("--check-final: go on until the final video is good, not the one-step prediction alone")
    later_noise = sampling.get("sampler") == "renoise" and len(sampling.get("timesteps", ())) > 1
    if later_noise and config["final_samples"] == 1:
        remedies.append("--final-samples 5: the Teacher picks the best of five final videos")
    remedies.append(f"another --seed than {config['seed']}")
    return remedies
