"""The inputs of a Reasoner for one instance: the encoded prompt and image, and every random draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Prompt and image of one instance, encoded once.

    Attributes:
        prompt_embeds: (B, L, D), zero beyond the prompt's own tokens or masked by `inputs`; B > 1 in training only.
        first_frame: (B, C, 1, h, w) normalised latents of the image, where the model keeps them as the video's first
            latent frame; None without an image, or where the image is among `inputs`.
        num_frames, height, width: size of the video in frames and pixels.
        inputs: further arguments (B, ...) of the family's transformer, by name: masks, image features, a second text.
        negative: the same instance with the negative prompt, for models with guidance; None for the others.
        cut: the number of tokens that were cut off, by the name of the text (see `prompts.check_cut`).
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
        """`cut` of this condition and of `negative`."""
        return {**self.cut, **(self.negative.cut if self.negative else {})}

    @property
    def size(self) -> tuple[int, int, int]:
        """(frames, height, width)."""
        return self.num_frames, self.height, self.width


@dataclass(frozen=True)
class Noise:
    """Every random draw of an instance, fixed before sampling: the same `Noise` gives the same video.

    Attributes:
        z1: (B, C, T, h, w) float32, the latents at t = 1.
        steps: the draws, in the shape of `z1`, that the sampler adds to its clean predictions after the first.
        others: `steps` of further videos that start from the same z1.
    """

    z1: Tensor
    steps: tuple[Tensor, ...]
    others: tuple[tuple[Tensor, ...], ...] = ()

    def samples(self) -> list[Noise]:
        """The noise of each video: z1 with `steps`, then z1 with each of `others`."""
        return [replace(self, steps=steps, others=()) for steps in (self.steps, *self.others)]


def with_first_frame(latents: Tensor, first_frame: Tensor | None) -> Tensor:
    """Latents (B, C, T, h, w) with their first frame replaced by `first_frame` (B, C, 1, h, w), unless that is None."""
    return latents if first_frame is None else torch.cat([first_frame, latents[:, :, 1:]], 2)


def collate(conditions: Sequence[Condition]) -> Condition:
    """Join conditions into a batch. Raises ValueError unless all have one size, and all or none a first frame."""
    first = conditions[0]
    known = [c.first_frame for c in conditions if c.first_frame is not None]
    if len(known) not in (0, len(conditions)) or any(c.size != first.size for c in conditions):
        raise ValueError("a batch needs conditions of one size, all with a first frame or all without")
    negatives = [c.negative for c in conditions if c.negative is not None]
    return replace(
        first,
        prompt_embeds=torch.cat([c.prompt_embeds for c in conditions]),
        first_frame=torch.cat(known) if known else None,
        inputs={name: torch.cat([c.inputs[name] for c in conditions]) for name in first.inputs},
        negative=collate(negatives) if negatives else None,
    )
