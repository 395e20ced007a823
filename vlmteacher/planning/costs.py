"""The cost of a part of a step, from a trace; equal layers are traced at two depths and added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmteacher.planning.tracing import tracing

META = torch.device("meta")


@dataclass(frozen=True)
class Cost:
    """The cost of one part of a step.

    Attributes:
        forward, backward: FLOPs.
        repeated: the FLOPs of `backward` that recompute the forward.
        kept: bytes kept from the forward for the backward.
        forward_bytes, backward_bytes: peak bytes, with those kept and without weights and other parts.
    """

    forward: int = 0
    backward: int = 0
    repeated: int = 0
    kept: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0


def measure(run: Callable[[], Sequence[Tensor]], weights: Sequence[nn.Module], leaves: Sequence[Tensor]) -> Cost:
    """Trace `run`, which returns tensors that depend on `leaves`, and its backward."""
    with tracing() as trace:
        trace.weights(*weights)
        trace.inputs(*leaves)
        with trace.at("forward"):
            outputs = list(run())
        kept = trace.live
        with trace.at("backward"):
            grads = [torch.empty_like(output) for output in outputs]
            torch.autograd.backward(outputs, grads, inputs=list(leaves))
        del outputs, grads
    for leaf in leaves:
        leaf.grad = None
    flops, peak = trace.flops, trace.peak
    return Cost(flops["forward"], flops["backward"], 0, kept, peak["forward"], peak["backward"])


def per_layer(at_depth: Callable[[int], Cost], depth: int) -> tuple[Cost, Cost]:
    """The costs (base, layer) of a stack, base + n layer for n equal layers, from traces of `depth` and `depth + 1`.

    Peak bytes beyond those kept do not grow with the depth: they are in the base.
    """
    less, more = at_depth(depth), at_depth(depth + 1)
    names = ("forward", "backward", "kept")
    layer = {name: getattr(more, name) - getattr(less, name) for name in names}
    base = {name: getattr(less, name) - depth * layer[name] for name in names}
    transient = more.forward_bytes - more.kept, more.backward_bytes - more.kept
    return Cost(**base, forward_bytes=transient[0], backward_bytes=transient[1]), Cost(**layer)


def stack(parts: Sequence[tuple[Cost, Cost]], free: Sequence[tuple[Cost, Cost]]) -> Cost:
    """The cost of a stack from (base, layer) of each layer's level; free: the same where nothing is recomputed."""

    def add(name: str, parts: Sequence[tuple[Cost, Cost]]) -> int:
        return getattr(parts[0][0], name) + sum(getattr(layer, name) for _, layer in parts)

    kept, backward = add("kept", parts), add("backward", parts)
    return Cost(
        add("forward", parts),
        backward,
        backward - add("backward", free),
        kept,
        kept + max(base.forward_bytes for base, _ in parts),
        kept + max(base.backward_bytes for base, _ in parts),
    )
