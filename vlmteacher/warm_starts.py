"""Warm starts: a folder of earlier instances' LoRAs, from which a new instance takes the one to start from.

An instance that reached the threshold leaves three files in the folder: its LoRA (any tool's `read_lora` takes it), its
first frame, and a JSON file with prompt, queries, outcome and the embedding of its texts. A new instance looks for the
entry whose texts are the most similar by the Reasoner's text encoder, or takes the mean of all entries: one step of
Reptile (arXiv 1803.02999) over the earlier instances.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.files import make_folder, read_json, replacing, write_bytes, write_json
from vlmteacher.lora.formats import read_lora

if TYPE_CHECKING:
    from vlmteacher.queries import QuerySet
    from vlmteacher.reasoners.base import Reasoner

NAME = re.compile(r"[0-9a-f]{16}")
MOST = 64  # entries of which the mean is taken, the most similar ones
State = dict[str, Tensor]
"""A LoRA's factors under PEFT's names, as `lora_state_dict` returns them."""


@dataclass(frozen=True)
class Start:
    """A LoRA to start from: its factors, the entry's name or "mean", the entry's similarity in [-1, 1]."""

    state: State
    name: str
    similarity: float


@torch.no_grad()
def embed(reasoner: Reasoner, prompt: str, queries: QuerySet) -> list[float]:
    """The embedding of an instance's texts: the prompt's, then the mean of the queries', each of norm sqrt(1/2).

    A text's embedding is the mean over the tokens of the Reasoner's text encoder. Raises InputError for a Reasoner that
    encodes no prompt alone.
    """

    def mean(text: str) -> Tensor:
        tokens = reasoner.encode_prompt(text)[0].float().cpu()
        return tokens[tokens.abs().amax(-1) > 0].mean(0)

    parts = mean(prompt), torch.stack([mean(query) for query in queries.questions]).mean(0)
    return torch.cat([part / (part.norm() * math.sqrt(2)).clamp_min(1e-12) for part in parts]).tolist()


def key_of(prompt: str, queries: QuerySet, config: dict[str, Any]) -> str:
    """The name of an instance's entry: one never starts from itself, so that it can be repeated."""
    same = {"prompt": prompt, "queries": queries.to_dict(), **{k: config[k] for k in ("image", "seed", "generator")}}
    same |= {name: value for name in ("last_image", "goal_image") if (value := config.get(name)) is not None}
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]


class WarmStarts:
    """The folder of earlier instances for one Reasoner. Files of another form raise InputError, which names them."""

    def __init__(self, folder: str, reasoner: str) -> None:
        self.folder, self.reasoner = Path(folder), reasoner

    def entries(self, embedding: Sequence[float], own: str) -> list[tuple[float, str]]:
        """Similarity and name of the entries of this Reasoner but `own`, the most similar first."""
        ranked = []
        for path in sorted(self.folder.glob("*.json")):
            if not NAME.fullmatch(path.stem) or path.stem == own:
                continue
            entry = read_json(path, "warm start")
            vector = entry.get("embedding") if isinstance(entry, dict) else None
            if not isinstance(vector, list) or not all(isinstance(x, float) and math.isfinite(x) for x in vector):
                raise InputError(f"{path} is no warm start: remove it")
            if entry.get("reasoner") == self.reasoner and len(vector) == len(embedding):
                similarity = math.fsum(a * b for a, b in zip(vector, embedding, strict=True))
                ranked.append((similarity, path.stem))
        return sorted(ranked, key=lambda each: (-each[0], each[1]))

    def find(self, embedding: Sequence[float], own: str, like: State, mean: bool = False) -> Start | None:
        """The LoRA to start from that fits `like`, or None: of the most similar entry, or the mean of the entries."""
        fitting: list[Start] = []
        for similarity, name in self.entries(embedding, own):
            state = self._read(name, like)
            if state is not None:
                fitting.append(Start(state, name, similarity))
            if len(fitting) == (MOST if mean else 1):
                break
        if not fitting or not mean:
            return fitting[0] if fitting else None
        return Start(mean_of([each.state for each in fitting]), "mean", fitting[0].similarity)

    def _read(self, name: str, like: State) -> State | None:
        """The factors of an entry at a scale of 1, None where they are not of the layers and the rank of `like`."""
        lora = read_lora(self.folder / f"{name}.safetensors")
        state = {}
        for layer, factors in lora.layers.items():
            state[f"{layer}.lora_A.weight"] = factors.a.float()
            state[f"{layer}.lora_B.weight"] = factors.b.float() * factors.scale
        same = state.keys() == like.keys() and all(state[key].shape == like[key].shape for key in like)
        return state if same else None

    def add(self, name: str, lora: bytes, image: Image.Image | None, entry: dict[str, Any]) -> None:
        """Add an instance, whose JSON file is written last; one that is there stays. Raises OutputError."""
        if (self.folder / f"{name}.json").exists():
            return
        make_folder(self.folder)
        write_bytes(self.folder / f"{name}.safetensors", lora)
        if image is not None:
            with replacing(self.folder / f"{name}.png") as temporary:
                image.save(temporary, format="PNG")
        write_json(self.folder / f"{name}.json", {"reasoner": self.reasoner, **entry})


def mean_of(states: Sequence[State]) -> State:
    """The LoRA of the rank of `states` that is the nearest to the mean of their updates B A, layer by layer."""
    mean: State = {}
    for key in (key for key in states[0] if ".lora_A." in key):
        other = key.replace(".lora_A.", ".lora_B.")
        rank = len(states[0][key])
        b = torch.cat([state[other] for state in states], 1) / len(states)
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(torch.cat([state[key] for state in states]).T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T)
        root, u, v = s[:rank].sqrt(), u[:, :rank], v[:rank]
        mean[key], mean[other] = root[:, None] * (v @ q_a.T), (q_b @ u) * root
    return {key: mean[key].contiguous() for key in states[0]}
