"""What one part of a step costs, from a trace; layers that are alike are traced at two depths and added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmteacher.planning.tracing import tracing

META = torch.device("meta")


@dataclass(frozen=True)
class Cost:
    """Of one part: FLOPs of its forward and backward; bytes: kept between the two, and alive at most during each, those
    kept included, weights and what other parts keep excluded. repeated: the part of `backward` that is done again."""

    forward: int = 0
    backward: int = 0
    repeated: int = 0
    kept: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0


def measure(run: Callable[[], Sequence[Tensor]], weights: Sequence[nn.Module], leaves: Sequence[Tensor]) -> Cost:
    """Trace `run`, which returns what depends on `leaves`, and its backward."""
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
    """(what does not grow with the depth, what each layer adds) from traces of `depth` and `depth + 1` equal layers.

    The bytes alive beyond those kept do not grow: they stand in the first.
    """
    less, more = at_depth(depth), at_depth(depth + 1)
    names = ("forward", "backward", "kept")
    layer = {name: getattr(more, name) - getattr(less, name) for name in names}
    base = {name: getattr(less, name) - depth * layer[name] for name in names}
    transient = more.forward_bytes - more.kept, more.backward_bytes - more.kept
    return Cost(**base, forward_bytes=transient[0], backward_bytes=transient[1]), Cost(**layer)


def stack(parts: Sequence[tuple[Cost, Cost]], free: Sequence[tuple[Cost, Cost]]) -> Cost:
    """The cost of a stack of layers: (base, layer) of each one's level, and the same where nothing is recomputed."""

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
