"""What the training stages of the tiny models share: a resumable loop with a log, and the rendered clips."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vlmteacher.errors import InputError
from vlmteacher.files import append_text, make_folder
from vlmteacher.microworld import world
from vlmteacher.ops.attention import attention
from vlmteacher.state import read_state, write_state

FORM = "vlmteacher stage 1"  # of the state; another number when its content changes
CONFIGS = Path(__file__).parent / "configs"


def load_config(stage: str) -> dict[str, Any]:
    """The packaged settings of a stage: sizes, steps, seed, learning rate."""
    return json.loads((CONFIGS / f"{stage}.json").read_text())


def train(
    modules: dict[str, nn.Module],
    step: Callable[[int, np.random.Generator], tuple[torch.Tensor, dict[str, float]]],
    out: Path,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    warmup: int = 100,
    weight_decay: float = 0.01,
    save_every: int = 250,
    log_every: int = 25,
    ema: float = 0.0,
) -> None:
    """Minimise ``step(index, rng)`` over all parameters of `modules`; resume from `out` where a state is found.

    AdamW, cosine decay to 5%, clipping at 1. Each step draws from a generator seeded by (seed, index), so that a
    resumed run sees the data that an uninterrupted one would. With ``ema`` > 0 the modules end as the average.
    Writes ``log.jsonl`` (one row per `log_every` steps: means over the steps that report a value) and ``state.pt``.
    """
    make_folder(out)
    params = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    average = [p.detach().clone() for p in params] if ema else []
    start = 0
    if (out / "state.pt").exists():
        sizes = sum(
            tensor.numel() * tensor.element_size() for m in modules.values() for tensor in m.state_dict().values()
        )
        state = read_state(out / "state.pt", FORM, limit=8 * sizes + 2**20)
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]
        start = state["step"]
        print(f"resumed at step {start}", flush=True)

    def save(index: int) -> None:
        state = {
            "modules": {name: module.state_dict() for name, module in modules.items()},
            "optimizer": optimizer.state_dict(),
            "average": average,
            "step": index,
        }
        write_state(out / "state.pt", FORM, state)

    sums: dict[str, list[float]] = {}
    began = time.time()
    for index in range(start, steps):
        rate = min(1.0, (index + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * index / steps)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        loss, values = step(index, np.random.default_rng([seed, index]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(params, 1.0)
        if not torch.isfinite(norm):
            continue
        optimizer.step()
        decay = min(ema, (index + 1) / (index + 10))
        for mean, p in zip(average, params, strict=False):
            mean.lerp_(p.detach(), 1 - decay)
        for name, value in {"loss": float(loss.detach()), **values}.items():
            sums.setdefault(name, []).append(value)
        if (index + 1) % log_every == 0:
            row = {"step": index + 1, "seconds": round(time.time() - began, 1)}
            row |= {name: round(fmean(values), 5) for name, values in sums.items()}
            sums = {}
            append_text(out / "log.jsonl", json.dumps(row) + "\n")
            print(row, flush=True)
        if (index + 1) % save_every == 0:
            save(index + 1)
    save(steps)
    if ema:
        with torch.no_grad():
            for mean, p in zip(average, params, strict=True):
                p.copy_(mean)


def adopt(model: nn.Module, known: nn.Module, tokenizer: Any = None, known_tokenizer: Any = None) -> None:
    """Start `model` from the weights of `known`; embeddings token by token, where the vocabularies differ.

    Raises InputError: parts of other sizes.
    """
    weights = known.state_dict()
    own = model.state_dict()
    if tokenizer is not None:
        ids = known_tokenizer.get_vocab()
        pairs = [(new, ids[token]) for token, new in tokenizer.get_vocab().items() if token in ids]
        here, there = torch.tensor(pairs).T
        for name, value in own.items():
            if len(value) == len(tokenizer) and len(weights[name]) == len(known_tokenizer):
                mixed = value.clone()
                mixed[here] = weights[name][there]
                weights[name] = mixed
    wrong = [name for name, value in own.items() if name not in weights or weights[name].shape != value.shape]
    if wrong:
        raise InputError(f"the weights to start from have no fitting {wrong[0]}: train from scratch, or use its sizes")
    model.load_state_dict({name: weights[name] for name in own})


def random_clip(rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """A clip (T, H, W, 3) for the autoencoders: right videos, and faded, doubled or recoloured balls among them."""
    scene = world.sample_scene(rng, str(rng.choice(world.FAMILIES)))
    track = world.perform(world.flawed(scene) if rng.random() < 0.3 else scene)
    first = int(rng.integers(0, world.NUM_FRAMES - num_frames + 1))
    if rng.random() < 0.4:
        fade = np.interp(np.arange(world.NUM_FRAMES), np.sort(rng.uniform(0, 13, 3)), rng.uniform(0, 1, 3))
        track = [
            tuple(replace(x, alpha=float(fade[t])) if i in scene.actors else x for i, x in enumerate(things))
            for t, things in enumerate(track)
        ]
    if rng.random() < 0.3:
        other = world.sample_scene(rng, str(rng.choice(world.FAMILIES)))
        color, alpha = str(rng.choice(list(world.COLORS))), float(rng.uniform())
        more = (things[other.actors[0]] for things in world.perform(other))
        track = [(*things, replace(x, color=color, alpha=alpha)) for things, x in zip(track, more, strict=True)]
    return world.draw(track[first : first + num_frames])


@contextmanager
def fast_attention() -> Iterator[None]:
    """diffusers' models use our attention inside the block: over so few tokens torch's takes a third of a step."""
    stock = F.scaled_dot_product_attention

    def ours(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if attn_mask is not None or dropout_p or is_causal or scale is not None:
            return stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
        q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
        return attention(q, k, v).transpose(1, 2)

    F.scaled_dot_product_attention = ours
    try:
        yield
    finally:
        F.scaled_dot_product_attention = stock


def shaken(latents: torch.Tensor, most: float, rng: np.random.Generator) -> torch.Tensor:
    """Latents (B, ...) with noise of 0 to `most` times their spread, for decoders that are to withstand optimisation.

    What an optimisation adds to latents is no image: a decoder that has seen encoded videos alone makes one of it.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    scale = most * latents.std() * torch.rand(len(latents), *[1] * (latents.ndim - 1), generator=generator)
    return latents + scale * torch.randn(latents.shape, generator=generator)


def to_video(frames: np.ndarray) -> torch.Tensor:
    """(B, T, H, W, 3) in [0, 1] -> (B, 3, T, H, W) in [-1, 1], as diffusers' VAEs take it."""
    return torch.from_numpy(np.ascontiguousarray(frames, dtype=np.float32)).permute(0, 4, 1, 2, 3) * 2 - 1
