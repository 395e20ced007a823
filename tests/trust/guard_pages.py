"""Operators on tensors that end, or begin, at a page which may not be touched: strided, expanded, transposed,
misaligned and empty views, forward and backward, against the definitions in float64 on dense copies; and calls with an
argument spoiled, which must be refused or computed, and never read or write elsewhere.

A process of its own, for a mistake ends it: `python -m tests.trust.guard_pages SEED CASES` says which, before each.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import math
import mmap
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.processors import reachable, used_as
from vlmteacher.ops import (
    ada_norm,
    attention,
    elementwise,
    lora_linear,
    patchify,
    qk_norm_rope,
    rms_norm,
    surrogate_decoder,
    swiglu,
)
from vlmteacher.ops.attention import Spans
from vlmteacher.ops.backends import cpp_status, has_avx512_bf16
from vlmteacher.ops.manifest import OPERATORS

PAGE = mmap.PAGESIZE
# C++ operators that this processor may be too old for
AVX512 = {
    name
    for operator in OPERATORS.values()
    if operator.avx512
    for schema in operator.schemas
    for name in (schema, f"{schema}_backward", *operator.cpp_helpers)
}
# Errors of computing in a dtype, by far: what is looked for is another number's value.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def guarded(nbytes: int, at_end: bool) -> Tensor:
    """(nbytes,) uint8 between two pages that may not be touched, right at one of them."""
    size = max(1, -(-nbytes // PAGE)) * PAGE
    area = mmap.mmap(-1, size + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for guard in (start, start + PAGE + size):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), PAGE, 0) == 0  # PROT_NONE
    first = PAGE + (size - nbytes if at_end else 0)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    return whole[first : first + nbytes]


class Draw:
    """A random case; `seen`: how the views lay."""

    def __init__(self, seed: int, seen: Counter[str]) -> None:
        self.random, self.seen = random.Random(seed), seen
        self.generator = torch.Generator().manual_seed(seed)

    def size(self, most: int, least: int = 1) -> int:
        """Small ones mostly, and rarely none."""
        if least == 1 and self.random.random() < 0.03:
            return 0
        return self.random.choice((least, self.random.randint(least, most)))

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def view(self, values: Tensor, expand: bool = True) -> Tensor:
        """The values (but where a dimension is expanded) in a random layout at the end or the beginning of its pages.

        Bytes between the elements make NaNs, or integers that are no index.
        """
        kind = self.random.choice(("dense", "strided", "transposed", "expanded", "misaligned"))
        if kind == "expanded" and not (expand and values.dim() and values.numel()):
            kind = "strided"
        at_end = self.random.random() < 0.7
        order = list(range(values.dim()))
        if kind == "transposed":
            self.random.shuffle(order)
        expanded = self.random.choice(order) if kind == "expanded" else None
        strides, step = [0] * values.dim(), 1
        for i in reversed(order):
            if kind == "strided" and self.random.random() < 0.5:
                step *= self.random.choice((2, 3))
            if i == expanded:
                continue
            strides[i] = step
            step *= max(values.shape[i], 1)
        offset = self.random.randint(1, 3) if kind == "misaligned" else 0
        last = sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True)) if values.numel() else -1
        memory = guarded((offset + last + 1) * values.itemsize, at_end).fill_(0x3F)
        if values.is_floating_point():
            memory.view(values.dtype).fill_(math.nan)
        view = memory.view(values.dtype).as_strided(values.shape, strides, memory.storage_offset() // values.itemsize)
        if offset:
            view = view.as_strided(view.shape, strides, view.storage_offset() + offset)
        if expanded is None:
            view.copy_(values)
        else:
            view.narrow(expanded, 0, 1).copy_(values.narrow(expanded, 0, 1))
        self.seen["empty" if not values.numel() else kind] += 1
        return view

    def views(self, *shapes: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        return [self.view(self.normal(*shape, dtype=dtype)) for shape in shapes]


def near(name: str, found: Tensor, exact: Tensor, *others: Tensor) -> None:
    """Within what is lost in the coarsest dtype of `found` and the others."""
    assert found.shape == exact.shape, f"{name}: {tuple(found.shape)}, not {tuple(exact.shape)}"
    loss = max(TOLERANCE[t.dtype] for t in (found, *others))
    error, allowed = (found.double() - exact).norm(), loss * (exact.norm() + exact.numel() ** 0.5)
    assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"


def copies(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().clone(memory_format=torch.contiguous_format).to(dtype or t.dtype) for t in tensors]


def differentiate(
    draw: Draw,
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
) -> None:
    """Outputs and gradients of some inputs (all, or a random part of them) against the definition in float64."""
    needs = [draw.random.random() < 0.8 for _ in inputs]
    given = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
    exact_given = [t.requires_grad_(need) for t, need in zip(copies(inputs, torch.float64), needs, strict=True)]
    outputs, exact = ours(*given), reference(*exact_given)
    outputs, exact = ([x] if isinstance(x, Tensor) else list(x) for x in (outputs, exact))
    for i, (a, b) in enumerate(zip(outputs, exact, strict=True)):
        near(f"output {i}", a.detach(), b.detach(), *inputs)
    leaves = [t for t in given if t.requires_grad]
    used = [i for i, out in enumerate(exact) if out.requires_grad and draw.random.random() < 0.9]
    if not leaves or not used:
        return
    grads = [draw.view(draw.normal(*outputs[i].shape, dtype=outputs[i].dtype)) for i in used]
    found = torch.autograd.grad([outputs[i] for i in used], leaves, grads, allow_unused=True)
    exact_leaves = [t for t in exact_given if t.requires_grad]
    expected = torch.autograd.grad(
        [exact[i] for i in used], exact_leaves, copies(grads, torch.float64), allow_unused=True
    )
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        a, b = (torch.zeros_like(leaf) if x is None else x for x, leaf in ((a, leaves[i]), (b, exact_leaves[i])))
        near(f"gradient {i}", a, b, *inputs, *outputs)


ALL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float32, torch.bfloat16)


def fuzz_ada_norm(draw: Draw) -> None:
    dtype = draw.random.choice(ALL)
    batch, tokens, width = draw.size(3), draw.size(9), draw.size(70)
    first, rows = draw.random.randint(0, tokens), draw.random.choice((1, 2))
    x, y = draw.views(*[(batch, tokens, width)] * 2, dtype=dtype)
    table = (draw.random.choice((1, batch)), rows, width)
    wide = torch.promote_types(dtype, torch.float32)
    gate, weight, bias = draw.views(*[table] * 3, dtype=wide)
    gate64, weight64, bias64 = copies([gate, weight, bias], torch.float64)
    gated = draw.random.random() < 0.8
    gate, gate64 = (gate, gate64) if gated else (None, None)
    define = ada_norm.ada_norm_reference
    kind = draw.random.choice(("norm", "residual", "both"))
    if kind == "norm":
        differentiate(
            draw,
            lambda x: ada_norm.ada_norm(x, weight, bias, first),
            lambda x: define(x, None, None, weight64, bias64, first, 1e-6)[0],
            [x],
        )
    elif kind == "residual":
        differentiate(
            draw,
            lambda x, y: ada_norm.gated_residual(x, y, gate, first),
            lambda x, y: define(x, y, gate64, None, None, first, 0.0)[0],
            [x, y],
        )
    else:
        differentiate(
            draw,
            lambda x, y: ada_norm.residual_ada_norm(x, y, gate, weight, bias, first),
            lambda x, y: define(x, y, gate64, weight64, bias64, first, 1e-6),
            [x, y],
        )


def fuzz_qk_norm_rope(draw: Draw) -> None:
    dtype = draw.random.choice(ALL)
    heads, pairs = draw.size(4, 2), draw.size(20, 2)
    batch, tokens, width = draw.size(3), draw.size(9), heads * pairs * 2
    xs = draw.views(*[(batch, tokens, width)] * draw.random.choice((1, 2)), dtype=dtype)
    weights = draw.views(*[(width,)] * len(xs), dtype=draw.random.choice((dtype, torch.float32)))
    rope, rope64 = None, (None, None)
    if draw.random.random() < 0.8:
        rope = tuple(draw.views(*[(tokens, pairs)] * 2, dtype=torch.promote_types(dtype, torch.float32)))
        rope64 = copies(rope, torch.float64)
    weights64 = copies([w.to(dtype) for w in weights], torch.float64)
    differentiate(
        draw,
        lambda *xs: qk_norm_rope.qk_norm_rope(xs, weights, rope, heads),
        lambda *xs: qk_norm_rope.qk_norm_rope_reference(xs, weights64, *rope64, heads, 1e-6),
        xs,
    )


def fuzz_lora_linear(draw: Draw) -> None:
    dtype = draw.random.choice(ALL)
    factors = torch.float32 if dtype == torch.bfloat16 and draw.random.random() < 0.5 else dtype
    layers, rows, k = draw.random.choice((1, 1, 2, 3)), draw.size(70), draw.size(80, 2)
    x = draw.views((draw.size(3, 2), rows, k) if draw.random.random() < 0.5 else (rows, k), dtype=dtype)[0]
    sizes = [(draw.size(70, 2), draw.size(20, 2)) for _ in range(layers)]
    weights = draw.views(*[(n, k) for n, _ in sizes], dtype=dtype)
    biases = draw.views(*[(n,) for n, _ in sizes], dtype=dtype) if draw.random.random() < 0.5 else []
    a = draw.views(*[(rank, k) for _, rank in sizes], dtype=factors)
    b = draw.views(*[(n, rank) for n, rank in sizes], dtype=factors)
    scaling = [draw.random.choice((1.0, 0.5, 2.0)) for _ in sizes]
    weights64 = copies(weights, torch.float64)

    def layers_of(linear: Callable[..., Tensor], x: Tensor, weights: Sequence[Tensor], rest: Sequence[Tensor]) -> Any:
        return [
            linear(x, weights[i], rest[2 * layers + i] if biases else None, rest[i], rest[layers + i], scaling[i])
            for i in range(layers)
        ]

    def ours(x: Tensor, *rest: Tensor) -> Any:
        return lora_linear.lora_linear_group(
            x, weights, rest[2 * layers :] or None, rest[:layers], rest[layers : 2 * layers], scaling
        )

    differentiate(
        draw,
        ours,
        lambda x, *rest: layers_of(lora_linear.lora_linear_reference, x, weights64, rest),
        [x, *a, *b, *biases],
    )


def fuzz_attention(draw: Draw) -> None:
    dtype = draw.random.choice(HALVES)
    batch, queries, keys = draw.size(2), draw.size(40), draw.size(70, 2)
    key_heads, dim = draw.size(2, 1) or 1, draw.random.choice((2, 8, 18, 34, 64))
    heads = key_heads * draw.random.choice((1, 2))
    q = draw.views((batch, queries, heads, dim), dtype=dtype)[0]
    k, v = draw.views(*[(batch, keys, key_heads, dim)] * 2, dtype=dtype)
    spans = None
    if draw.random.random() < 0.6:
        a = [draw.random.randint(1, keys) for _ in range(queries)]
        bc = [sorted(draw.random.randint(0, keys) for _ in range(2)) for _ in range(queries)]
        table = torch.tensor([[a, *bc] for a, bc in zip(a, bc, strict=True)], dtype=torch.int32).view(-1, 3)
        place = guarded(table.nbytes, True).view(torch.int32).view(-1, 3) if len(table) else table
        spans = Spans(place.copy_(table), keys)
    differentiate(
        draw,
        lambda q, k, v: attention.attention(q, k, v, spans),
        lambda q, k, v: attention.attention_reference(q, k, v, spans),
        [q, k, v],
    )


def fuzz_rotate(draw: Draw) -> None:
    dtype = draw.random.choice(HALVES)
    tokens, heads, half = draw.size(9), draw.size(4), draw.size(40)
    x = draw.views((*draw.random.choice(((), (2,))), tokens, heads, 2 * half), dtype=dtype)
    cos, sin = draw.views(*[(tokens, 1, half)] * 2, dtype=torch.float32)

    def define(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        c, s = copies([cos, sin], torch.float64)
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    differentiate(draw, lambda x: elementwise.rotate(x, cos, sin), define, x)


def fuzz_gelu(draw: Draw) -> None:
    shape = [draw.size(9) for _ in range(draw.random.randint(0, 3))] + [draw.size(70)]
    x = draw.views(shape, dtype=draw.random.choice(HALVES))
    differentiate(draw, elementwise.gelu, lambda x: torch.nn.functional.gelu(x, approximate="tanh"), x)


def fuzz_rms_norm(draw: Draw) -> None:
    dtype = draw.random.choice(ALL[1:])
    width = draw.size(70)
    shape = [draw.size(9) for _ in range(draw.random.randint(0, 3))] + [width]
    (x,), (weight,) = draw.views(shape, dtype=dtype), draw.views((width,), dtype=dtype)
    (weight64,) = copies([weight], torch.float64)

    def define(x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight64

    differentiate(draw, lambda x: rms_norm.rms_norm(x, weight), define, [x])


def fuzz_swiglu(draw: Draw) -> None:
    shape = [draw.size(9) for _ in range(draw.random.randint(0, 3))] + [draw.size(70)]
    inputs = draw.views(shape, shape, dtype=draw.random.choice(ALL))
    differentiate(draw, swiglu.swiglu, lambda gate, up: torch.nn.functional.silu(gate) * up, inputs)


def fuzz_patchify(draw: Draw) -> None:
    dtype = draw.random.choice(ALL)
    out = dtype if dtype == torch.float64 else draw.random.choice(ALL[1:])
    patch, merge, temporal = (draw.random.randint(1, most) for most in (5, 2, 3))
    size = [patch * merge * draw.random.randint(1, 3) for _ in range(2)]
    resized = draw.random.random() < 0.5
    shape = [draw.random.randint(1, 23) for _ in range(2)] if resized else size
    frames = draw.views((draw.size(5, 2), 3, *shape), dtype=dtype)[0]
    mean, std = ([draw.random.uniform(0.2, 0.8) for _ in range(3)] for _ in range(2))
    how = (patch, temporal, merge, mean, std, size)

    def define(x: Tensor) -> Tensor:
        # channels last: of other frames torch 2.13 makes wrong ones that are a pixel wide
        return patchify.patchify_reference(x.to(memory_format=torch.channels_last), *how, torch.float64)

    differentiate(draw, lambda x: patchify.patchify(x, *how, out), define, [frames])


def fuzz_conv3x3(draw: Draw) -> None:
    """As any processor, every second time as one whose vendor convolves (csrc/surrogate_decoder/vendor.h)."""
    processor = draw.random.choice(reachable())
    if "amx" in reachable() and draw.random.random() < 0.5:
        processor = "amx"
    with used_as(processor):
        convolutions(draw, torch.bfloat16 if processor == "amx" else draw.random.choice(HALVES))


def convolutions(draw: Draw, dtype: torch.dtype) -> None:
    seen, upscale = draw.random.choice((1, 2)), draw.random.choice((1, 1, 2))
    frames, height, width = (draw.random.randint(1, most) for most in (4, 7, 19))  # torch convolves no empty ones
    channels, n = draw.size(40, 2), draw.size(40, 2)
    g = draw.random.randint(0, frames)
    slope = draw.random.choice((None, 0.0, 0.2))
    columns = [draw.random.sample(range(frames), g) for _ in range(seen)]
    table = torch.tensor(columns, dtype=torch.int32).view(seen, g).T
    if seen == 2 and g:
        table = torch.where(torch.rand(g, 2, generator=draw.generator) < torch.tensor([0.0, 0.3]), -1, table)
    taps = draw.view(table.int(), expand=False)
    x = draw.views((frames, height, width, channels), dtype=dtype)[0]
    weight = draw.view(draw.normal(n, 3, 3, seen * channels, dtype=dtype) / (9 * seen * channels) ** 0.5)
    bias = draw.views((n,), dtype=dtype)[0] if draw.random.random() < 0.7 else None
    size = (height * upscale, width * upscale)
    residual = rows = None
    if draw.random.random() < 0.5:
        residual = draw.views((3, *size, n), dtype=dtype)[0]
        rows = draw.view(torch.randint(0, 3, (g,), generator=draw.generator, dtype=torch.int32))
    wide = [None if t is None else copies([t], torch.float64)[0] for t in (x, weight, bias, residual)]
    indices = [None if t is None else copies([t])[0] for t in (taps, rows)]
    y, signs = surrogate_decoder.conv3x3(x, taps, weight, bias, residual, rows, slope, upscale)
    exact, _ = surrogate_decoder.conv3x3_reference(wide[0], indices[0], *wide[1:], indices[1], slope, upscale)
    near("y", y, exact)
    assert signs.shape == ((g, *size, (n + 7) // 8) if slope is not None else (0,))
    grad = draw.views((g, *size, n), dtype=dtype)[0]
    signs = draw.view(signs)
    through = through_signs = None
    if upscale == 1 and draw.random.random() < 0.5:
        through = draw.views((g, height, width, channels), dtype=dtype)[0]
        shape = (g, height, width, (channels + 7) // 8)
        through_signs = draw.view(torch.randint(0, 256, shape, generator=draw.generator).to(torch.uint8))
    dx = surrogate_decoder.conv3x3_backward(grad, signs, taps, frames, weight, through, through_signs, slope, upscale)
    dense = [None if t is None else copies([t])[0] for t in (signs, through_signs)]
    wide = [None if t is None else copies([t], torch.float64)[0] for t in (grad, weight, through)]
    exact = surrogate_decoder.conv3x3_backward_reference(
        wide[0], dense[0], indices[0], frames, wide[1], wide[2], dense[1], slope, upscale
    )
    near("dx", dx, exact)


def fuzz_shuffle_to_rows(draw: Draw) -> None:
    dtype = draw.random.choice(ALL)
    out = dtype if dtype == torch.float64 else draw.random.choice(ALL[1:])
    upscale, merge, temporal = (draw.random.randint(1, most) for most in (3, 2, 3))
    high, wide = (upscale * draw.random.randint(1, 3) for _ in range(2))
    blocks = [draw.random.randint(1, 3) for _ in range(2)]
    height, width = high * merge * blocks[0] // upscale, wide * merge * blocks[1] // upscale
    pairs, g, repeats = draw.random.randint(1, 3), draw.random.randint(0, 3), draw.random.randint(1, 2)
    layout = patchify.Rows(high, wide, temporal, merge, [0.4, 0.5, 0.6], [0.3, 0.2, 0.5])
    places = draw.random.sample(range(pairs * temporal), min(g * repeats, pairs * temporal))
    places = sorted(places) + [-1] * (g * repeats - len(places))
    slots = draw.view(torch.tensor(places, dtype=torch.int32).view(g, repeats), expand=False)
    y = draw.view(draw.normal(g, height, width, 3 * upscale**2, dtype=dtype))
    shape = (pairs * math.prod(blocks) * merge**2, 3 * temporal * high * wide)
    rows = guarded(math.prod(shape) * out.itemsize, draw.random.random() < 0.7).view(out).view(shape).zero_()
    exact = torch.zeros(shape, dtype=torch.float64)
    inside = patchify.shuffle_to_rows(y, slots, rows, upscale, layout)
    (dense,) = copies([slots])
    bits = patchify.shuffle_to_rows_reference(copies([y], torch.float64)[0], dense, exact, upscale, layout)
    near("rows", rows, exact)
    assert torch.equal(inside, bits)
    grad, inside = draw.views(shape, dtype=out)[0], draw.view(inside)
    dy = patchify.shuffle_to_rows_backward(grad, slots, inside, (height, width), upscale, layout, dtype)
    exact_dy = patchify.shuffle_to_rows_backward_reference(
        copies([grad], torch.float64)[0], dense, copies([inside])[0], (height, width), upscale, layout, torch.float64
    )
    near("dy", dy, exact_dy)


FUZZ: dict[str, Callable[[Draw], None]] = {
    schema: globals()[f"fuzz_{schema}"] for operator in OPERATORS.values() for schema in operator.schemas
}


class Recorded:
    """A C++ operator that keeps the arguments of its latest calls."""

    def __init__(self, name: str, operator: Any) -> None:
        self.name, self.operator, self.calls, self.count = name, operator, [], 0

    def __call__(self, *args: Any) -> Any:
        self.calls, self.count = [*self.calls[-3:], args], self.count + 1
        return self.operator(*args)


def cpp_operators() -> set[str]:
    """The names of all that computes."""
    names = torch._C._dispatch_get_all_op_names()
    return {n.partition("::")[2] for n in names if n.startswith("vlmteacher_cpp::")} - {"avx512_bf16"}


def spoiled(draw: Draw, value: Any) -> Any:
    """An argument of another size, dtype, value or number."""
    choose = draw.random.choice
    if isinstance(value, Tensor):
        ways = ["dtype", "none", "dim"] + ["shorter", "longer"] * (value.dim() > 0)
        how = choose([*ways, "values"] if not value.is_floating_point() else ways)
        if how == "none":
            return None
        if how == "dtype":
            return draw.view(value.to(choose([*ALL, torch.int32, torch.uint8])))
        if how == "dim":
            return draw.view(value.flatten() if value.dim() != 1 else value[None])
        if how == "values":
            return draw.view((value.long() + choose((-3, 1, 100, 10**8))).clamp(-(2**31), 2**31 - 1).to(value.dtype))
        axis, n = choose(range(value.dim())), 0
        if how == "shorter":
            n = max(0, value.shape[axis] - choose((1, 1, 7)))
            return draw.view(value.narrow(axis, 0, n))
        return draw.view(torch.cat([value, value], axis))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return choose((-1, 0, 1, 2, 3, 5, value + 1))
    if isinstance(value, list | tuple):
        if not value:
            return value
        i = choose(range(len(value)))
        return choose((value[:-1], [*value, value[-1]], [*value[:i], spoiled(draw, value[i]), *value[i + 1 :]]))
    return value


def spoil(draw: Draw, operator: Recorded) -> str:
    """Call it once more with an argument spoiled; what came of it."""
    args = list(draw.random.choice(operator.calls))
    i = draw.random.randrange(len(args))
    args[i] = spoiled(draw, args[i])
    try:
        operator.operator(*args)
    except (RuntimeError, TypeError, ValueError) as error:
        text = str(error)
        assert "API call failed" not in text, text
        return "refused"
    return "computed"


def main(seed: int, cases: int) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    recorded = {}
    if cpp_status()[0]:
        for name in cpp_operators():
            recorded[name] = Recorded(name, getattr(torch.ops.vlmteacher_cpp, name))
            setattr(torch.ops.vlmteacher_cpp, name, recorded[name])
    seen: Counter[str] = Counter()
    for case in range(cases):
        name = list(FUZZ)[case % len(FUZZ)]
        print(f"case {seed + case}: {name}", flush=True)
        draw = Draw(seed + case, seen)
        FUZZ[name](draw)
        for operator in recorded.values():
            if operator.calls and draw.random.random() < 0.5:
                print(f"  spoiled {operator.name}", flush=True)
                seen[spoil(draw, operator)] += 1
    untried = {name for name, operator in recorded.items() if not operator.count}
    print(json.dumps({"seen": seen, "untried": sorted(untried - (set() if has_avx512_bf16() else AVX512))}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
