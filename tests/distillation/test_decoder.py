"""`distill decoder` on a real tiny VAE: it learns, it is taken up again, it says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vlmteacher.cli import main
from vlmteacher.decoders import check_decoder, load_decoder
from vlmteacher.distillation.decoder import Autoencoder, decoder_for
from vlmteacher.errors import InputError
from vlmteacher.reasoners import load_reasoner
from vlmteacher.run_folder import write_video

VALUES = {
    "num_frames": 5, "height": 32, "width": 48, "widths": [8, 8, 8, 8], "steps": 4, "batch_size": 2,
    "learning_rate": 3e-3, "save_every": 2, "log_every": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """Four clips of a moving gradient, in another size and a little longer than what is trained on."""
    folder = tmp_path_factory.mktemp("videos")
    y, x = np.mgrid[:40, :64] / 64
    for k in range(4):
        frames = [np.stack([(x + 0.05 * t * k) % 1, (y + 0.03 * t) % 1, 0 * x + k / 4], -1) for t in range(7)]
        (folder / str(k)).mkdir()
        write_video(folder / str(k) / "clip.mp4", (255 * np.stack(frames)).astype(np.uint8), 8.0)
    return folder


@pytest.fixture
def config(teacher, videos, tmp_path) -> Callable[..., Path]:
    def config(name: str = "run", **changed: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        values = {"vae": str(teacher), "data": str(videos), "out": str(tmp_path / name), **VALUES}
        path.write_text(yaml.safe_dump(values | changed))
        return path

    return config


def distil(path: Path, *flags: object) -> int:
    return main(["distill", "decoder", "--config", str(path), *map(str, flags)])


def test_it_learns_and_fits_the_reasoner_of_the_vae(config, teacher, tmp_path):
    assert distil(config(steps=30, batch_size=1, log_every=10, validate_every=15, ema=0.5)) == 0
    rows = [json.loads(row) for row in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["psnr"] > rows[0]["psnr"] + 1 and rows[-1]["loss"] < rows[0]["loss"]
    curve = [json.loads(row) for row in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve] == [15, 30] and curve[1]["psnr"] > curve[0]["psnr"]
    reasoner = load_reasoner(teacher)
    decoder = load_decoder(tmp_path / "run" / "decoder.safetensors", reasoner)
    check_decoder(decoder, reasoner)
    assert decoder.decode(torch.randn(1, 8, 2, 4, 6), [0, 4]).shape == (2, 3, 32, 48)


def test_the_latents_are_the_reasoners(teacher):
    reasoner, vae = load_reasoner(teacher), Autoencoder(str(teacher / "vae"))
    video = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3)).astype(np.uint8)
    pixels = torch.from_numpy(video.astype(np.float32)).permute(3, 0, 1, 2)[None] / 127.5 - 1
    latents = vae.encode(pixels)
    torch.testing.assert_close(latents, reasoner.encode_video(video))
    frames = ((vae.decode(latents)[0] + 1) / 2).clamp(0, 1).transpose(0, 1)
    torch.testing.assert_close(frames, reasoner.decode(latents))


def test_taken_up_again_it_ends_the_same(config, tmp_path):
    assert distil(config("whole")) == 0
    assert distil(config("cut"), "--steps", 2) == 0
    assert distil(config("cut"), "--resume") == 0
    whole, cut = (load_file(tmp_path / name / "decoder.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        ((4, 3, 4, 6), {"patch": 1, "time_upscale": [False, True, True], "space_upscale": [True] * 3}),
        ((4, 3, 2, 3), {"patch": 2, "time_upscale": [False, True, True], "space_upscale": [True] * 3}),
        ((4, 2, 1, 1), {"patch": 4, "time_upscale": [True, True, True], "space_upscale": [True] * 3}),
        ((4, 9, 16, 24), {"patch": 1, "time_upscale": [False] * 3, "space_upscale": [True, False, False]}),
    ],
)
def test_the_layout_follows_from_the_sizes(size, layout):
    h, w = (32, 48) if size[2] > 1 else (32, 32)
    decoder = decoder_for(torch.zeros(1, *size), torch.zeros(1, 3, 9, h, w), [8, 8, 8, 8])
    assert {name: decoder.config[name] for name in layout} == layout
    assert decoder.decode_batch(torch.zeros(1, *size)).shape == (1, 9, 3, h, w)


def test_what_cannot_be_used_is_said(config, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for k in range(2):
        (tmp_path / "broken" / f"{k}.mp4").write_bytes(b"no video")
    for changed, message in [
        ({"data": str(tmp_path / "none")}, "does not exist"),
        ({"data": str(tmp_path / "empty")}, "holds no video"),
        ({"data": str(tmp_path / "broken")}, "cannot be read"),
        ({"vae": str(tmp_path / "empty")}, "holds no VAE of diffusers"),
        ({"num_frames": 9}, "is too short: 7 frames of 9"),
        ({"num_frames": 0}, "num_frames must be a whole number"),
        ({"widths": [8, 8]}, "widths must be four whole numbers"),
        ({"held_out": 4}, "4 of 4 videos cannot be held out"),
        ({"colour": "red"}, "unexpected keyword argument 'colour'"),
    ]:
        assert distil(config(**changed)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    with pytest.raises(InputError, match="no decoder of this kind takes 3x4x6 latents to 9x30x48 frames"):
        decoder_for(torch.zeros(1, 4, 3, 4, 6), torch.zeros(1, 3, 9, 30, 48), [8] * 4)
