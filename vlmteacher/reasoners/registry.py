"""The known Reasoner families. A new one is a file that declares a `Family`, and its line here."""

from __future__ import annotations

import re

from torch import nn

from vlmteacher.errors import InputError
from vlmteacher.reasoners.cogvideox import COGVIDEOX
from vlmteacher.reasoners.cosmos25 import COSMOS
from vlmteacher.reasoners.family import DecoderFile, Family
from vlmteacher.reasoners.hunyuan_video.family import HUNYUAN_VIDEO
from vlmteacher.reasoners.hunyuan_video15.family import HUNYUAN_VIDEO_15
from vlmteacher.reasoners.ltx import LTX
from vlmteacher.reasoners.ltx2 import LTX2
from vlmteacher.reasoners.wan.chronoedit import CHRONOEDIT
from vlmteacher.reasoners.wan.family import WAN
from vlmteacher.reasoners.wan.skyreels import SKYREELS_V2
from vlmteacher.reasoners.wan.vace import VACE

FAMILIES: tuple[Family, ...] = (
    *(WAN, VACE, SKYREELS_V2, CHRONOEDIT),
    *(LTX, LTX2, HUNYUAN_VIDEO_15, HUNYUAN_VIDEO, COGVIDEOX, COSMOS),
)


def family_of_pipeline(kind: str, name: str) -> Family:
    """The family of a diffusers pipeline class. Raises InputError, which calls the pipeline `name`."""
    for family in FAMILIES:
        if kind in family.pipelines:
            return family
        if kind in family.refused:
            raise InputError(f"{name} is a {kind}, {family.refused[kind]}")
    known = ", ".join(pipeline for family in FAMILIES for pipeline in family.pipelines)
    raise InputError(f"{name} is a {kind}: the known Reasoners are {known}")


def family_of(transformer: nn.Module) -> Family:
    """The family of a transformer of diffusers. Raises InputError for a class of no known family."""
    kind = type(transformer).__name__
    for family in FAMILIES:
        if kind == family.transformer:
            return family
    raise InputError(f"unknown transformer {kind}: choose from {', '.join(each.transformer for each in FAMILIES)}")


def decoder_file(name: str) -> DecoderFile:
    """What a family declares of a published surrogate decoder, by the name of its file; nothing of other files."""
    files = (file for family in FAMILIES for file in family.decoder_files)
    return next((file for file in files if re.match(file.pattern, name)), DecoderFile(re.escape(name)))
