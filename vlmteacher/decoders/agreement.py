"""Check that a surrogate decoder and a VAE read the same latents.

Channels and strides can agree where the latents do not: taew2_1 fits every model of 16 channels, but decodes the
latents of most to coloured noise; a decoder of de-normalised latents makes pale frames of normalised ones. So a small
clip is encoded by the VAE, and its latents are decoded by both. `agreement` is the share of variance of the VAE's
frames that the surrogate's explain, 1 - |ours - theirs|^2 / |theirs - mean|^2. It is .97 for the packaged decoder, and
.77 with the wrong scale of the latents. For published decoders others measured 39 dB, about .998, and 19 to 20 dB,
about .8, with the wrong scale. Random weights are below 0.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlmteacher.errors import InputError
from vlmteacher.files import read_json, write_json
from vlmteacher.state import fingerprint

if TYPE_CHECKING:
    from vlmteacher.decoders.taehv import SurrogateDecoder

LEAST = 0.9  # agreement of a decoder that is accepted
CELLS = 8  # latent cells down and across
SWITCH = "VLMTEACHER_CHECK_DECODER"  # an environment variable; 0 turns the check off
VERSION = 1  # of the measure, which cached values must have


def check_agreement(decoder: SurrogateDecoder, reasoner: Any, name: str) -> None:
    """Raise InputError, with `name`, unless `decoder` reads the latents of `reasoner`'s VAE.

    The VAE must be on the Reasoner's device. The agreement is measured once for a pair of networks and cached in
    ``$XDG_CACHE_HOME/vlmteacher``.
    """
    if os.environ.get(SWITCH) == "0":
        return
    key = pair_fingerprint(decoder, reasoner)
    share = _cached(key)
    if share is None:
        share = agreement(decoder, reasoner)
        _keep(key, share)
    if not share >= LEAST:
        raise InputError(
            f"{name} is no decoder of this Reasoner's latents: on a test clip its frames explain {share:.2f} of the"
            f" variance of the VAE's, and {LEAST} is the least: give the decoder of the Reasoner's family, or"
            f" train one with `vlmteacher distill decoder` ({SWITCH}=0 uses this one nevertheless)"
        )


@torch.no_grad()
def agreement(decoder: SurrogateDecoder, reasoner: Any) -> float:
    """The share of the variance of the VAE's frames of `clip` that the surrogate's explain, in [-99, 1].

    -99 also stands for values that are not finite.
    """
    latents = reasoner.encode_video(clip(reasoner.frame_step + 1, CELLS * reasoner.spatial_stride))
    theirs = reasoner.decode(latents).float()
    if not latents.isfinite().all():
        return -99.0
    ours = decoder.decode(latents).float()[reasoner.lead_frames :]
    share = 1 - (ours - theirs).square().mean() / theirs.var().clamp(min=1e-4)
    return share.nan_to_num(-99.0).clamp(min=-99.0).item()


def clip(frames: int, side: int) -> np.ndarray:
    """A video (frames, side, side, 3) uint8 of a red disc and a blue square that move on a light ground."""
    y, x = (np.mgrid[0:side, 0:side] + 0.5) / side
    video = np.empty((frames, side, side, 3), np.uint8)
    video[:] = (242, 242, 237)
    for frame, shift in zip(video, np.linspace(0, 0.1, frames), strict=True):
        frame[(x - 0.3 - shift) ** 2 + (y - 0.35) ** 2 < 0.15**2] = (217, 38, 26)
        frame[(abs(x - 0.7) < 0.14) & (abs(y - 0.65 + shift) < 0.14)] = (38, 76, 217)
    return video


def pair_fingerprint(decoder: SurrogateDecoder, reasoner: Any) -> str:
    """A fingerprint of decoder and VAE, with the statistics of the latents."""
    statistics = [decoder.latents_mean, decoder.latents_std, reasoner.latents_mean, reasoner.latents_std]
    values = [None if value is None else value.flatten().tolist() for value in statistics]
    return fingerprint({"decoder": decoder, "vae": reasoner.vae}, VERSION, values)


def _file(key: str) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "vlmteacher" / "decoders" / f"{key}.json"


def _cached(key: str) -> float | None:
    with suppress(InputError):  # a missing or damaged file: measured again
        entry = read_json(_file(key), "cache")
        if isinstance(entry, dict) and isinstance(entry.get("agreement"), float):
            return entry["agreement"]
    return None


def _keep(key: str, share: float) -> None:
    with suppress(OSError):  # without a cache it is measured every time
        _file(key).parent.mkdir(parents=True, exist_ok=True)
        write_json(_file(key), {"agreement": share})
