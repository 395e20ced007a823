"""A TAEHV-class decoder with frozen weights, forward and to the latents, in two kinds of convolutions.

Frames stand in a bank, channels last. An output frame names the frames that it sees, so "the previous frame" is an
index and never a copy; nearest upsampling is a way of reading. Of the forward pass one bit per activation is kept.
A `Plan` says which frames each layer computes, chunk by chunk over time: those that the wanted frames need, once each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vlmteacher.errors import InputError
from vlmteacher.ops.backends import backend, has_avx512_bf16, without_data
from vlmteacher.ops.bits import pack_bits, unpack_bits
from vlmteacher.ops.checks import expect
from vlmteacher.ops.decoder_plan import Layer, Plan
from vlmteacher.ops.patchify import PatchLayout, Rows, shuffle_to_rows, shuffle_to_rows_backward
from vlmteacher.torch_modes import keepable


def pack_signs(x: Tensor) -> Tensor:
    """(..., N) -> (..., ceil(N / 8)) uint8: bit n % 8 of byte n // 8 is set where x > 0."""
    return pack_bits(x > 0)


def conv3x3_reference(
    x: Tensor,
    taps: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: Tensor | None,
    slope: float | None,
    upscale: int,
) -> tuple[Tensor, Tensor]:
    """3x3 convolution (padding 1) with bias, residual, activation and its signs, in plain torch.

    Args:
        x: (F, H, W, C), contiguous: the bank of frames.
        taps: (G, T) int32: the frames of x that output frame g sees, T = 1, or 2 (itself and the previous one); -1 is a
            frame of zeros, which only the last tap may be. A frame stands at most once in a column.
        weight: (N, 3, 3, T * C), contiguous: rows, columns, then the channels of tap 0 before those of tap 1.
        bias: (N,) or None.
        residual, rows: another bank (R, upscale H, upscale W, N), contiguous, and (G,) int32: residual[rows[g]] is
            added before the activation. A memory block adds the input of its first convolution after its third. Both or
            neither.
        slope: of the activation below zero: 0 is ReLU, .2 LeakyReLU; None is no activation.
        upscale: 1, or 2: x is upsampled (nearest) before the convolution, that is read at (row // 2, column // 2).
            A backend may sum the weights that meet the same pixel and take four taps for each output instead of nine.

    Returns:
        y (G, upscale H, upscale W, N) and the signs of what went into the activation, (G, upscale H, upscale W,
        ceil(N / 8)) uint8, see `pack_signs`; with no activation an empty tensor of uint8.
    """
    y = torch.cat([torch.where((t < 0).view(-1, 1, 1, 1), 0, x[t.clamp(min=0).long()]) for t in taps.unbind(1)], -1)
    y = y.repeat_interleave(upscale, 1).repeat_interleave(upscale, 2) if upscale > 1 else y
    y = F.conv2d(y.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), bias, padding=1).permute(0, 2, 3, 1)
    if residual is not None and rows is not None:
        y = y + residual[rows.long()]
    if slope is None:
        return y.contiguous(), torch.empty(0, dtype=torch.uint8, device=x.device)
    return torch.where(y > 0, y, slope * y).contiguous(), pack_signs(y)


def conv3x3_backward_reference(
    grad: Tensor,
    signs: Tensor,
    taps: Tensor,
    frames: int,
    weight: Tensor,
    residual: Tensor | None,
    residual_signs: Tensor | None,
    slope: float | None,
    upscale: int,
) -> Tensor:
    """The gradient of `conv3x3_reference` to x, from that of y, (G, upscale H, upscale W, N), contiguous.

    residual, residual_signs: what comes back through the residual of a memory block, whose bank is this x: the gradient
    (G, H, W, C) of the block's output and the signs of its activation, of the same slope. It is added, masked like
    `grad`, to the frames taps[:, 0]. Both or neither; upscale 1.

    Returns (frames, H, W, C): the sums over every place at which a frame stands in `taps`; zeros where in none. The
    activation's slope is applied to `grad` as it is read. As a frame stands at most once in a column of `taps`, this is
    a convolution too: frame f sees the at most T output frames that saw it, with the weight turned around.
    """
    if slope is not None:
        grad = torch.where(unpack_bits(signs, grad.shape[-1]), grad, slope * grad)
    g, height, width, _ = grad.shape
    channels = weight.shape[-1] // taps.shape[1]
    size = (g, weight.shape[-1], height, width)
    dx = torch.nn.grad.conv2d_input(size, weight.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2), padding=1)
    dx = dx.unflatten(2, (-1, upscale)).unflatten(4, (-1, upscale)).sum((3, 5)).permute(0, 2, 3, 1)
    out = dx.new_zeros(frames, height // upscale, width // upscale, channels)
    for t, part in zip(taps.unbind(1), dx.split(channels, -1), strict=True):
        out.index_add_(0, t[t >= 0].long(), part[t >= 0])
    if residual is None or residual_signs is None:
        return out
    if slope is not None:
        residual = torch.where(unpack_bits(residual_signs, channels), residual, slope * residual)
    return out.index_add_(0, taps[:, 0].long(), residual)


class _Cpp:
    """The C++ backend, which takes packed weights; they are kept beside the weight, since it is frozen."""

    @staticmethod
    def conv3x3(x: Tensor, taps: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        packed = _packed(weight, taps.shape[1], rest[-1], False)
        return torch.ops.vlmteacher_cpp.conv3x3(x, taps, packed, weight.shape[0], *rest)

    @staticmethod
    def conv3x3_backward(grad: Tensor, signs: Tensor, taps: Tensor, frames: int, weight: Tensor, *rest: Any) -> Tensor:
        packed = _packed(weight, taps.shape[1], rest[-1], True)
        channels = weight.shape[-1] // taps.shape[1]
        return torch.ops.vlmteacher_cpp.conv3x3_backward(grad, signs, taps, frames, packed, channels, *rest)


@keepable()
def _packed(weight: Tensor, *how: Any) -> Tensor:
    kept: dict[Any, Tensor] = weight.__dict__.setdefault("packed", {})
    key = (*how, weight._version)
    if key not in kept:
        for old in [k for k in kept if k[-1] != weight._version]:
            del kept[old]
        kept[key] = torch.ops.vlmteacher_cpp.conv3x3_pack(weight, *how)
    return kept[key]


def _fast(x: Tensor) -> Any:
    """The backend for x: a namespace with `conv3x3` and `conv3x3_backward` of the arguments above, or None.

    The C++ one is for AVX-512 with bfloat16; on other processors, and in other dtypes, torch's own convolutions do.
    """
    if x.device.type == "cpu":
        return _Cpp if x.dtype in (torch.float32, torch.bfloat16) and has_avx512_bf16() else None
    return backend(x, "surrogate_decoder")


def conv3x3(
    x: Tensor, taps: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, rows: Tensor | None,
    slope: float | None, upscale: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`conv3x3_reference` by the backend of x's device, with tensors of any strides.

    Raises InputError for shapes, dtypes or devices that do not fit.
    """
    _check(x, taps, upscale)
    (_, height, width, channels), n, like = x.shape, len(weight), (x.dtype, x.device)
    expect("weight", weight, (n, 3, 3, taps.shape[1] * channels), *like)
    if bias is not None:
        expect("bias", bias, (n,), *like)
    if (residual is None) != (rows is None):
        raise InputError("conv3x3 takes a residual with rows, or neither")
    if residual is not None and rows is not None:
        expect("residual", residual, (None, height * upscale, width * upscale, n), *like)
        expect("rows", rows, (len(taps),), torch.int32, x.device)
    run = _forward_operator if without_data(x) else (_fast(x) or _Reference).conv3x3
    return run(x, taps, weight, bias, residual, rows, slope, upscale)


def conv3x3_backward(
    grad: Tensor, signs: Tensor, taps: Tensor, frames: int, weight: Tensor, residual: Tensor | None,
    residual_signs: Tensor | None, slope: float | None, upscale: int,
) -> Tensor:  # fmt: skip
    """`conv3x3_backward_reference` by the backend of grad's device, with tensors of any strides.

    Raises InputError for shapes, dtypes or devices that do not fit.
    """
    _check(grad, taps, upscale)
    (g, height, width, n), like = grad.shape, (grad.dtype, grad.device)
    if g != len(taps) or height % upscale or width % upscale or frames < 0:
        raise InputError(f"a gradient {tuple(grad.shape)} does not fit {len(taps)} frames, upscale {upscale}")
    expect("weight", weight, (n, 3, 3, None), *like)
    channels, rest = divmod(weight.shape[3], taps.shape[1])
    if rest or (residual is not None and upscale != 1):
        raise InputError(f"a weight of {weight.shape[3]} channels, upscale {upscale}: none of a block's first layer")
    if residual is not None:
        expect("residual", residual, (g, height, width, channels), *like)
    if slope is not None:
        expect("signs", signs, (g, height, width, (n + 7) // 8), torch.uint8, grad.device)
        if residual is not None:
            if residual_signs is None:
                raise InputError("a residual behind an activation comes with its signs")
            expect("residual_signs", residual_signs, (g, height, width, (channels + 7) // 8), torch.uint8, grad.device)
    run = _backward_operator if without_data(grad) else (_fast(grad) or _Reference).conv3x3_backward
    return run(grad, signs, taps, frames, weight, residual, residual_signs, slope, upscale)


def _check(x: Tensor, taps: Tensor, upscale: int) -> None:
    if x.dim() != 4 or not x.is_floating_point() or upscale not in (1, 2):
        raise InputError(f"conv3x3 takes floating-point frames (F, H, W, C): {x.dtype} {tuple(x.shape)} by {upscale}")
    expect("taps", taps, (None, None), torch.int32, x.device)
    if taps.shape[1] not in (1, 2):
        raise InputError(f"taps of a frame are 1 or 2, not {taps.shape[1]}")


# The same as operators, for tensors without data, which count what a clip of full size would take.
@torch.library.custom_op("vlmteacher::conv3x3", mutates_args=())
def _forward_operator(
    x: Tensor,
    taps: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: Tensor | None,
    slope: float | None,
    upscale: int,
) -> tuple[Tensor, Tensor]:
    return conv3x3(x, taps, weight, bias, residual, rows, slope, upscale)


@torch.library.custom_op("vlmteacher::conv3x3_backward", mutates_args=())
def _backward_operator(
    grad: Tensor,
    signs: Tensor,
    taps: Tensor,
    frames: int,
    weight: Tensor,
    residual: Tensor | None,
    residual_signs: Tensor | None,
    slope: float | None,
    upscale: int,
) -> Tensor:
    return conv3x3_backward(grad, signs, taps, frames, weight, residual, residual_signs, slope, upscale)


@_forward_operator.register_fake
def _(
    x: Tensor, taps: Tensor, weight: Tensor, bias: Any, residual: Any, rows: Any, slope: float | None, upscale: int
) -> tuple[Tensor, Tensor]:
    n, size = len(weight), (len(taps), x.shape[1] * upscale, x.shape[2] * upscale)
    signs = (0,) if slope is None else (*size, (n + 7) // 8)
    return x.new_empty(*size, n), x.new_empty(signs, dtype=torch.uint8)


@_backward_operator.register_fake
def _(
    grad: Tensor, signs: Tensor, taps: Tensor, frames: int, weight: Tensor, residual: Any, residual_signs: Any,
    slope: float | None, upscale: int,
) -> Tensor:  # fmt: skip
    _, height, width, _ = grad.shape
    return grad.new_empty(frames, height // upscale, width // upscale, weight.shape[-1] // taps.shape[1])


class _Reference:
    conv3x3 = staticmethod(conv3x3_reference)
    conv3x3_backward = staticmethod(conv3x3_backward_reference)


def decode(
    x: Tensor,
    layers: Sequence[Layer],
    plan: Plan,
    patch: int,
    indices: Sequence[int],
    layout: PatchLayout | None = None,
) -> Tensor:
    """Latents through all layers, pixel shuffle and clamp.

    Args:
        x: (T, h, w, C), contiguous. Differentiable, once.
        layers: of x's dtype and device; frozen.
        plan: from `Plan.make`, on x's device.
        patch: side of the pixel shuffle.
        indices: K of the plan's frames, in any order, also repeated; all of them occur.
        layout: of the patch rows that are wanted in place of frames.

    Returns:
        (K, 3, H, W) in [0, 1]; with a layout the same as `patchify` makes of them, which never are: the last layer
        writes the rows, and its backward reads their gradient.
    """
    scale = patch
    for layer in layers:
        scale *= layer.upscale
    height, width = x.shape[1] * scale, x.shape[2] * scale
    if layout is None:
        rows = Rows(height, width, 1, 1, [0.0] * 3, [1.0] * 3)
        shape, dtype = (len(indices), 3 * height * width), x.dtype
    else:
        rows = Rows(layout.patch, layout.patch, layout.temporal_patch, layout.merge, [*layout.mean], [*layout.std])
        shape, dtype = layout.rows(len(indices), height, width), layout.dtype
    slots = plan.slots(indices, rows.temporal_patch)
    made = _Decode.apply(x, layers, plan, patch, slots, rows, shape, dtype)
    return made.view(-1, 3, height, width) if layout is None else made


class _Decode(torch.autograd.Function):
    """Keeps the signs of every activation and the bits of the clamp; goes back through the chunks in reverse."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layers: Sequence[Layer],
        plan: Plan,
        patch: int,
        slots: Tensor,
        layout: Rows,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> Tensor:
        keep = ctx.needs_input_grad[0]
        kept: list[Tensor] = []
        latest: dict[int, Tensor] = {}  # by layer, the latest frame that its bank has held
        added = {layer.residual for layer in layers}
        out = x.new_empty(shape, dtype=dtype)
        places = slots.split([len(f) for f in plan.frames])
        for first, steps, at in zip(plan.first, plan.steps, places, strict=True):
            y = x[_where(first, x.device)]
            blocks: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, the bank and its rows that a residual will add
            for i, (layer, step) in enumerate(zip(layers, steps, strict=True)):
                bank = torch.cat([latest[i], y]) if step.carry else y
                if len(bank) and steps is not plan.steps[-1]:
                    latest[i] = bank[step.latest : step.latest + 1].clone()  # a view would keep the bank alive
                if i in added:
                    blocks[i] = bank, step.taps[0][:, 0].contiguous()
                residual, rows = (None, None) if layer.residual is None else blocks.pop(layer.residual)
                parts = []
                for taps, weight in zip(step.taps, layer.weights, strict=True):
                    if len(taps):
                        rest = (weight, layer.bias, residual, rows, layer.slope, layer.upscale)
                        y, signs = conv3x3(bank, taps, *rest)
                        parts.append(y)
                        if keep and layer.slope is not None:
                            kept.append(signs)
                if len(parts) != 1:
                    _, h, w, _ = bank.shape
                    none = bank.new_empty(0, h * layer.upscale, w * layer.upscale, layer.channels[1])
                    y = torch.cat(parts or [none])
                del bank, residual, parts
            inside = shuffle_to_rows(y, at, out, patch, layout)
            if keep:
                kept.append(inside)
            size = y.shape[1], y.shape[2]
            del y, inside
        ctx.layers, ctx.plan, ctx.patch, ctx.shape, ctx.dtype = layers, plan, patch, x.shape, x.dtype
        ctx.places, ctx.layout, ctx.size = places, layout, size
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        layers, plan, kept = ctx.layers, ctx.plan, list(ctx.saved_tensors)
        none = torch.empty(0, dtype=torch.uint8, device=grad.device)
        dx, grad = grad.new_zeros(ctx.shape, dtype=ctx.dtype), grad.contiguous()
        late: dict[int, Tensor] = {}  # by layer, the gradient of `latest` from the chunks that come after
        chunks = list(zip(plan.first, plan.steps, ctx.places, strict=True))
        for first, steps, at in reversed(chunks):
            dy = shuffle_to_rows_backward(grad, at, kept.pop(), ctx.size, ctx.patch, ctx.layout, ctx.dtype)
            through: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, what a residual brings to its bank
            for i in reversed(range(len(layers))):
                layer, step = layers[i], steps[i]
                used = [s for s, taps in enumerate(step.taps) if len(taps)]
                signs = {s: none if layer.slope is None else kept.pop() for s in reversed(used)}
                if layer.residual is not None and used:
                    through[layer.residual] = dy, signs[0]
                bank = step.carry + (len(first) if i == 0 else sum(map(len, steps[i - 1].taps)))
                _, h, w, _ = dy.shape
                size = (bank, h // layer.upscale, w // layer.upscale, layer.channels[0])
                found, begin = None, 0
                for s in used:
                    taps, begin, end = step.taps[s], begin + len(step.taps[s]), begin + len(step.taps[s])
                    more = through.pop(i, (None, None))
                    rest = (bank, layer.weights[s], *more, layer.slope, layer.upscale)
                    each = conv3x3_backward(dy[end - len(taps) : end], signs[s], taps, *rest)
                    found = each if found is None else found.add_(each)
                if found is None:
                    found = dy.new_zeros(size)  # no new frame in this chunk
                if bank and i in late:
                    found[step.latest] += late.pop(i)[0]
                if step.carry:
                    late[i] = found[:1].clone()
                dy = found[1:] if step.carry else found
                del found
            dx[_where(first, dx.device)] = dy
        return dx, *[None] * 7


def _where(frames: Sequence[int], device: torch.device) -> Any:
    """An index of rising frames: a slice where they follow each other."""
    if not frames:
        return slice(0, 0)
    return slice(frames[0], frames[-1] + 1) if frames[-1] - frames[0] == len(frames) - 1 else indices(frames, device)


def indices(places: Sequence[int], device: torch.device) -> Tensor:
    """An index on the device, copied there at the first call only."""
    return _indices(tuple(places), device)


@functools.lru_cache(maxsize=64)
@keepable()
def _indices(places: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(places, device=device)
