"""A Frechet distance between two sets of microworld videos, over the features of a small encoder of our own.

The formula is that of FID and FVD; the features are not: the encoder (`VideoEncoder`, 0.3 M parameters) is trained on
rendered microworld videos only (``recipes/microworld/encoder.py``). The distance compares Reasoners on the microworld
with each other; it is not comparable with FVD.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from vlmteacher.errors import InputError
from vlmteacher.microworld import world

ENCODER = Path(__file__).parent.parent / "microworld" / "models" / "encoder" / "encoder.safetensors"
FEATURES = 64
SHAPE = (world.NUM_FRAMES, 3, world.SIZE, world.SIZE)


class VideoEncoder(nn.Module):
    """Map a microworld video to `FEATURES` numbers, each of mean 0 and variance 1 over the training videos."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, kernel in ((3, 16, 5), (16, 32, 3), (32, 48, 3), (48, 64, 3)):
            layers += [nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2), nn.GELU()]
        side = world.SIZE // 16
        self.frames = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * side**2, 128), nn.GELU())
        self.time = nn.Sequential(
            nn.Conv1d(128, 96, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv1d(96, 96, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(96 * ((world.NUM_FRAMES + 3) // 4), FEATURES),
        )
        self.standard = nn.BatchNorm1d(FEATURES, affine=False)

    def forward(self, videos: Tensor) -> Tensor:
        """Encode videos (B, F, 3, H, W) in [0, 1] to (B, `FEATURES`). Raises InputError for a size not the world's."""
        if videos.ndim != 5 or videos.shape[1:] != SHAPE:
            raise InputError(f"the video encoder takes videos of (F, 3, H, W) = {SHAPE}, not {tuple(videos.shape[1:])}")
        frames = self.frames(videos.flatten(0, 1) * 2 - 1).unflatten(0, videos.shape[:2])
        return self.standard(self.time(frames.transpose(1, 2)))


def load_encoder(path: str | os.PathLike[str] = ENCODER) -> VideoEncoder:
    """Load a trained encoder, by default the packaged one, frozen. Raises InputError when it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    encoder = VideoEncoder()
    try:
        encoder.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"video encoder {os.fspath(path)} cannot be used ({reason})") from error
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def features(encoder: VideoEncoder, videos: Iterable[Tensor]) -> Tensor:
    """Return features (N, `FEATURES`) float64 of N videos (F, 3, H, W) in [0, 1]. Raises InputError without videos."""
    rows = [encoder(video[None].float())[0] for video in videos]
    if not rows:
        raise InputError("the video distance needs videos: none were given")
    return torch.stack(rows).double()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) for features (N, D) and (M, D); at least 0.

    Few samples bias it upwards: compare only distances of equal counts. Raises InputError below two samples.
    """
    if min(len(a), len(b)) < 2:
        raise InputError(f"the Frechet distance needs two videos on each side, not {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    root = _root(a.T.cov())
    # tr (C_a C_b)^(1/2) by a symmetric matrix of the same eigenvalues
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp_min(0).sqrt().sum()
    spread = a.var(0).sum() + b.var(0).sum() - 2 * cross
    return max(0.0, float((a.mean(0) - b.mean(0)).square().sum() + spread))


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def video_distance(made: Iterable[Tensor], real: Iterable[Tensor], encoder: VideoEncoder | None = None) -> float:
    """Return the distance between two sets of microworld videos (F, 3, H, W) in [0, 1]. encoder: None: the packaged."""
    encoder = encoder or load_encoder()
    return frechet_distance(features(encoder, made), features(encoder, real))
