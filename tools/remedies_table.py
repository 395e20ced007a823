"""Print the table of the remedies with the quality of their videos: ``python -m tools.remedies_table DIR``.

    vlmteacher bench microworld --table remedies --limit 40 --seeds 1 --workers 2 --keep-videos --out runs/remedies
    python -m tools.remedies_table runs/remedies

Beside what table.json has, it compares each method's final videos with the right ones of the same scenes, by
`vlmteacher.evaluation.video_distance`. Few videos bias that distance upwards, in all rows alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.results_tables import CAUSES, lines, rate
from vlmteacher.errors import InputError
from vlmteacher.evaluation.video_distance import video_distance
from vlmteacher.files import read_json
from vlmteacher.media import read_clip
from vlmteacher.microworld import world


def made(folder: Path, rows: list[dict[str, Any]]) -> Iterator[Tensor]:
    """The kept videos (F, 3, H, W) in [0, 1] of a method's rows. Raises InputError where they were not kept."""
    for row in rows:
        if "video" not in row:
            raise InputError(f"{folder} has no videos: run the table with --keep-videos")
        yield torch.from_numpy(read_clip(folder / row["video"], world.NUM_FRAMES)).permute(0, 3, 1, 2) / 255


def right(rows: list[dict[str, Any]], seed: int) -> Iterator[Tensor]:
    """The right videos (F, 3, H, W) in [0, 1] of the scenes of rows."""
    for row in rows:
        scene, _ = world.instance(row["index"], seed, row["split"])
        yield torch.from_numpy(world.render(scene)).permute(0, 3, 1, 2)


def row_of(method: str, entry: Mapping[str, Any], distance: float) -> tuple[str, ...]:
    low, high = rate(entry["low"]), rate(entry["high"])
    against = entry["against"].get("teacher")
    return (
        f"`{method}`",
        f"{rate(entry['success_rate'])} [{low}, {high}]",
        f"{entry['score']:.3f}",
        f"{against['wins']}, {against['losses']}" if against else "",
        f"{entry['updates_mean']:.1f}",
        f"{distance:.1f}",
        ", ".join(str(entry["failures"][cause]) for cause in CAUSES) if method != "base" else "",
    )


def table_of(folder: Path) -> str:
    """The table of a `bench --table` with kept videos, in Markdown. Raises InputError."""
    table = read_json(folder / "table.json", "table")
    rows = []
    for method, entry in table["methods"].items():
        instances = read_json(folder / method / "results.json", "results")["instances"]
        distance = video_distance(made(folder / method, instances), right(instances, table["seed"]))
        rows.append(row_of(method, entry, distance))
    causes = ", ".join(CAUSES)
    return lines(
        ("method", "success [95%]", "score", "wins, losses against `teacher`", "updates", "Frechet", causes), rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    print(table_of(parser.parse_args().folder), end="")


if __name__ == "__main__":
    main()
