"""The oracle's optimisation leads to the right video, and an interrupted run goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tools.oracle import run, table
from vlmteacher.pipeline import TeacherPipeline


def test_failing_scenes_are_led_to_the_right_video(tmp_path: Path) -> None:
    pipe = TeacherPipeline.from_pretrained()
    settings, out = replace(pipe.defaults, max_steps=4), tmp_path / "oracle.jsonl"
    rows = run(pipe, settings, ["resize", "recolor"], 1, out)
    failing = [row for row in rows if not row["before"]]
    assert sorted(row["family"] for row in failing) == ["recolor", "resize"]
    assert all(row["distances"][1] < row["distances"][0] for row in failing)
    assert all(row["after"] == (not row["broken"]) for row in failing)

    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:-1]))
    assert run(pipe, settings, ["resize", "recolor"], 1, out) == rows and out.read_text() == "".join(lines)
    text = table(rows)
    assert (
        "| `recolor` | " in text and "| `move` |" not in text and not hasattr(pipe.reasoner.transformer, "peft_config")
    )
