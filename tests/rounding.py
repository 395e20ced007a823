"""How far rounding may take a result from its definition: one bound for all tests, the same on every processor.

Two roundings are never compared with each other, since either may be the lucky one. `expected` runs the definition in
float64 with the errors that the standard model of floating point allows (Higham, Accuracy and Stability of Numerical
Algorithms, section 2.2): with u the unit roundoff of the type that an operation's result has,

    a single operation      fl(x) = x (1 + d),             d uniform in [-u, u]
    a sum of n terms        its own error of a sum         sqrt(n) u' sum |terms| times a standard normal number,

u' being that of the accumulator, float32 or wider (Higham and Mary, A New Approach to Probabilistic Rounding Error
Analysis, 2019: beyond c sqrt(n) u' sum |terms| with a probability of about exp(-c^2 / 2), in whatever order the terms
are added up, with FMA or without). Nothing of it is measured, so the bound does not depend on a vendor's products. What
an error at one place does to the result (cancellation, a ReLU at zero, correlated terms) comes out by itself.

`check` then asks, with s the root mean square of the modelled errors over all draws:

    of each value           |error| <= 8 times s of this value and of the whole tensor
    of all N together       rms(error) <= (2 + 16 / sqrt(N)) times s of the whole tensor,

the first for an error in one place, the second for an error that is everywhere, as a narrow accumulator's. Eight
standard deviations are passed by chance once in 10^15 values. tests/test_rounding.py holds both against sums in every
order and against mistakes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from vlmteacher.ops.resize import resize_matrix

ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float64: 0.0, torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
DEVIATIONS = 8

aten = torch.ops.aten
# what moves, selects or compares numbers, or changes only their sign: without rounding
EXACT = {
    aten.abs, aten.alias, aten.as_strided, aten.cat, aten.clamp, aten.clone, aten.constant_pad_nd, aten.copy_,
    aten.detach, aten.empty_like, aten.expand, aten.flip, aten.full_like, aten.gather, aten.index, aten.index_select,
    aten.lift_fresh, aten.masked_fill, aten.max_pool2d_with_indices, aten.neg, aten.new_empty, aten.new_full,
    aten.new_ones, aten.new_zeros, aten.ones_like, aten.permute, aten.pixel_shuffle, aten.relu, aten.repeat,
    aten.select, aten.select_backward, aten.slice, aten.slice_backward, aten.split, aten.split_with_sizes,
    aten.squeeze, aten.stack, aten.t, aten.threshold_backward, aten.transpose, aten.unbind, aten.unsqueeze,
    aten._unsafe_view, aten.upsample_nearest2d, aten.view, aten.where, aten.zero_, aten.zeros_like, aten.amax,
}  # fmt: skip
SUMS: dict[Any, Callable[..., float]] = {  # the length of the sums that are an operation's results y
    aten.mm: lambda y, a, b: a.shape[-1],
    aten.bmm: lambda y, a, b: a.shape[-1],
    aten.addmm: lambda y, c, a, b, **_: a.shape[-1],
    aten.baddbmm: lambda y, c, a, b, **_: a.shape[-1],
    aten.sum: lambda y, x, *_, **__: x.numel() / y.numel(),
    aten.mean: lambda y, x, *_, **__: x.numel() / y.numel(),
    aten.index_add_: lambda y, x, dim, index, source: len(index) + 1,
    aten.convolution: lambda y, x, weight, *_: max(weight[0].numel(), weight[:, 0].numel()),
    aten.convolution_backward: lambda y, grad, x, weight, *_: (
        grad[:, 0].numel() if y.shape == weight.shape or y.dim() == 1 else max(weight[0].numel(), weight[:, 0].numel())
    ),
}
# what is made of several operations, each of which rounds
COMPOSED: dict[Any, Callable[..., Any]] = get_decompositions(
    [
        aten.native_layer_norm, aten.native_layer_norm_backward, aten._softmax, aten._softmax_backward_data,
        aten._log_softmax, aten._log_softmax_backward_data, aten.gelu, aten.gelu_backward, aten.silu,
        aten.silu_backward, aten._fused_rms_norm, aten._fused_rms_norm_backward,
    ]
) | {aten.var_mean.dim: lambda *args: _var_mean(*args)}  # fmt: skip


class Rounded(Tensor):
    """A tensor of some floating type whose numbers stand, with the errors so far, in `value`, in float64."""

    value: Tensor
    generator: torch.Generator | None  # of the errors; None: there are none

    @staticmethod
    def __new__(cls, value: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Rounded:
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset(), "device": value.device}
        self = Tensor._make_wrapper_subclass(cls, value.size(), dtype=dtype, **layout)
        self.value, self.generator = value, generator
        return self

    def __repr__(self, **_: Any) -> str:
        return f"Rounded({self.value}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSED:
            return COMPOSED[func](*args, **kwargs)
        rounded = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Rounded)]
        generator, name = rounded[0].generator, func.overloadpacket
        dtype = kwargs.get("dtype") or _common(rounded)  # other numbers are constants, and taken as they are
        if "dtype" in kwargs and dtype in ROUNDOFF:
            kwargs = kwargs | {"dtype": torch.float64}
        plain_args, plain_kwargs = tree_map_only(Tensor, _value, (args, kwargs))
        if name in SUMS and generator is not None:  # before what is in place changes its input
            magnitudes = tree_leaves(func(*tree_map_only(Tensor, _magnitude, plain_args), **plain_kwargs))
        made, spec = tree_flatten(func(*plain_args, **plain_kwargs))
        found = []
        for i, y in enumerate(made):
            if not isinstance(y, Tensor) or not y.is_floating_point():
                found.append(y)
                continue
            if generator is not None and name is aten._to_copy:
                off = y.to(dtype).double() != y
                y = torch.where(off, _rounded(y, ROUNDOFF[dtype], generator, SMALLEST[dtype]), y)
            elif generator is not None and name not in EXACT:
                noisy = _rounded(y, ROUNDOFF[dtype], generator, SMALLEST[dtype])
                if name in SUMS and y.numel():
                    accumulator = min(ROUNDOFF[dtype], ROUNDOFF[torch.float32])
                    size = accumulator * SUMS[name](y, *plain_args, **plain_kwargs) ** 0.5
                    noisy = noisy + size * magnitudes[i] * torch.randn(y.shape, generator=generator, device=y.device)
                noisy = torch.where(y.isfinite(), noisy, y)
                y = y.copy_(noisy) if any(y is t for t in tree_leaves(plain_args)) else noisy
            found.append(Rounded(y, dtype, generator))
        return return_and_correct_aliasing(func, args, kwargs, tree_unflatten(found, spec))


def _var_mean(x: Tensor, dim: list[int], unbiased: bool, keepdim: bool) -> tuple[Tensor, Tensor]:
    assert keepdim and not unbiased  # as a layer norm asks
    mean = x.mean(dim, keepdim=True)
    return (x - mean).square().mean(dim, keepdim=True), mean


def _common(floats: list[Tensor]) -> torch.dtype:
    """The type of the result, by torch's rule: tensors without dimensions do not widen others."""
    kinds = [t.dtype for t in floats if t.dim()] or [t.dtype for t in floats]
    common = kinds[0]
    for kind in kinds[1:]:
        common = torch.promote_types(common, kind)
    return common


def _value(t: Tensor) -> Tensor:
    t = t.value if isinstance(t, Rounded) else t
    return t.double() if t.is_floating_point() else t


def _magnitude(t: Tensor) -> Tensor:
    return t.abs().float() if t.is_floating_point() else t


def _rounded(x: Tensor, unit: float, generator: torch.Generator, smallest: float) -> Tensor:
    error = torch.rand(x.shape, generator=generator, device=x.device).mul_(2).sub_(1)
    return x + error * (unit * x.abs() + smallest / 2 * (x != 0))


class Expected(NamedTuple):
    """What a computation should give and how far rounding may take each value: both in float64."""

    exact: Tensor
    spread: Tensor


def expected(function: Callable[..., Any], *args: Any, draws: int | None = None) -> Any:
    """`function(*args)` with an `Expected` for each tensor in its result.

    function: the definition, which runs in the types that it would have; its arguments' numbers are taken as they are.
    draws: how often errors are drawn; by default as often as the spread of few values needs.
    """

    device = next((leaf.device for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), torch.device("cpu"))

    def run(seed: int | None) -> tuple[list[Any], Any]:
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)

        def wrap(t: Tensor) -> Tensor:
            return Rounded(t.detach().double(), t.dtype, generator) if t.is_floating_point() else t

        leaves, spec = tree_flatten(function(*tree_map_only(Tensor, wrap, args)))
        return [t.detach().value if isinstance(t, Rounded) else t for t in leaves], spec

    exact, spec = run(None)
    largest = max((t.numel() for t in exact if _is_float(t)), default=0)
    count = draws or (16 if largest < 2**12 else 8 if largest < 2**18 else 4)
    drawn = [run(seed)[0] for seed in range(count)]
    found = [
        Expected(t, (sum((each[i] - t).square() for each in drawn) / count).sqrt()) if _is_float(t) else t
        for i, t in enumerate(exact)
    ]
    return tree_unflatten(found, spec)


def _is_float(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def resized_exactly(frames: Tensor, size: tuple[int, int], **_: object) -> Tensor:
    """`F.interpolate`, bicubic and antialiased, by exact matrices: torch's own rounds the places of its weights."""
    down, across = (resize_matrix(a, b).to(frames.device) for a, b in zip(frames.shape[2:], size, strict=True))
    return down @ frames @ across.T


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def excess(ours: Tensor, wanted: Expected, units: float = 1.0) -> float:
    """The largest part of the bound that an error takes up: at most 1 where all is well; infinite where ours is not.

    units: how many times as far apart the numbers of `ours` are as round to nearest makes them (2 where a kernel's
        interpreter cuts off).
    """
    exact, spread = wanted
    assert ours.shape == exact.shape, f"{tuple(ours.shape)} where {tuple(exact.shape)} was expected"
    if not ours.numel():
        return 0.0
    error = ours.double() - exact
    if not error.isfinite().all():
        return float("inf")
    whole = rms(spread)
    if not whole:
        return float("inf") if error.any() else 0.0
    each = DEVIATIONS * (spread.square() + whole**2).sqrt()
    together = (2 + 16 / ours.numel() ** 0.5) * whole
    worst = torch.where(error == 0, 0.0, error.abs() / each).max().item()
    return max(worst, rms(error) / together) / units


def check(ours: Any, wanted: Any, units: float = 1.0) -> None:
    """Assert that every tensor of `ours` is what rounding may make of its counterpart in `wanted`."""
    names = list(wanted) if isinstance(wanted, dict) else range(len(wanted))
    assert len(ours) == len(wanted)
    for name in names:
        part = excess(ours[name], wanted[name], units)
        error, spread = rms(ours[name].double() - wanted[name].exact), rms(wanted[name].spread)
        assert part <= 1, f"{name}: {part:.2f} of the bound; error {error:.2e}, rounding {spread:.2e}"
