"""Parsing of the keys of LoRA files: the expert, the layer, and the part of its update."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from vlmteacher.lora.formats.names import ours
from vlmteacher.reasoners.family import TABLE

Expert = Literal["transformer", "transformer_2"]  # of models with two: for high and low noise

# Prefixes of the layer's name, of which a key may have several -> the expert that they name.
PREFIXES: dict[str, Expert | None] = {
    "transformer.": None,  # diffusers, finetrainers; the first expert in a file that has transformer_2. too
    "transformer_2.": "transformer_2",  # diffusers' name of the low-noise expert
    "transformer_1.": "transformer",  # ai-toolkit numbers both
    "high_noise_model.": "transformer",  # the directories of the experts as their authors released them
    "low_noise_model.": "transformer_2",
    "high_noise.": "transformer",
    "low_noise.": "transformer_2",
    "base_model.model.": None,  # PEFT
    "model.diffusion_model.": None,
    "diffusion_model.": None,  # ComfyUI
    "pipe.dit.": None,  # DiffSynth, when the whole pipeline is trained
    "dit.": None,
}
JOINED = re.compile(r"lora_unet_{1,2}")  # kohya, musubi-tuner; VideoX-Fun: two underscores
TEXT_ENCODERS = re.compile(r"(lora_te\d*_|te\d*[._]|text_encoders?(_\d+)?\.|cond_stage_model\.|conditioner\.)")

_FACTOR = {"lora_A": "A", "lora_down": "A", "lora.down": "A", "lora_linear_layer.down": "A"} | {
    "lora_B": "B", "lora_up": "B", "lora.up": "B", "lora_linear_layer.up": "B"
}  # fmt: skip
_PART = re.compile(
    rf"(?P<layer>.+?)\.(?:(?P<factor>{'|'.join(map(re.escape, _FACTOR))})"
    r"(?:\.(?!bias|weight)[^.]+)?(?:\.(?P<kind>weight|bias))?"  # PEFT's name of the adapter may stand between
    r"|(?P<other>alpha|diff|diff_b|diff_m|w_norm|b_norm))"
)
_OTHER = {"w_norm": "diff", "b_norm": "diff_b"}  # LyCORIS

Part = Literal["A", "B", "bias", "alpha", "diff", "diff_b", "diff_m"]


@dataclass(frozen=True)
class Key:
    """A parsed key.

    Attributes:
        path: the layer as the file names it, without prefixes.
        name: the layer as diffusers names it.
        part: "A", "B": a factor; "bias": of B, and scaled like it; "alpha"; "diff", "diff_b", "diff_m": a difference
            that is added to the weight, the bias or the modulation as it is.
        unknown: the prefixes are those of authors' names, and no known family has such a layer.
    """

    expert: Expert | None
    path: str
    name: str
    part: Part
    unknown: bool
    kohya: bool  # the factors are called as kohya calls them: down and up

    @property
    def parameter(self) -> str:
        """The name of the parameter to which a difference is added."""
        if self.part == "diff_b":
            return f"{self.name}.bias"
        return self.name if self.name.rpartition(".")[2] == TABLE else f"{self.name}.weight"


def parse_key(key: str) -> Key | None:
    """Parse a key; None for one that neither LoRA factors nor weight differences have."""
    match = _PART.fullmatch(key)
    if match is None:
        return None
    path, expert, authors, dot = match["layer"], None, False, "."
    if prefix := JOINED.match(path):
        path, authors, dot = path[prefix.end() :], True, "_"
    while prefixed := next((each for each in PREFIXES if path.startswith(each)), None):
        path, expert = path.removeprefix(prefixed), PREFIXES[prefixed] or expert
        authors = authors or prefixed.endswith("diffusion_model.")
    part = match["other"] or ("bias" if match["kind"] == "bias" else _FACTOR[match["factor"]])
    part = _OTHER.get(part, part)
    if part == "bias" and _FACTOR[match["factor"]] == "A":
        return None
    layer = f"{path}{dot}modulation" if part == "diff_m" else path
    known = ours(layer, dot)
    kohya = match["factor"] in ("lora_down", "lora_up")
    return Key(expert, path, known or layer, part, authors and known is None, kohya)  # type: ignore[arg-type]
