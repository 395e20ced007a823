"""Encoded once, found again, and what a folder of instances can lack."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.distillation.conftest import write_clip, write_instance
from vlmteacher.distillation.dataset import LatentDataset
from vlmteacher.errors import InputError
from vlmteacher.media import read_clip
from vlmteacher.reasoners.loading import load_reasoner

SIZE = (5, 32, 48)


@pytest.fixture(scope="module")
def reasoner(teacher):
    return load_reasoner(teacher)


def test_a_batch_is_what_the_reasoner_encodes(reasoner, data, tmp_path):
    found = LatentDataset.prepare(data, tmp_path, reasoner, *SIZE)
    latents, condition = found.batch([2, 0])
    assert len(found) == 3 and condition.size == SIZE
    for row, k in enumerate((2, 0)):
        instance = data / "task" / f"{k:03d}"
        video = read_clip(instance / "ground_truth.mp4", 5)
        torch.testing.assert_close(latents[row : row + 1], reasoner.encode_video(video))
        embeds = reasoner.encode_prompt((instance / "prompt.txt").read_text())
        torch.testing.assert_close(condition.prompt_embeds[row : row + 1], embeds)
    assert condition.first_frame.shape == (2, *latents.shape[1:2], 1, *latents.shape[3:])


def test_what_is_encoded_is_kept_and_a_changed_instance_is_not(reasoner, data, tmp_path):
    own = shutil.copytree(data, tmp_path / "data")
    before = LatentDataset.prepare(own, tmp_path / "cache", reasoner, *SIZE)
    times = [file.stat().st_mtime_ns for file in before.files]
    (own / "task" / "001" / "prompt.txt").write_text("something else")
    after = LatentDataset.prepare(own, tmp_path / "cache", reasoner, *SIZE)
    assert [a == b for a, b in zip(before.files, after.files, strict=True)] == [True, False, True]
    assert [file.stat().st_mtime_ns for file in before.files] == times


def test_a_broken_cache_file_is_made_again(reasoner, data, tmp_path):
    file = LatentDataset.prepare(data, tmp_path, reasoner, *SIZE).files[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    assert LatentDataset.prepare(data, tmp_path, reasoner, *SIZE).files[1].read_bytes() == whole


def test_a_cache_file_of_another_program_is_made_again(reasoner, data, tmp_path):
    encoded = LatentDataset.prepare(data, tmp_path, reasoner, *SIZE)
    expected = encoded.files[0].read_bytes()
    save_file({"latents": torch.zeros(1)}, encoded.files[0])
    assert LatentDataset.prepare(data, tmp_path, reasoner, *SIZE).files[0].read_bytes() == expected


def test_held_out_instances_are_not_trained_on(reasoner, data, tmp_path):
    whole = LatentDataset.prepare(data, tmp_path, reasoner, *SIZE)
    rest, held_out = whole.split(1)
    assert len(rest) == 2 and len(held_out) == 1 and {*rest.files, *held_out.files} == {*whole.files}
    for count in (0, 3):
        with pytest.raises(InputError, match=f"{count} of 3 instances cannot be held out"):
            whole.split(count)


@pytest.mark.parametrize("name", ["first_frame.png", "prompt.txt", "ground_truth.mp4"])
def test_a_file_that_lacks_is_named(reasoner, data, tmp_path, name):
    own = shutil.copytree(data, tmp_path / "data")
    (own / "task" / "001" / name).unlink()
    with pytest.raises(InputError, match=rf"001 lacks {name}"):
        LatentDataset.prepare(own, tmp_path / "cache", reasoner, *SIZE)


@pytest.mark.parametrize(
    ("frames", "size", "message"),
    [
        (4, (32, 48), r"odd/ground_truth\.mp4 is too short: 4 frames of 5"),
        (5, (64, 96), r"mixed sizes: 48x32 in .*000, 96x64 in .*odd"),
        (5, (48, 32), r"video .*odd/ground_truth\.mp4 is 32x48 pixels, the video 48x32: crop it"),
        (5, (32, 96), r"video .*odd/ground_truth\.mp4 is 96x32 pixels, the video 48x32: crop it"),
    ],
)
def test_a_video_of_another_size_or_too_short_is_named(reasoner, data, tmp_path, frames, size, message):
    own = shutil.copytree(data, tmp_path / "data")
    write_instance(own / "task" / "odd", "move the box", frames=frames, size=size)
    with pytest.raises(InputError, match=message):
        LatentDataset.prepare(own, tmp_path / "cache", reasoner, *SIZE)


@pytest.mark.parametrize("name", ["first_frame.png", "ground_truth.mp4"])
def test_a_file_that_cannot_be_read_is_named(reasoner, data, tmp_path, name):
    own = shutil.copytree(data, tmp_path / "data")
    (own / "task" / "002" / name).write_bytes(b"nothing that one could see")
    with pytest.raises(InputError, match=r"002.* cannot be read"):
        LatentDataset.prepare(own, tmp_path / "cache", reasoner, *SIZE)


def test_a_folder_without_instances_is_named(reasoner, tmp_path):
    with pytest.raises(InputError, match="holds no instance"):
        LatentDataset.prepare(tmp_path, tmp_path / "cache", reasoner, *SIZE)
    with pytest.raises(InputError, match="nowhere does not exist"):
        LatentDataset.prepare(tmp_path / "nowhere", tmp_path / "cache", reasoner, *SIZE)


def encoded(reasoner, folder, cache, size=SIZE):
    return LatentDataset.prepare(folder, cache, reasoner, *size)[0]


@pytest.mark.parametrize("fps", [30, 60])
def test_a_faster_clip_is_read_at_the_models_rate(reasoner, tmp_path, fps):
    """Not taken for a slow one: its latents are those of the frames that stand at the model's times."""
    video = np.random.default_rng(0).integers(0, 255, (45, 4, 6, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    at = [round(k * fps / 8 + 1e-6) for k in range(5)]
    for name, frames, rate in (("fast", video, fps), ("slow", video[at], 8)):
        write_clip(tmp_path / name / "one", frames, rate)
    fast, slow = (encoded(reasoner, tmp_path / name, tmp_path / "cache")["latents"] for name in ("fast", "slow"))
    wrong = reasoner.encode_video(read_clip(tmp_path / "fast" / "one" / "ground_truth.mp4", 5))[0]
    assert (fast - slow).norm() < 0.1 * (wrong - slow).norm()


@pytest.mark.parametrize(
    ("fps", "what"), [(4, "has 4 fr.* fewer than the model's 8"), (16, "short: 3 frames of 5 at 8")]
)
def test_a_clip_that_is_too_slow_or_too_short_in_time_is_named(reasoner, tmp_path, fps, what):
    write_instance(tmp_path / "data" / "one", "move", fps=fps)
    with pytest.raises(InputError, match=rf"one/ground_truth.mp4 .*{what}") as error:
        encoded(reasoner, tmp_path / "data", tmp_path / "cache")
    assert "\n" not in str(error.value) and not list((tmp_path / "cache").iterdir())


def test_a_first_frame_of_another_video_is_named(reasoner, data, tmp_path):
    own = shutil.copytree(data, tmp_path / "data")
    Image.new("RGB", (48, 32), "red").save(own / "task" / "001" / "first_frame.png")
    with pytest.raises(InputError, match=r"001/first_frame.png is not the first frame of its video"):
        encoded(reasoner, own, tmp_path / "cache")


def test_a_prompt_that_is_no_text_is_named(reasoner, data, tmp_path):
    own = shutil.copytree(data, tmp_path / "data")
    for content, what in ((b"\xff", "is no UTF-8"), (b" \n", "prompt is empty"), (b"a\0", "a NUL")):
        (own / "task" / "002" / "prompt.txt").write_bytes(content)
        with pytest.raises(InputError, match=rf"002.*{what}"):
            encoded(reasoner, own, tmp_path / "cache")
