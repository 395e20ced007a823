"""The parts of the page that are no controls, as HTML in which all text is escaped."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from vlmteacher.app.examples import Example
from vlmteacher.app.folders import Entry
from vlmteacher.app.jobs import Job, Run
from vlmteacher.media import data_url
from vlmteacher.runs.charts import line_chart
from vlmteacher.runs.pages import environment
from vlmteacher.runs.report import STOPPED
from vlmteacher.runs.verdict import Verdict

IN_THE_PAGE = {
    "the same command with --resume and a higher --max-steps": "set “Steps at most” and press Go on",
    "--check-final": "“Stop only when the final video is good too” in the settings",
    "--final-samples 5": "5 “Final videos to choose from” in the settings",
    "a lower --lr": "a lower learning rate",
    "another --seed": "another seed",
}
"""What the flags in the remedies of a verdict are called here."""

STRIP_HEIGHT = 160  # pixels of the frames of a prediction at most


def render(template: str, **values: Any) -> str:
    """A template of this package with these values."""
    return environment("vlmteacher.app").get_template(template).render(**values)


def style() -> str:
    """The style sheet of the page."""
    return (Path(__file__).parent / "templates/app.css").read_text(encoding="utf-8")


def alert(message: str) -> str:
    """A refusal, in one line; nothing for an empty one."""
    return render("alert.html", message=" ".join(message.split()))


def picture_url(image: Image.Image, kind: str = "PNG") -> str:
    """A picture as a data URL."""
    image.save(file := io.BytesIO(), kind)
    return data_url(f"image/{kind.lower()}", file.getvalue())


def examples(tasks: Sequence[Example], chosen: int | None = None) -> str:
    """The packaged tasks as buttons with their first frames."""
    rows = [(task.family, task.prompt, picture_url(task.image)) for task in tasks]
    return render("examples.html", rows=rows, chosen=chosen)


def first_frame(image: Image.Image | None, size: tuple[int, int] | None = None) -> str:
    """The first frame of the task. size: width and height of the upload, where it was another."""
    if image is None:
        return ""
    made = None if size == image.size else size
    return render("first_frame.html", url=picture_url(image), width=image.width, height=image.height, size=made)


def run_list(jobs: Sequence[Run], entries: Sequence[Entry], chosen: str | None, names: Mapping[int, str]) -> str:
    """The runs at work and in line, then those in the folder. names: of the jobs' folders, by id."""
    active = [{"name": names[id(job)], "prompt": job.title, "state": job.state, "rows": len(job.rows)} for job in jobs]
    working = {each["name"] for each in active}
    ended = [entry for entry in entries if entry.name not in working]
    return render("runs.html", active=active, ended=ended, chosen=chosen)


def line(job: Job, ahead: int) -> str:
    """Which place a waiting job has."""
    return render("line.html", job=job, ahead=ahead)


def live(job: Run, ahead: int, config: Mapping[str, Any]) -> str:
    """A run that waits or is at work. config: its settings by name."""
    questions = list(job.queries.questions) if job.queries else []
    seconds = [row["seconds"] for row in job.rows if "seconds" in row][-10:]
    each = sum(seconds) / len(seconds) if seconds else None
    values = _steps(job.title, questions, job.rows, config)
    strip = None if job.strip is None else strip_url(job.strip)
    return render("live.html", job=job, ahead=ahead, strip=strip, each=each, **values)


def ended(name: str, record: Mapping[str, Any], files: Sequence[str], message: str = "") -> str:
    """A run that is not at work. record: the content of its run.json; files: those that can be downloaded."""
    questions = [record["queries"]["goal"], *record["queries"]["process"]]
    done = "p_yes_after" in record
    verdict = Verdict.of(dict(record)) if done else None
    values = _steps(record["prompt"], questions, record["steps"], record["config"], record if done else None)
    address = partial(_address, name)
    return render(
        "ended.html",
        verdict=verdict,
        remedies=[in_the_page(remedy) for remedy in verdict.remedies] if verdict else [],
        stopped=STOPPED.get(record["stopped"], record["stopped"]),
        seconds=record["seconds"].get("total"),
        updates=record["updates"],
        files={file: address(file) for file in files},
        name=name,
        message=message,
        small=record["config"].get("width", 0) <= 160,
        **values,
    )


def in_the_page(remedy: str) -> str:
    """A remedy in the words of the page."""
    for flag, words in IN_THE_PAGE.items():
        remedy = remedy.replace(flag, words)
    return remedy


def _address(name: str, file: str) -> str:
    """The address of a run's file."""
    return f"runs/{quote(name)}/{file}"


def _steps(
    prompt: str,
    questions: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    results: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What running and ended runs show alike: the questions with P(Yes), and the curves."""
    before = results["p_yes_before"] if results else rows[0]["p_yes"] if rows else None
    after = results["p_yes_after"] if results else rows[-1]["p_yes"] if rows else None
    weights = shares(len(questions), config["goal_weight"])
    ends = dict(zip(questions, after, strict=False)) if results and after else {}
    objective = (results.get("rewards") or {}).get("objective_after", results["loss_after"]) if results else None
    return {
        "prompt": prompt,
        "config": config,
        "steps": len(rows),
        "questions": [
            {
                "kind": "process" if number else "goal",
                "text": question,
                "weight": weights[number],
                "before": before[number] if before else None,
                "after": after[number] if after else None,
            }
            for number, question in enumerate(questions)
        ],
        "p_yes": line_chart(
            "P(Yes) of every question over the steps",
            {question: [row["p_yes"][number] for row in rows] for number, question in enumerate(questions)},
            high=1.0,
            ends=ends,
        ),
        "loss": line_chart(
            "loss over the steps",
            {"loss": [row["loss"] for row in rows]},
            levels={f"threshold {config['threshold']:g}": config["threshold"]},
            ends={"loss": objective} if objective is not None else {},
        ),
    }


def shares(questions: int, goal_weight: float) -> list[float]:
    """The weight of every question in the loss: the goal's, and the rest in equal parts."""
    if questions <= 1:
        return [1.0] * questions
    return [goal_weight, *[(1 - goal_weight) / (questions - 1)] * (questions - 1)]


def strip_url(strip: np.ndarray) -> str:
    """Frames side by side (h, w, 3) uint8 as a data URL."""
    image = Image.fromarray(strip)
    if image.height > STRIP_HEIGHT:
        image = image.resize((round(image.width * STRIP_HEIGHT / image.height), STRIP_HEIGHT))
    return picture_url(image, "WEBP")
