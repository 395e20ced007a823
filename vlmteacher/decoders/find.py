"""Find the file of a surrogate decoder: by path, by hub name, or by the Reasoner's family."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from vlmteacher.checkpoints.hub import find_weights, only_weights
from vlmteacher.errors import InputError
from vlmteacher.files import check_text
from vlmteacher.reasoners.registry import FAMILIES

# (transformer, (channels, frames per latent frame, pixels per latent cell)): the file on the hub. VAEs of several
# families have latents of one shape.
KNOWN = {(family.transformer, latents): file for family in FAMILIES for latents, file in family.decoders.items()}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+)?(@[\w./-]+)?")


def find_decoder(name: str | os.PathLike[str]) -> Path:
    """Find a decoder's file: a path, ``OWNER/REPO/FILE``, or a directory or ``OWNER/REPO`` with one file of weights.

    ``@REVISION`` after a hub name is a branch, tag or commit. Raises InputError.
    """
    text = os.path.expanduser(check_text(os.fspath(name), "decoder"))
    path = Path(text)
    if os.path.isdir(text):
        return path / only_weights([file.name for file in path.iterdir()], text)
    if os.path.exists(text) or not HUB_NAME.fullmatch(text) or text.startswith(".") or _is_local(text):
        return path
    return find_weights(text, "decoder")


def known_decoder(reasoner: Any) -> str:
    """The hub name of the decoder for a Reasoner's latents. Raises InputError where none is known."""
    if own := getattr(reasoner, "surrogate_decoder", None):
        return own
    latents = (reasoner.latent_channels, reasoner.temporal_stride, reasoner.spatial_stride)
    file = KNOWN.get((type(reasoner.transformer).__name__, latents))
    if file is None:
        raise InputError(
            f"no decoder is known for latents of {latents[0]} channels, {latents[1]}x in time and {latents[2]}x in"
            " space: give --decoder FILE, or train one with `vlmteacher distill decoder`"
        )
    return file


def _is_local(text: str) -> bool:
    """Whether a path that does not exist was meant as a path: of two parts, the second a file's name."""
    return text.count("/") == 1 and text.endswith((".safetensors", ".pth"))
