"""The surrogate decoder: a TAEHV-class network with frozen weights, differentiable with respect to its latents.

Every layer is one kind of 3x3 convolution. Its input frames are in a bank, channels last, and an output frame lists the
indices of its input frames, so that the previous frame is never copied; nearest upsampling happens at reading. For the
backward pass one bit per activation is kept. A `Plan` lists the frames that each layer computes, chunk by chunk.
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
from vlmteacher.ops import decoder_cpu
from vlmteacher.ops.backends import backend, cpp_status, without_data
from vlmteacher.ops.bits import pack_bits, unpack_bits
from vlmteacher.ops.checks import expect
from vlmteacher.ops.decoder_plan import Layer, Plan
from vlmteacher.ops.patchify import PatchLayout, Rows, shuffle_to_rows, shuffle_to_rows_backward
from vlmteacher.ops.processors import in_use, is_own
from vlmteacher.torch_modes import keepable


def pack_signs(x: Tensor) -> Tensor:
    """Pack (..., N) into (..., ceil(N / 8)) uint8: bit n % 8 of byte n // 8 is set if x[..., n] > 0."""
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
        x: (F, H, W, C), contiguous: the bank of input frames.
        taps: (G, T) int32: the indices in x of output frame g's T input frames, 1 or 2 (the frame and the previous
            one). -1 is a frame of zeros, allowed only in the last column. A column has no index twice.
        weight: (N, 3, 3, T * C), contiguous: rows, columns, then the channels of tap 0 before those of tap 1.
        bias: (N,) or None.
        residual, rows: another bank (R, upscale H, upscale W, N), contiguous, and (G,) int32: residual[rows[g]] is
            added before the activation. (A memory block adds its first convolution's input after its third one.) Both
            or neither.
        slope: slope of the activation below zero: 0 is ReLU, 0.2 LeakyReLU; None: no activation.
        upscale: 1 or 2: x is upsampled (nearest) before the convolution, that is, read at (row // 2, column // 2). A
            backend may sum the weights that meet the same pixel, and so compute four taps per output instead of nine.

    Returns:
        y (G, upscale H, upscale W, N), and the signs (`pack_signs`) of the activation's input, (G, upscale H,
        upscale W, ceil(N / 8)) uint8, or an empty uint8 tensor without activation.
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
    """The gradient of `conv3x3_reference` with respect to x, from y's gradient `grad` (G, upscale H, upscale W, N).

    Args:
        grad: contiguous; the activation's slope is applied to it on reading.
        signs, taps, weight, slope, upscale: of the forward pass.
        frames: number F of frames in x.
        residual, residual_signs: for the first convolution of a memory block, whose x is also the block's residual: the
            gradient (G, H, W, C) of the block's output and the signs of its activation, of the same slope. Masked like
            `grad`, it is added to the frames taps[:, 0]. Both or neither; upscale is 1 then.

    Returns:
        (frames, H, W, C): for each frame the sum over its occurrences in `taps`. This is a convolution too, with the
        weight reversed: as no column of `taps` repeats a frame, it has at most T terms per frame.
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


def _fast(x: Tensor, weight: Tensor, rows: float) -> Any:
    """The backend for x: a namespace with `conv3x3` and `conv3x3_backward`, or None for torch's convolutions.

    On CPUs `ops/processors.py` says whose kernels: ours for float32 and bfloat16 from AVX2 on, the vendor's where there
    is AMX but no tiles for us.
    """
    if x.device.type == "cpu":
        if not cpp_status()[0]:
            return None
        if is_own("surrogate_decoder", x.dtype):
            return decoder_cpu.Cpp
        return decoder_cpu.Vendor if x.dtype == torch.bfloat16 and in_use() == "amx" else None
    return backend(x, "surrogate_decoder", [weight], rows)


def _rows(pixels: int, upscale: int) -> float:
    """The rows (N, 3, 3, C) that a weight is multiplied by: four of nine taps where the image is upsampled."""
    return pixels * (4 / 9 if upscale == 2 else 1)


def conv3x3(
    x: Tensor, taps: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, rows: Tensor | None,
    slope: float | None, upscale: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`conv3x3_reference` on the backend of x's device; the tensors may have any strides.

    Raises InputError: shapes, dtypes or devices that do not fit.
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
    work = weight, _rows(len(taps) * height * width * upscale**2, upscale)
    run = _forward_operator if without_data(x) else (_fast(x, *work) or _Reference).conv3x3
    return run(x, taps, weight, bias, residual, rows, slope, upscale)


def conv3x3_backward(
    grad: Tensor, signs: Tensor, taps: Tensor, frames: int, weight: Tensor, residual: Tensor | None,
    residual_signs: Tensor | None, slope: float | None, upscale: int,
) -> Tensor:  # fmt: skip
    """`conv3x3_backward_reference` on the backend of grad's device; the tensors may have any strides.

    Raises InputError: shapes, dtypes or devices that do not fit.
    """
    _check(grad, taps, upscale)
    (g, height, width, n), like = grad.shape, (grad.dtype, grad.device)
    if g != len(taps) or height % upscale or width % upscale or frames < 0:
        raise InputError(f"a gradient {tuple(grad.shape)} does not fit {len(taps)} frames, upscale {upscale}")
    expect("weight", weight, (n, 3, 3, None), *like)
    channels, rest = divmod(weight.shape[3], taps.shape[1])
    if rest or (residual is not None and upscale != 1):
        raise InputError(f"a weight of {weight.shape[3]} channels, upscale {upscale}: not a block's first layer")
    if residual is not None:
        expect("residual", residual, (g, height, width, channels), *like)
    if slope is not None:
        expect("signs", signs, (g, height, width, (n + 7) // 8), torch.uint8, grad.device)
        if residual is not None:
            if residual_signs is None:
                raise InputError("a residual behind an activation comes with its signs")
            expect("residual_signs", residual_signs, (g, height, width, (channels + 7) // 8), torch.uint8, grad.device)
    work = weight, _rows(g * height * width, upscale)
    run = _backward_operator if without_data(grad) else (_fast(grad, *work) or _Reference).conv3x3_backward
    return run(grad, signs, taps, frames, weight, residual, residual_signs, slope, upscale)


def _check(x: Tensor, taps: Tensor, upscale: int) -> None:
    if x.dim() != 4 or not x.is_floating_point() or upscale not in (1, 2):
        raise InputError(f"conv3x3 takes floating-point frames (F, H, W, C): {x.dtype} {tuple(x.shape)} by {upscale}")
    expect("taps", taps, (None, None), torch.int32, x.device)
    if taps.shape[1] not in (1, 2):
        raise InputError(f"a frame has 1 or 2 taps, not {taps.shape[1]}")


# Registered with torch.library for tensors without data, by which the cost of a full-size clip is counted.
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
    """Decode latents: all layers, pixel shuffle and clamp.

    Args:
        x: (T, h, w, C), contiguous. Differentiable once.
        layers: the layer table, frozen, of x's dtype and device.
        plan: from `Plan.make`, on x's device.
        patch: side of the pixel shuffle.
        indices: the K output frames, in any order, with repetitions; every frame of the plan occurs.
        layout: returns patch rows of this layout instead of frames.

    Returns:
        (K, 3, H, W) in [0, 1]. With a layout the rows that `patchify` would make of these frames, written by the last
        layer without a tensor of frames.
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
    out = _Decode.apply(x, layers, plan, patch, slots, rows, shape, dtype)
    return out.view(-1, 3, height, width) if layout is None else out


class _Decode(torch.autograd.Function):
    """Saves the signs of every activation and the bits of the clamp; the backward takes the chunks in reverse."""

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
        latest: dict[int, Tensor] = {}  # for each layer the latest frame that its bank held
        added = {layer.residual for layer in layers}
        out = x.new_empty(shape, dtype=dtype)
        places = slots.split([len(f) for f in plan.frames])
        for first, steps, at in zip(plan.first, plan.steps, places, strict=True):
            y = x[_where(first, x.device)]
            blocks: dict[int, tuple[Tensor, Tensor]] = {}  # for each layer the bank, and its rows that a residual adds
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
        late: dict[int, Tensor] = {}  # for each layer the gradient of `latest` from the later chunks
        chunks = list(zip(plan.first, plan.steps, ctx.places, strict=True))
        for first, steps, at in reversed(chunks):
            dy = shuffle_to_rows_backward(grad, at, kept.pop(), ctx.size, ctx.patch, ctx.layout, ctx.dtype)
            through: dict[int, tuple[Tensor, Tensor]] = {}  # for each layer the gradient from a residual, and its signs
            for i in reversed(range(len(layers))):
                layer, step = layers[i], steps[i]
                used = [s for s, taps in enumerate(step.taps) if len(taps)]
                signs = {s: none if layer.slope is None else kept.pop() for s in reversed(used)}
                if layer.residual is not None and used:
                    through[layer.residual] = dy, signs[0]
                bank = step.carry + (len(first) if i == 0 else sum(map(len, steps[i - 1].taps)))
                _, h, w, _ = dy.shape
                size = (bank, h // layer.upscale, w // layer.upscale, layer.channels[0])
                dbank, begin = None, 0
                for s in used:
                    taps, begin, end = step.taps[s], begin + len(step.taps[s]), begin + len(step.taps[s])
                    more = through.pop(i, (None, None))
                    rest = (bank, layer.weights[s], *more, layer.slope, layer.upscale)
                    part = conv3x3_backward(dy[end - len(taps) : end], signs[s], taps, *rest)
                    dbank = part if dbank is None else dbank.add_(part)
                if dbank is None:
                    dbank = dy.new_zeros(size)  # no new frame in this chunk
                if bank and i in late:
                    dbank[step.latest] += late.pop(i)[0]
                if step.carry:
                    late[i] = dbank[:1].clone()
                dy = dbank[1:] if step.carry else dbank
                del dbank
            dx[_where(first, dx.device)] = dy
        return dx, *[None] * 7


def _where(frames: Sequence[int], device: torch.device) -> Any:
    """An index of ascending frames: a slice if they are consecutive."""
    if not frames:
        return slice(0, 0)
    return slice(frames[0], frames[-1] + 1) if frames[-1] - frames[0] == len(frames) - 1 else indices(frames, device)


def indices(places: Sequence[int], device: torch.device) -> Tensor:
    """An index tensor on the device, cached."""
    return _indices(tuple(places), device)


@functools.lru_cache(maxsize=64)
@keepable()
def _indices(places: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(places, device=device)
