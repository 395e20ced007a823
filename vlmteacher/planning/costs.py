"""The cost of a part of a step, from a trace; equal layers are traced at two depths and added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmteacher.planning.tracing import tracing

META = torch.device("meta")
_PEAKS = ("forward_bytes", "backward_bytes")


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
    """The costs (base, layer) of a stack, base + n layer for n equal layers, from traces of `depth` and `depth + 1`."""
    base, (layer,) = per_layers(at_depth, 1, depth)
    return base, layer


def per_layers(at_depths: Callable[..., Cost], kinds: int, depth: int) -> tuple[Cost, list[Cost]]:
    """The costs of a stack of several kinds of layers: base, and the layer of each kind.

    at_depths: (number of layers of each kind) -> the cost of such a stack. Peak bytes beyond those kept do not grow
    with the depth: they are in the base.
    """
    less = at_depths(*[depth] * kinds)
    traces = [at_depths(*(depth + (kind == k) for kind in range(kinds))) for k in range(kinds)]
    names = ("forward", "backward", "kept")
    layers = [{name: getattr(more, name) - getattr(less, name) for name in names} for more in traces]
    base = {name: getattr(less, name) - depth * sum(layer[name] for layer in layers) for name in names}
    forward, backward = (max(getattr(more, name) - more.kept for more in traces) for name in _PEAKS)
    return Cost(**base, forward_bytes=forward, backward_bytes=backward), [Cost(**layer) for layer in layers]


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


def passes_in_turn(vision: Cost, languages: Sequence[Cost]) -> tuple[Cost, Cost]:
    """The costs of the visual encoder and the language model in passes one after the other, all before the backward.

    vision: of one pass. languages: of each. The last pass has the graphs of all others beside its own.
    """
    if len(languages) == 1:
        return vision, languages[0]
    last, count = max(languages, key=lambda cost: cost.kept), len(languages)
    kept = sum(cost.kept for cost in languages)
    seen, read = (count - 1) * vision.kept, kept - last.kept
    return Cost(
        count * vision.forward,
        count * vision.backward,
        count * vision.repeated,
        count * vision.kept,
        seen + read + vision.forward_bytes,
        seen + read + vision.backward_bytes,
    ), Cost(
        sum(cost.forward for cost in languages),
        sum(cost.backward for cost in languages),
        sum(cost.repeated for cost in languages),
        kept,
        read + last.forward_bytes,
        read + last.backward_bytes,
    )
