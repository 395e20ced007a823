"""What progress leaves, read back: the JSON lines of a command, the curves and settings in TensorBoard's files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def json_lines(out: str) -> list[dict[str, Any]]:
    """The objects of standard output. Raises ValueError where a line is none."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in out.splitlines()]


def without_loading(err: str) -> str:
    """Standard error without the lines of work of unknown length, which may stand before an error."""
    return re.sub(r"(?m)^(loading|writing|sampling) .*( \.\.\.|: [\d.]+ s)\n", "", err)


def check_events(out: str, command: str, work: str, steps: int, *names: str) -> list[dict[str, Any]]:
    """Check the lines of a command: `steps` steps of `work`, each with these names, the result last; return them."""
    lines = json_lines(out)
    assert lines[-1]["event"] == "result" and lines[-1]["command"] == command
    own = [line for line in lines[:-1] if line["work"] == work]
    assert [line["event"] for line in own] == ["begin", *["step"] * steps, "end"]
    for line in own:
        assert {"unit", "done", "total", "failed", "elapsed"} <= line.keys()
    assert own[0]["settings"]
    for step in own[1:-1]:
        assert {*names} <= step.keys(), step
    return lines


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every point, by the names of the curves."""
    (file,) = folder.glob("events.out.tfevents.*")
    read = EventAccumulator(str(file))
    read.Reload()
    return {name: [(point.step, point.value) for point in read.Scalars(name)] for name in read.Tags()["scalars"]}


def tracked_settings(folder: Path) -> dict[str, Any]:
    """The configuration that the tracker has."""
    (file,) = folder.glob("*/hparams.yml")
    settings: dict[str, Any] = yaml.safe_load(file.read_text())
    return settings
