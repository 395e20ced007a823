"""Exported files: right videos pass after compression, metadata marks the flaw, nothing is overwritten."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vlmteacher.cli import main
from vlmteacher.distillation.dataset import find_instances
from vlmteacher.media import read_clip
from vlmteacher.microworld import scorer, world
from vlmteacher.microworld.world import Scene


def export(out, *flags: object) -> int:
    return main(["microworld", "export", "--out", str(out), *map(str, flags)])


def read(out):
    """Yield metadata, scene and the verdict on the video of every instance."""
    for instance in find_instances(out):
        metadata = json.loads((instance / "metadata.json").read_text())
        scene = Scene.from_json(metadata["scene"])
        frames = read_clip(instance / "ground_truth.mp4", world.NUM_FRAMES).astype(np.float32) / 255
        yield metadata, scene, scorer.score(frames, scene)


def test_right_videos_succeed_after_compression(tmp_path):
    assert export(tmp_path, "--count", 10, "--seed", 2, "--split", "ood", "--family", "all") == 0
    instances = list(read(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}_task" for name in world.FAMILIES}
    assert all(verdict.success and metadata["right"] for metadata, _, verdict in instances)
    assert {world.split_of(scene) for _, scene, _ in instances} == {"ood"}


@pytest.mark.parametrize("flags", [[], ["single"], ["both"]])
def test_the_flaw_is_in_metadata_and_video(tmp_path, flags):
    assert export(tmp_path, "--count", 20, "--family", "all", "--flawed", *flags) == 0
    (scheme,), instances = flags or ["both"], list(read(tmp_path))
    assert {world.split_of(scene) for _, scene, _ in instances} == {"train"}
    for metadata, scene, verdict in instances:
        assert metadata["flaws"] == scheme and metadata["flaw"] == world.flaw(scene, scheme)
        assert verdict.success == metadata["right"] == (metadata["flaw"] is None)
        assert verdict.subscores["goal"] == 1 or metadata["flaw"] == "mistaken"
    kinds = {metadata["flaw"] for metadata, _, _ in instances}
    assert kinds == {None, "mistaken", "forbidden"}


def test_one_family_by_itself(tmp_path):
    assert export(tmp_path, "--count", 2, "--family", "sort") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["sort_task"]


def test_an_export_continues_and_overwrites_nothing(tmp_path, capfd):
    assert export(tmp_path, "--count", 2) == 0
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
    assert export(tmp_path, "--count", 3) == 0
    assert all(path.stat().st_mtime_ns == at for path, at in times.items())
    assert len(find_instances(tmp_path)) == 3
    assert export(tmp_path, "--count", 3, "--seed", 1) == 2
    assert "holds another instance" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--count", 0), "--limit must be at least 1"),
        (("--split", "exam"), "unknown split 'exam'"),
        (("--family", "chess"), "unknown family 'chess'"),
        (("--flawed", "most"), "unknown scheme of flaws 'most': choose from single, both"),
    ],
)
def test_bad_flags_exit_with_2(tmp_path, capfd, flags, message):
    assert export(tmp_path / "out", *flags) == 2
    assert message in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert export(tmp_path / "file", "--count", 1) == 2
    assert "cannot be written to" in capfd.readouterr().err


def test_an_index_is_the_same_instance_for_the_benchmark(tmp_path):
    assert export(tmp_path, "--count", 1, "--seed", 1, "--split", "id") == 0
    scene, prompt = world.instance(0, seed=1)
    (instance,) = find_instances(tmp_path)
    assert (instance / "prompt.txt").read_text().strip() == prompt
    assert json.loads((instance / "metadata.json").read_text())["scene"] == json.loads(json.dumps(scene.to_json()))
