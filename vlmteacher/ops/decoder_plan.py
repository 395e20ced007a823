"""Which frames each layer of a surrogate decoder computes, chunk by chunk over time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """One convolution of the decoder, computed by `surrogate_decoder.conv3x3`.

    Attributes:
        weights: (N, 3, 3, T * C) each, one per output frame of an input frame (with two, frame f becomes 2f, 2f + 1).
        bias: (N,) or None.
        memory: whether the layer reads the previous frame too (T = 2).
        residual: index of the layer whose input frame is added to the output, or None.
        slope: slope of the activation below zero; None: no activation.
        upscale: factor of height and width before the convolution, 1 or 2.
    """

    weights: tuple[Tensor, ...]
    bias: Tensor | None = None
    memory: bool = False
    residual: int | None = None
    slope: float | None = None
    upscale: int = 1

    def inputs(self, frames: Iterable[int]) -> set[int]:
        """The input frames that these output frames depend on."""
        own = {f // len(self.weights) for f in frames}
        return own | {f - 1 for f in own if f > 0} if self.memory else own

    @property
    def channels(self) -> tuple[int, int]:
        """Number of input and of output channels."""
        return self.weights[0].shape[-1] // (1 + self.memory), self.weights[0].shape[0]


@dataclass(frozen=True)
class Step:
    """The work of a layer in a chunk, whose input frames are in a bank.

    Attributes:
        carry: whether the bank starts with the latest frame of the chunks before.
        latest: index of the latest frame in the bank.
        taps: for each weight (G, T) int32 indices into the bank (see `conv3x3_reference`); G = 0 for a weight none of
            whose frames is needed.
    """

    carry: bool
    latest: int
    taps: tuple[Tensor, ...]


@dataclass(frozen=True)
class Plan:
    """Which frames each layer computes.

    Attributes:
        frames: for each chunk the output frames, in their order.
        first: for each chunk the input frames, ascending.
        steps: for each chunk the step of each layer.
        places: cache of `slots`.
    """

    frames: list[list[int]]
    first: list[list[int]]
    steps: list[list[Step]]
    places: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @classmethod
    def make(cls, layers: Sequence[Layer], wanted: Sequence[int], chunk: int) -> Plan:
        """Plan the output frames `wanted` (ascending, without repetitions), `chunk` of them at a time.

        A chunk computes the frames that its outputs depend on and no earlier chunk has computed. They are later than
        all of those, so each layer's bank needs only the latest frame of the past.
        """
        plan = cls([], [], [])
        done = [-1] * (len(layers) + 1)  # the latest frame of the input of each layer, and of the last one's output
        for start in range(0, len(wanted), chunk):
            needed = [set(wanted[start : start + chunk])]
            for layer in reversed(layers):
                needed.insert(0, layer.inputs(needed[0]))
            fresh = [sorted(f for f in frames if f > latest) for frames, latest in zip(needed, done, strict=True)]
            entering, steps = fresh[0], []
            plan.first.append(entering)
            for i, layer in enumerate(layers):
                count = len(layer.weights)
                slots = [[f for f in fresh[i + 1] if f % count == s] for s in range(count)]
                carry = not layer.inputs(fresh[i + 1]) <= set(entering)
                bank = [done[i], *entering] if carry else entering
                place = {f: k for k, f in enumerate(bank)}
                taps = []
                for slot in slots:
                    sources = [(f // count, f // count - 1)[: 1 + layer.memory] for f in slot]
                    rows = [[-1 if f < 0 else place[f] for f in row] for row in sources]
                    taps.append(torch.tensor(rows, dtype=torch.int32).view(len(rows), 1 + layer.memory))
                steps.append(Step(carry, place[max(bank)] if bank else 0, tuple(taps)))
                done[i] = max([done[i], *entering])
                entering = [f for slot in slots for f in slot]
            done[-1] = max([done[-1], *entering])
            plan.frames.append(entering)
            plan.steps.append(steps)
        return plan

    def to(self, device: torch.device) -> Plan:
        """Copy the taps to a device, in one transfer."""
        if device.type == "cpu":
            return self
        flat = [t for steps in self.steps for step in steps for t in step.taps]
        moved = iter(torch.cat([t.flatten() for t in flat]).to(device).split([t.numel() for t in flat]))
        steps = [
            [replace(step, taps=tuple(next(moved).view(t.shape) for t in step.taps)) for step in steps]
            for steps in self.steps
        ]
        return replace(self, steps=steps, places={})

    def slots(self, indices: Sequence[int], temporal_patch: int) -> Tensor:
        """(G, R) int32 on the taps' device: the positions of each output frame in a video of the frames `indices`, or
        -1. The video's last frame is repeated to fill a temporal patch. Cached."""
        key = (*indices, -temporal_patch)
        if key not in self.places:
            places: dict[int, list[int]] = {f: [] for chunk in self.frames for f in chunk}
            for slot, f in enumerate([*indices, *[indices[-1]] * (-len(indices) % temporal_patch)]):
                places[f].append(slot)
            most = max(map(len, places.values()))
            table = [slots + [-1] * (most - len(slots)) for slots in places.values()]
            self.places[key] = torch.tensor(table, dtype=torch.int32).to(self.steps[0][0].taps[0].device)
        return self.places[key]

    def multiply_adds(self, layers: Sequence[Layer], height: int, width: int) -> int:
        """Multiply-adds of the forward pass for inputs of this size; the backward pass has as many."""
        total, size = 0, height * width
        for i, layer in enumerate(layers):
            size *= layer.upscale**2
            count = sum(len(t) for steps in self.steps for t in steps[i].taps)
            total += count * size * (4 if layer.upscale == 2 else 9) * layer.weights[0].shape[-1] * layer.channels[1]
        return total
