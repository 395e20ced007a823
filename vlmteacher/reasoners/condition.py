"""What a Reasoner is given for one instance: the encoded prompt and image, and every random draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What the video must answer, encoded once for the instance.

    Attributes:
        prompt_embeds: (B, L, D), zero beyond the prompt's own tokens or masked by `inputs`; B = 1 but in training.
        first_frame: (B, C, 1, h, w) normalised latents of the given image where the model keeps them as the video's
            first latent frame, or None (text only, or the image comes in by `inputs`).
        num_frames, height, width: size of the video in frames and pixels.
        inputs: what else the family's transformer is given, by name: masks, image features, a second text; (B, ...).
        negative: the same instance with the negative prompt, for models that need guidance; None for the others.
        cut: how many tokens of what the text encoder did not get (see `prompts.check_cut`).
    """

    prompt_embeds: Tensor
    first_frame: Tensor | None
    num_frames: int
    height: int
    width: int
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    negative: Condition | None = None
    cut: Mapping[str, int] = field(default_factory=dict)

    @property
    def all_cut(self) -> dict[str, int]:
        """`cut`, that of the negative prompt included."""
        return {**self.cut, **(self.negative.cut if self.negative else {})}

    @property
    def size(self) -> tuple[int, int, int]:
        return self.num_frames, self.height, self.width


@dataclass(frozen=True)
class Noise:
    """Every random draw of an instance, so that "the same noise" holds for the whole sampler.

    Attributes:
        z1: (B, C, T, h, w) float32, the latents at t = 1.
        steps: one draw like `z1` for each later sampler step, which puts noise back on the clean prediction.
        others: further draws like `steps`, for further videos that start from the same z1.
    """

    z1: Tensor
    steps: tuple[Tensor, ...]
    others: tuple[tuple[Tensor, ...], ...] = ()

    def samples(self) -> list[Noise]:
        """This noise, and z1 with each of `others`."""
        return [replace(self, steps=steps, others=()) for steps in (self.steps, *self.others)]


def with_first_frame(latents: Tensor, first_frame: Tensor | None) -> Tensor:
    """(1 - m) first_frame + m latents, where the mask m is 0 on the first latent frame only."""
    return latents if first_frame is None else torch.cat([first_frame, latents[:, :, 1:]], 2)


def collate(conditions: Sequence[Condition]) -> Condition:
    """One condition of a batch, of videos of one size, all with a first frame or all without."""
    first = conditions[0]
    known = [c.first_frame for c in conditions if c.first_frame is not None]
    if len(known) not in (0, len(conditions)) or any(c.size != first.size for c in conditions):
        raise ValueError("conditions of several sizes, or some with and some without a first frame, are no batch")
    negatives = [c.negative for c in conditions if c.negative is not None]
    return replace(
        first,
        prompt_embeds=torch.cat([c.prompt_embeds for c in conditions]),
        first_frame=torch.cat(known) if known else None,
        inputs={name: torch.cat([c.inputs[name] for c in conditions]) for name in first.inputs},
        negative=collate(negatives) if negatives else None,
    )
