"""One page about several runs and sweeps: table, families, wins and losses, and every instance's videos in step."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vlmteacher.errors import InputError
from vlmteacher.evaluation.benchmark import key_of, mean
from vlmteacher.evaluation.methods import Row
from vlmteacher.evaluation.statistics import bootstrap, by_scene, compare
from vlmteacher.files import read_json
from vlmteacher.media import data_url, read_clip
from vlmteacher.runs.pages import page, video_url
from vlmteacher.runs.report import run_report
from vlmteacher.runs.verdict import Verdict

RESULTS_LIMIT = 2**30  # bytes of a results.json
DEPTH = 3  # of folders below a given one in which runs and sweeps are looked for
VIDEO_LIMIT, VIDEO_WIDTH = 150_000, 256  # characters and pixels of a video in the page
PAGE_LIMIT = 24_000_000  # characters of all videos; those of the least telling instances are left out
SHOWN = 5  # best and worst instances
OUTCOMES = {
    "gained": "solved by {ours} alone",
    "lost": "solved by {base} alone",
    "both": "solved by both",
    "neither": "solved by neither",
}


@dataclass
class Cell:
    """One method's video of an instance. success: None where only a score is known."""

    video: Path | None
    success: bool | None
    score: float
    url: str | None = None


@dataclass
class Entry:
    """One instance with a cell for each method. outcome: a key of `OUTCOMES`, or the verdict of a run."""

    name: str
    family: str
    prompt: str
    outcome: str
    gain: float
    cells: dict[str, Cell] = field(default_factory=dict)
    first: str | None = None  # data URL of the first frame


def report(paths: Sequence[Path]) -> str:
    """The page of folders of runs and sweeps, or of folders that hold such; a single run has the page of its own.

    Raises InputError for a folder without any, results that cannot be read, sweeps of several benchmarks, and results
    of one method on one instance that occur twice.
    """
    places = [place for path in paths for place in _find(path)]
    runs = [place for place in places if (place / "run.json").is_file()]
    records = {run: read_json(run / "run.json", "record") for run in runs}
    if len(places) == 1 and runs:
        return run_report(runs[0], records[runs[0]])
    sweeps = [place for place in places if place not in records]
    try:
        results, benchmark = _results(sweeps)
        methods = sorted(results, key=lambda name: (name != "base", name == "teacher"))
        entries = [*_runs(records), *_instances(results, methods)]
        frames, fps = _embed(entries)
        return page("gallery.html", **_summary(results, methods, benchmark), entries=entries, frames=frames, fps=fps)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"a result in {', '.join(map(str, paths))} is not of this version ({error!r:.80})") from error


def _find(path: Path, depth: int = DEPTH) -> list[Path]:
    """The folders of runs and sweeps in a folder, itself included. Raises InputError where there are none."""
    if not path.is_dir():
        raise InputError(f"{path} is no folder: give folders of runs (solve --out) and of sweeps (bench --out)")
    if (path / "run.json").is_file() or (path / "results.json").is_file():
        return [path]
    inner = sorted(each for each in path.iterdir() if each.is_dir()) if depth else []
    places = []
    for each in inner:
        try:
            places += _find(each, depth - 1)
        except InputError:
            continue
    if not places:
        raise InputError(f"{path} holds neither a run.json nor a results.json: an unfinished sweep goes on by --resume")
    return places


def _results(sweeps: Sequence[Path]) -> tuple[dict[str, list[Row]], str]:
    """The rows of every method, with the "folder" that their videos are in, and the benchmark's name."""
    results: dict[str, list[Row]] = {}
    benchmarks = set()
    for sweep in sweeps:
        content = read_json(sweep / "results.json", "results", RESULTS_LIMIT)
        benchmarks.add(content["benchmark"])
        rows = results.setdefault(content["method"], [])
        known = {key_of(row) for row in rows}
        if twice := next((row for row in content["instances"] if key_of(row) in known), None):
            raise InputError(
                f"{sweep}: a result of {content['method']} on {twice['id']} was given before: leave one out"
            )
        rows += [{**row, "folder": sweep} for row in content["instances"]]
    if len(benchmarks) > 1:
        raise InputError(f"sweeps of {' and '.join(sorted(benchmarks))}: give those of one benchmark at a time")
    return results, benchmarks.pop() if benchmarks else ""


def _runs(records: Mapping[Path, dict[str, Any]]) -> Iterator[Entry]:
    """An entry for each finished run: its videos before and after; the scores are mean P(Yes)."""
    for path, record in records.items():
        if "p_yes_after" not in record:
            continue
        verdict = Verdict.of(record)
        gain = 0.0 if verdict.mean_before is None else verdict.mean_after - verdict.mean_before
        entry = Entry(path.name, "runs", record["prompt"], verdict.outcome, gain)
        for name, score in (("before", verdict.mean_before), ("after", verdict.mean_after)):
            if score is not None:
                entry.cells[name] = Cell(path / f"{name}.mp4", None, score)
        yield entry


def _instances(results: Mapping[str, Sequence[Row]], methods: Sequence[str]) -> list[Entry]:
    """An entry for each instance of the sweeps; gains are scores of the last method minus those of the first."""
    entries: dict[tuple[str, int, int], Entry] = {}
    for method in methods:
        for row in results[method]:
            name = f"{row['split']}/{row['id']}" + (f", noise {row['noise']}" if row["noise"] else "")
            entry = entries.setdefault(key_of(row), Entry(name, row["task"], row.get("prompt", ""), "", 0.0))
            entry.cells[method] = Cell(_video(row), row["success"], float(row["score"]))
    for entry in entries.values():
        if methods[0] in entry.cells and methods[-1] in entry.cells:
            base, ours = entry.cells[methods[0]], entry.cells[methods[-1]]
            entry.gain = ours.score - base.score
            won = entry.gain > 0 if ours.success is None else ours.success
            kept = entry.gain < 0 if base.success is None else base.success
            entry.outcome = {(1, 0): "gained", (0, 1): "lost", (1, 1): "both"}.get((bool(won), bool(kept)), "neither")
    return list(entries.values())


def _video(row: Row) -> Path | None:
    """The file of a row's video, inside the folder of its sweep."""
    name = row.get("video") or (row["sample_videos"][row["picked"]] if "sample_videos" in row else None)
    path = None if name is None else (row["folder"] / name).resolve()
    return path if path is not None and path.is_relative_to(row["folder"].resolve()) and path.is_file() else None


def _embed(entries: Sequence[Entry]) -> tuple[int, float]:
    """Fill in the data URLs, those of the largest gains and losses first; return frames and fps of a video."""
    from imageio_ffmpeg import count_frames_and_secs

    room, clock = PAGE_LIMIT, (1, 8.0)
    for entry in sorted(entries, key=lambda entry: -abs(entry.gain)):
        for cell in entry.cells.values():
            if cell.video is None or room < VIDEO_LIMIT:
                continue
            cell.url = video_url(cell.video, VIDEO_LIMIT, VIDEO_WIDTH)
            room -= len(cell.url or "")
            if cell.url and clock[0] == 1:
                frames, seconds = count_frames_and_secs(str(cell.video))
                clock = (frames, frames / seconds)
            if cell.url and entry.first is None:
                entry.first = _first_frame(cell.video)
    return clock


def _first_frame(video: Path) -> str | None:
    try:
        image = Image.fromarray(read_clip(video, 1)[0])
    except InputError:
        return None
    image.thumbnail((VIDEO_WIDTH, VIDEO_WIDTH))
    image.save(file := io.BytesIO(), "WEBP", quality=90)
    return data_url("image/webp", file.getvalue())


def _summary(results: Mapping[str, Sequence[Row]], methods: Sequence[str], benchmark: str) -> dict[str, Any]:
    """What the page says about all instances of the sweeps together."""
    rated = bool(methods) and all(row["success"] is not None for row in results[methods[0]])
    value = "success" if rated else "score"
    tasks = dict.fromkeys(row["task"] for name in methods for row in results[name])
    return {
        "benchmark": benchmark,
        "methods": methods,
        "rated": rated,
        "outcomes": {key: text.format(base=methods[0], ours=methods[-1]) for key, text in OUTCOMES.items()}
        if methods
        else {},
        "table": [_line(name, results[name]) for name in methods],
        "families": {
            task: [mean([row for row in results[name] if row["task"] == task], value) for name in methods]
            for task in tasks
        },
        "matrix": [
            [
                compare(results[one], results[other]) if _common(results[one], results[other]) else None
                for other in methods
            ]
            for one in methods
        ],
        "shown": SHOWN,
    }


def _common(rows: Sequence[Row], others: Sequence[Row]) -> bool:
    return rows is not others and bool({key_of(row) for row in rows} & {key_of(row) for row in others})


def _line(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """A method's line of the table: means with their 95% intervals over scenes."""
    line: dict[str, Any] = {"name": name, "n": len(rows)}
    for value in ("success", "score"):
        scenes = list(by_scene(rows, value).values())
        line[value] = (mean(rows, value), *bootstrap(scenes)) if scenes else None
    for value in ("updates", "seconds", "generator_calls", "vlm_calls"):
        line[value] = mean(rows, value) if all(value in row for row in rows) else None
    return line
