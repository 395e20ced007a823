"""The table of the remedies has the distance of each method's videos from the right ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.test_results_tables import entry
from tools.remedies_table import table_of
from vlmteacher.errors import InputError
from vlmteacher.files import write_json
from vlmteacher.media import write_video
from vlmteacher.microworld import world

SCENES = 4


def method(folder: Path, name: str, still: bool) -> None:
    """The right videos of some scenes, or their first frames all along."""
    rows = []
    for index in range(SCENES):
        video = (world.render(world.instance(index, 3, "validation")[0]) * 255).round().astype(np.uint8)
        path = folder / name / "videos" / f"{index}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, video[:1].repeat(len(video), 0) if still else video, world.FPS)
        rows.append({"index": index, "split": "validation", "video": f"videos/{index}.mp4"})
    write_json(folder / name / "results.json", {"instances": rows})


def test_still_videos_are_further_from_the_right_ones(tmp_path: Path) -> None:
    method(tmp_path, "base", still=True)
    method(tmp_path, "teacher", still=False)
    methods = {"base": entry(0.25), "teacher": entry(1.0, ("base",))}
    write_json(tmp_path / "table.json", {"seed": 3, "methods": methods})
    head, _, base, teacher = (line.split(" | ") for line in table_of(tmp_path).splitlines())
    at = head.index("Frechet")
    assert base[0] == "| `base`" and teacher[1] == "1.00 [.00, 1.00]"
    assert float(base[at]) > 2 * float(teacher[at]) + 1

    rows = [{"index": 0, "split": "validation"}]
    write_json(tmp_path / "base" / "results.json", {"instances": rows})
    with pytest.raises(InputError, match="run the table with --keep-videos"):
        table_of(tmp_path)
