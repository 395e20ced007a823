"""A benchmark that is scored from files: videos first, verdicts after them, each resumed apart from the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Run
from tests.evaluation.test_sweep import without_seconds
from tests.evaluation.test_tables import pair, written  # noqa: F401 (fixtures)
from vlmteacher.errors import InputError, TaskFailed
from vlmteacher.evaluation import sweep
from vlmteacher.evaluation.benchmark import FileBenchmark, Instance, Score
from vlmteacher.evaluation.sweep import run_method
from vlmteacher.media import read_clip
from vlmteacher.microworld import world


@dataclass(frozen=True, kw_only=True)
class Bench(FileBenchmark):
    """The score is the brightness of a video; `judged` has the files that were judged."""

    name: ClassVar[str] = "bright"
    splits: ClassVar[tuple[str, ...]] = ("all",)
    frames: ClassVar[int] = 5
    version: int = 1
    refuse: tuple[int, ...] = ()
    judged: ClassVar[list[str]] = []

    def instances(self, splits: Sequence[str], limit: int, noises: int) -> list[Instance]:
        return [Instance(f"grey/{i}", "all", i, k, "grey") for k in range(noises) for i in range(limit)]

    def load(self, instance: Instance) -> tuple[str, Image.Image]:
        return "Stay grey.", Image.new("RGB", (world.SIZE, world.SIZE), (50 * (instance.index + 1),) * 3)

    def final_frame(self, instance: Instance) -> Image.Image:
        return Image.new("RGB", (world.SIZE, world.SIZE), "white")

    def described(self) -> dict[str, Any]:
        return {name: value for name, value in super().described().items() if name not in ("version", "refuse")}

    def scorer(self) -> dict[str, Any]:
        return {"version": self.version}

    def score_files(self, videos: Mapping[Instance, Path]) -> Iterator[tuple[Instance, Score]]:
        for one, path in videos.items():
            self.judged.append(path.name)
            if one.index in self.refuse:
                yield one, Score(None, None, error="the judge is away")
            else:
                yield one, Score(None, float(read_clip(path, 1).mean() / 255))


@pytest.fixture(autouse=True)
def judged() -> list[str]:
    Bench.judged.clear()
    return Bench.judged


def static(out: Path, bench: Bench, limit: int = 3, **options: Any) -> dict[str, Any]:
    return run_method("static", bench, ["all"], limit, 1, out, **options)


def test_the_controls_load_no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "load_models", lambda *_: pytest.fail("a control needs no models"))
    results = static(tmp_path / "static", Bench())
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.mp4"))
    assert files == [f"static/videos/static/all/grey/0000{i}.mp4" for i in range(3)]
    for row in results["instances"]:
        frames = read_clip(tmp_path / "static" / row["video"], 5)
        grey = 50 * (row["index"] + 1)
        assert abs(frames.astype(int) - grey).max() <= 2 and row["score"] == pytest.approx(grey / 255, abs=0.01)
        assert (row["updates"], row["generator_calls"], row["vlm_calls"]) == (0, 0, 0)
    last = run_method("final-frame", Bench(), ["all"], 1, 1, tmp_path / "last")
    assert last["score"] == pytest.approx(1, abs=0.01) and last["method"] == "final-frame"


def test_judging_is_resumed_apart_from_generating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judged: list[str]
) -> None:
    out, made, work = tmp_path / "out", [], sweep._work
    monkeypatch.setattr(sweep, "_work", lambda bench, job: made.append(job.instance.index) or work(bench, job))
    with pytest.raises(TaskFailed, match="all 1 first \\(the judge is away\\)"):
        static(out, Bench(refuse=(1,)))
    assert made == [0, 1, 2] and judged == ["00000.mp4", "00001.mp4", "00002.mp4"]
    assert json.loads((out / "results.json").read_text())["n"] == 2  # and no 0 for the one that nobody judged
    assert "the judge is away" in (out / "poison.jsonl").read_text()
    judged.clear()
    with (out / "scores.jsonl").open("a") as log:
        log.write('{"cut')
    whole = static(out, Bench(), resume=True)
    assert made == [0, 1, 2] and judged == ["00001.mp4"] and whole["n"] == 3
    assert whole["scorer"] == {"version": 1} and not (out / "poison.jsonl").exists()

    judged.clear()
    with pytest.raises(InputError, match="another version of the scorer: --rescore"):
        static(out, Bench(version=2), resume=True)
    again = static(out, Bench(version=2), rescore=True)
    assert made == [0, 1, 2] and len(judged) == 3 and again == whole | {"scorer": {"version": 2}}
    with pytest.raises(InputError, match="holds other results"):
        static(out, replace(Bench(version=2), seed=5), rescore=True)

    (out / "videos/static/all/grey/00002.mp4").unlink()
    judged.clear()
    with pytest.raises(TaskFailed, match=r"00002.mp4 is gone: --resume makes it again"):
        static(out, Bench(version=2), rescore=True)
    assert without_seconds(static(out, Bench(version=2), resume=True)) == without_seconds(again)
    assert made == [0, 1, 2, 2] and judged == ["00000.mp4", "00001.mp4", "00002.mp4"]


def test_an_interruption_of_judging_keeps_the_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judged: list[str]
) -> None:
    out, score_files = tmp_path / "out", Bench.score_files

    def interrupted(bench: Bench, videos: Mapping[Instance, Path]) -> Iterator[tuple[Instance, Score]]:
        scores = score_files(bench, videos)
        yield next(scores)
        yield next(scores)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "score_files", interrupted)
        with pytest.raises(KeyboardInterrupt):
            static(out, Bench())
    assert not (out / "results.json").exists() and (out / "scores.jsonl").read_text().count("\n") == 2
    with monkeypatch.context() as patch:  # an interrupted --rescore does not go on from verdicts of the other scorer
        patch.setattr(Bench, "score_files", interrupted)
        with pytest.raises(KeyboardInterrupt):
            static(out, Bench(version=2), rescore=True)
    judged.clear()
    with pytest.raises(InputError, match="another version of the scorer"):
        static(out, Bench(), resume=True)
    assert static(out, Bench(version=2), resume=True)["n"] == 3 and judged == ["00002.mp4"]


def test_samples_have_the_pick_of_the_teacher_and_of_the_scorer(
    pair: Path,  # noqa: F811
    tmp_path: Path,
    judged: list[str],
) -> None:
    bench = Bench(pair=str(pair))
    results = run_method("pass@2", bench, ["all"], 1, 2, tmp_path)
    assert len(judged) == 4  # each sample of each noise once
    folders = {path.relative_to(tmp_path / "videos").parts[0] for path in tmp_path.rglob("*.mp4")}
    names = {"pass@2", "pass@2.noise-1"}
    assert folders == names | {f"{name}.sample-{k}" for name in names for k in range(2)}
    for row in results["instances"]:
        assert row["score"] == row["sample_scores"][row["picked"]]
        assert row["oracle_score"] == max(row["sample_scores"])
        picked, kept = (
            read_clip(tmp_path / name, world.NUM_FRAMES) for name in (row["sample_videos"][row["picked"]], row["video"])
        )
        assert np.array_equal(picked, kept)
    assert (tmp_path / "instances.jsonl").read_text().count('"score"') == 0


def test_every_result_of_one_run_has_its_video(pair: Path, tmp_path: Path, judged: list[str]) -> None:  # noqa: F811
    from vlmteacher.evaluation.folder import Folder
    from vlmteacher.evaluation.methods import steps
    from vlmteacher.evaluation.sweep import start_workers

    bench, method = Bench(pair=str(pair)), steps(1, 2)
    with Folder(tmp_path, bench, method, ["all"], False) as folder, start_workers(1, bench) as work:
        rows = folder.complete(bench.instances(["all"], 1, 1), work, {})
    assert [row["video"] for (row,) in rows.values()] == [f"videos/steps@{n}/all/grey/00000.mp4" for n in (1, 2)]
    one, two = (tmp_path / row["video"] for (row,) in rows.values())
    assert len(judged) == 2 and one.read_bytes() != two.read_bytes()


def test_the_microworld_keeps_videos_where_it_is_told(run: Run, tmp_path: Path) -> None:
    plain, kept = tmp_path / "plain", tmp_path / "kept"
    command = ["bench", "microworld", "--method", "static", "--limit", 2]
    assert run(*command, "--out", plain)[0] == 0 and run(*command, "--keep-videos", "--out", kept)[0] == 0
    rows, with_videos = (json.loads((out / "results.json").read_text())["instances"] for out in (plain, kept))
    for row, with_video in zip(rows, with_videos, strict=True):
        assert read_clip(kept / with_video.pop("video"), world.NUM_FRAMES).shape[1:3] == (world.SIZE, world.SIZE)
        assert row | {"seconds": 0} == with_video | {"seconds": 0} and not row["success"]
    assert not (plain / "videos").exists()
    status, _, err = run(*command, "--rescore", "--out", kept)
    assert status == 2 and "there are none for its scorer" in err


def test_a_trace_needs_a_scorer_in_the_process(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bright scores finished files only"):
        static(tmp_path, Bench(trace=True))
    assert list(tmp_path.iterdir()) == []
