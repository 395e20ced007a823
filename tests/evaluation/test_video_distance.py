"""The Frechet distance, exact on Gaussians, and what the packaged encoder makes of wrong videos."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmteacher.errors import InputError
from vlmteacher.evaluation.video_distance import ENCODER, VideoEncoder, features, frechet_distance, load_encoder
from vlmteacher.microworld import corruptions, world


def exact(mean: list[float], factor: list[list[float]]) -> torch.Tensor:
    """Samples (N, 2) whose sample mean and covariance are exactly `mean` and factor factor^T."""
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z -= z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T.cov())).T
    return z @ torch.tensor(factor, dtype=torch.float64).T + torch.tensor(mean, dtype=torch.float64)


def test_distance_of_gaussians_is_the_known_one():
    a, b = exact([0, 1], [[2, 0], [0, 1]]), exact([3, 1], [[1, 0], [0, 4]])
    assert frechet_distance(a, b) == pytest.approx(9 + (2 - 1) ** 2 + (1 - 4) ** 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    turned = exact([0, 1], [[1.2, -1.6], [0.8, 0.6]])  # not diagonal
    ca, ct = a.T.cov(), turned.T.cov()
    eigenvalues = torch.linalg.eigvals(ca @ ct).real.sqrt().sum()
    assert frechet_distance(a, turned) == pytest.approx(float(ca.trace() + ct.trace() - 2 * eigenvalues))
    with pytest.raises(InputError, match="two videos on each side, not 1 and 50"):
        frechet_distance(a[:1], b)


def videos(kind: str, seed: int, count: int = 50) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        scene = world.sample_scene(rng, str(rng.choice(("move", "maze"))))  # what the encoder was trained on
        track = world.perform(scene) if kind == "right" else corruptions.corrupt(kind, scene, rng)
        made.append(torch.from_numpy(world.draw(track)).permute(0, 3, 1, 2))
    return made


def test_wrong_or_soft_videos_are_further_from_right_ones_than_other_right_ones():
    encoder = load_encoder()
    real = features(encoder, videos("right", 0))
    same = frechet_distance(features(encoder, videos("right", 1)), real)
    for kind in ("half_finished", "vanish", "duplicate"):
        assert frechet_distance(features(encoder, videos(kind, 1)), real) > 1.5 * same, kind
    soft = [torch.nn.functional.avg_pool2d(v, 5, 1, 2, count_include_pad=False) for v in videos("right", 1)]
    assert frechet_distance(features(encoder, soft), real) > 1.5 * same


def test_packaged_encoder_is_small_and_bad_input_is_named(tmp_path):
    assert ENCODER.stat().st_size < 1e6
    with pytest.raises(InputError, match=r"takes videos of .* not \(5, 3, 64, 64\)"):
        VideoEncoder()(torch.zeros(1, 5, 3, 64, 64))
    with pytest.raises(InputError, match="were given"):
        features(load_encoder(), [])
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    for name in ("missing.safetensors", "broken.safetensors"):
        with pytest.raises(InputError, match=f"{name} cannot be used"):
            load_encoder(tmp_path / name)
