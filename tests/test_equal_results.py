from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.equal_results import digests


def leave(folder: Path, **changed: object) -> dict[str, str]:
    """The digests of a small run folder; a keyword changes one of its values."""
    values = {"loss": 0.25, "factor": 1.0, "seconds": 3.0, "video": b"mp4", **changed}
    (folder / "run").mkdir(parents=True)
    record = {"steps": [{"loss": values["loss"], "seconds": values["seconds"]}], "image": f"{folder}/first.png"}
    (folder / "run/run.json").write_text(json.dumps(record))
    (folder / "run/trace.jsonl").write_text(json.dumps({"loss": values["loss"]}) + "\n")
    save_file({"lora_A": np.full(2, values["factor"])}, folder / "run/lora.safetensors")
    (folder / "run/after.mp4").write_bytes(values["video"])
    (folder / "run/README.md").write_text(f"{values['seconds']} s")
    return digests(folder, folder)


@pytest.mark.parametrize(
    ("changed", "files"),
    [
        ({}, set()),
        ({"seconds": 9.0}, set()),
        ({"loss": 0.25000001}, {"run/run.json", "run/trace.jsonl"}),
        ({"factor": np.nextafter(1.0, 2.0)}, {"run/lora.safetensors"}),
        ({"video": b"mp5"}, {"run/after.mp4"}),
    ],
    ids=["equal", "seconds", "loss", "one bit of a weight", "video"],
)
def test_a_changed_value_shows_and_seconds_do_not(changed: dict[str, object], files: set[str], tmp_path: Path) -> None:
    old, new = leave(tmp_path / "old"), leave(tmp_path / "new", **changed)
    assert {file for file in old if old[file] != new[file]} == files


def test_a_missing_file_shows(tmp_path: Path) -> None:
    old = leave(tmp_path / "old")
    (tmp_path / "old/run/after.mp4").unlink()
    assert old.keys() - digests(tmp_path / "old", tmp_path / "old").keys() == {"run/after.mp4"}
