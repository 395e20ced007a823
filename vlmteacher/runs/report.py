"""report.html of a run folder: one page with the videos inside, which loads nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmteacher.errors import InputError
from vlmteacher.media import STRIP
from vlmteacher.optimization.guards import DRIFT, drifted
from vlmteacher.runs.charts import line_chart, sparkline
from vlmteacher.runs.pages import image_url, page, video_url
from vlmteacher.runs.verdict import Verdict

VIDEO_LIMIT = 2_200_000  # characters of a video; with its pictures a page stays below 5 MB

STOPPED = {
    "threshold": "the loss of the one-step prediction reached the threshold",
    "max_steps": "no step was left",
    "diverged": "the optimisation diverged; the best LoRA before is kept",
    "interrupted": "interrupted; --resume goes on",
}
PARTS = {"queries": "writing the queries", "before": "first video", "steps": "optimisation", "after": "final video"}
GUARDS = {
    "brightness": "brightness",
    "dark_fraction": "dark pixels",
    "edge_density": "edges",
    "colour_entropy": "colours (bits)",
    "temporal_jump": "largest jump between frames",
}


def run_report(folder: Path, record: dict[str, Any]) -> str:
    """The page of a run. A video or picture that is missing in `folder` is missing in the page alone.

    record: the content of run.json. Raises InputError where it is not that of a run.
    """
    try:
        return page("run.html", **_content(folder, record))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder / 'run.json'} is not the record of a run ({error!r:.80})") from error


def _content(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    config, queries, steps = record["config"], record["queries"], record["steps"]
    finished = "p_yes_after" in record
    verdict = Verdict.of(record) if finished else None
    questions = [queries["goal"], *queries["process"]]
    ends = record["p_yes_after"] if finished else []
    first = record.get("p_yes_before")  # None where no video from before was made
    rewards = record.get("rewards")
    return {
        "prompt": record["prompt"],
        "verdict": verdict,
        "stopped": STOPPED.get(record["stopped"], record["stopped"]),
        "updates": record["updates"],
        "config": config,
        "models": record["models"],
        "fps": record.get("fps", 0),
        "videos": {
            name: video_url(folder / f"{name}.mp4", VIDEO_LIMIT)
            for name in ("before", "after")
            if name == "after" or first or not finished
        },
        "questions": [
            {
                "kind": "process" if number else "goal",
                "text": question,
                "before": first[number] if first else None,
                "after": record["p_yes_after"][number] if finished else None,
            }
            for number, question in enumerate(questions)
        ],
        "rewards": [
            (name, weight, rewards["before"][name], rewards["after"][name])
            for name, weight in rewards["weights"].items()
        ]
        if rewards
        else [],
        "p_yes": line_chart(
            "P(Yes) of every question over the steps",
            {question: [row["p_yes"][number] for row in steps] for number, question in enumerate(questions)},
            high=1.0,
            ends=dict(zip(questions, ends, strict=False)),
        ),
        "loss": line_chart(
            "loss over the steps",
            {"loss": [row["loss"] for row in steps]},
            levels={f"threshold {config['threshold']:g}": config["threshold"]},
            ends={"loss": rewards["objective_after"] if rewards else record["loss_after"]} if finished else {},
        ),
        "strips": _strips(record),
        "columns": min(STRIP, config["teacher_frames"]),
        "sheet": image_url(folder / "frames.webp"),
        "guards": _guards(steps),
        "events": list(_events(steps)),
        "seconds": [(PARTS[name], record["seconds"][name]) for name in PARTS if name in record["seconds"]],
        "total": record["seconds"].get("total"),
        "memory": [(PARTS[name], size) for name, size in record.get("memory", {}).items() if name in PARTS],
        "command": record.get("command"),
        "settings": {"Models": record["models"], "Settings": config, "Texts cut": record.get("cut_tokens") or {}},
        "written_by": record.get("version"),
    }


def _strips(record: dict[str, Any]) -> list[str]:
    """The titles of the rows of frames.webp."""
    last = len(record["steps"]) - 1
    predictions = [
        f"one-step prediction, step {step}{', the last' if step == last else ''}"
        for step in record.get("predictions", ())
    ]
    first = [] if "p_yes_after" in record and not record["p_yes_before"] else ["first video, in few steps"]
    return [*first, *predictions, "final video, in few steps"]


def _guards(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The guards over the steps, each with a warning where it has drifted since the first step."""
    if not steps:
        return []
    first, last = steps[0]["guards"], steps[-1]["guards"]
    warned = drifted(first, last)
    return [
        {
            "title": GUARDS[name],
            "points": sparkline([row["guards"][name] for row in steps]),
            "first": first[name],
            "last": last[name],
            "most": DRIFT[name],
            "tripped": name in warned,
        }
        for name in DRIFT
    ]


def _events(steps: list[dict[str, Any]]) -> Iterator[str]:
    """What happened at single steps: roll-backs, and what was done against a lack of memory."""
    for row in steps:
        if "rolled_back" in row:
            rate = f", learning rate {row['learning_rate']:g}" if "learning_rate" in row else ""
            yield f"Step {row['step']}: back to the best LoRA so far ({row['rolled_back']}){rate}"
        if taken := row.get("out_of_memory"):
            yield f"Step {row['step']}: memory ran out, so it went on with {', '.join(taken)}"
