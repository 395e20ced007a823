"""The surrogate decoder on a GPU: every backend against float64, then against the plain decoder, which decodes every
frame and samples K, and against each other, vendor convolutions among them.

    python -m benchmarks.gpu.surrogate_decoder [--json] [--dtype float16] [--pairs 10] [--preset mid] [--chunk 8]

`fastest` of each case is what the policy in vlmteacher/ops/backends.py should say.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu import backends, forced, gate, parsed_on_gpu, share
from benchmarks.timing import argument_parser, compare
from vlmteacher.decoders import SurrogateDecoder
from vlmteacher.ops import surrogate_decoder as operator
from vlmteacher.ops.bits import unpack_bits
from vlmteacher.ops.surrogate_decoder import pack_signs
from vlmteacher.optimization.frames import teacher_frame_indices

PRESETS = {"paper": ((23, 44, 80), 24), "mid": ((9, 24, 24), 24)}  # latents (T, h, w), frames that the Teacher sees
CHECK = (3, 7, 5), 6  # float64 is slow on most GPUs
EACH = [  # channels, n, taps, slope, residual, upscale: the layers that differ, on 11x19 pixels
    (48, 256, 1, 0.0, False, 1),
    (512, 256, 2, 0.0, True, 1),
    (256, 256, 1, 0.0, True, 1),
    (256, 128, 1, None, False, 2),
    (64, 64, 1, 0.0, False, 2),
    (64, 12, 1, None, False, 1),
    (5, 7, 2, 0.2, False, 2),  # nothing is aligned
]


class Vendor:
    """The same by the vendor's convolutions and a few passes after each: what the kernels have to beat."""

    @staticmethod
    def conv3x3(
        x: Tensor, taps: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, rows: Tensor | None,
        slope: float | None, upscale: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        seen = x[taps.clamp(min=0).long()].movedim(1, 3).flatten(3)
        seen = seen.unflatten(3, (taps.shape[1], -1)) * (taps >= 0).to(x.dtype)[:, None, None, :, None]
        seen = seen.flatten(3).permute(0, 3, 1, 2)
        if upscale == 1:
            y = F.conv2d(seen, weight.permute(0, 3, 1, 2), bias, padding=1)
        else:
            y = F.conv_transpose2d(seen, fold(weight).permute(3, 0, 1, 2), bias, stride=2, padding=1)
        y = y.permute(0, 2, 3, 1).contiguous()
        if residual is not None and rows is not None:
            y += residual[rows.long()]
        if slope is None:
            return y, torch.empty(0, dtype=torch.uint8, device=x.device)
        signs = pack_signs(y)
        return F.relu_(y) if slope == 0 else F.leaky_relu_(y, slope), signs

    @staticmethod
    def conv3x3_backward(
        grad: Tensor, signs: Tensor, taps: Tensor, frames: int, weight: Tensor, residual: Tensor | None,
        residual_signs: Tensor | None, slope: float | None, upscale: int,
    ) -> Tensor:  # fmt: skip
        def masked(grad: Tensor, signs: Tensor) -> Tensor:
            return grad if slope is None else torch.where(unpack_bits(signs, grad.shape[-1]), grad, slope * grad)

        dy = masked(grad, signs).permute(0, 3, 1, 2)
        if upscale == 1:
            dx = F.conv_transpose2d(dy, weight.permute(0, 3, 1, 2), padding=1)
        else:
            dx = F.conv2d(dy, fold(weight).permute(3, 0, 1, 2), stride=2, padding=1)
        channels = weight.shape[-1] // taps.shape[1]
        out = dx.new_zeros(frames + 1, *dx.shape[2:], channels)  # the last is for the taps that are no frame
        where = torch.where(taps < 0, frames, taps).long()
        for column, part in zip(where.unbind(1), dx.permute(0, 2, 3, 1).split(channels, -1), strict=True):
            out.index_add_(0, column, part)
        if residual is not None and residual_signs is not None:
            out.index_add_(0, where[:, 0], masked(residual, residual_signs))
        return out[:-1]


def fold(weight: Tensor) -> Tensor:
    """(N, 3, 3, C) -> (N, 4, 4, C): the weight of the transposed convolution of stride 2 that does both, upsampling and
    convolution (see kernels/surrogate_decoder.py)."""
    wide = F.pad(weight.float(), (0, 0, 1, 1, 1, 1)).flip(1, 2)
    wide = wide[:, 1:] + wide[:, :-1]
    return (wide[:, :, 1:] + wide[:, :, :-1]).to(weight.dtype)


def check_convolutions(namespace: Any, dtype: torch.dtype, device: str) -> float:
    """The largest error of y and dx over the layers that differ, as a share of the allowed one (see `share`).

    Memory is full of NaN first.
    """
    worst = 0.0
    for channels, n, count, slope, added, upscale in EACH:
        torch.manual_seed(channels)
        size = (5, 11, 19, channels // count if channels > n else channels)
        x = torch.randn(size, device=device).to(dtype)
        taps = torch.tensor([[3, -1], [0, 3], [1, 0]], dtype=torch.int32, device=device)[:, :count].contiguous()
        weight = (torch.randn(n, 3, 3, count * size[-1], device=device) / (9 * count * size[-1]) ** 0.5).to(dtype)
        bias = torch.randn(n, device=device).to(dtype)
        large = (11 * upscale, 19 * upscale, n)
        bank = torch.randn(2, *large, device=device).to(dtype) if added else None
        rows = torch.tensor([1, 0, 1], dtype=torch.int32, device=device) if added else None
        grad = torch.randn(3, *large, device=device).to(dtype)
        through = torch.randn(3, *size[1:], device=device).to(dtype) if added else None
        through_signs = pack_signs(torch.randn(3, *size[1:], device=device)) if added else None

        numbers = {"x": x, "weight": weight, "bias": bias, "bank": bank, "grad": grad, "through": through}

        def run(
            functions: Any, numbers: Any, signs: Tensor | None = None, taps: Any = taps, rows: Any = rows,
            through_signs: Any = through_signs, slope: Any = slope, upscale: Any = upscale,
        ) -> tuple[list[Tensor], Tensor]:  # fmt: skip
            x, weight, bias, bank, grad, through = numbers.values()
            y, own_signs = functions[0](x, taps, weight, bias, bank, rows, slope, upscale)
            signs = own_signs if signs is None else signs
            return [
                y,
                functions[1](grad, signs, taps, len(x), weight, through, through_signs, slope, upscale),
            ], signs

        reference = (operator.conv3x3_reference, operator.conv3x3_backward_reference)
        wide = {name: None if t is None else t.double() for name, t in numbers.items()}
        exact, signs = run(reference, wide)
        poison = [torch.full_like(t, float("nan"), dtype=dtype) for t in exact]
        del poison  # the allocator hands this memory out again
        ours, _ = run((namespace.conv3x3, namespace.conv3x3_backward), numbers, signs)

        def definition(numbers: Any, signs: Tensor = signs, run: Any = run, reference: Any = reference) -> list[Tensor]:
            return run(reference, numbers, signs)[0]

        worst = max(worst, share(ours, definition, numbers))
    return worst


class Plain(nn.Module):
    """The plain decoder as a module's forward."""

    def __init__(self, decoder: SurrogateDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder.decode_batch(z)


def network(latents: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[SurrogateDecoder, Tensor]:
    torch.manual_seed(0)
    decoder = SurrogateDecoder(48, patch=2)
    with torch.no_grad():
        decoder.decoder[22].bias.fill_(0.5)  # the middle of the range: gradients pass the clamp
    decoder = decoder.to(device, dtype).requires_grad_(False)
    return decoder, torch.randn(1, 48, *latents, device=device).to(dtype).requires_grad_()


def check_decoder(namespace: Any, dtype: torch.dtype, device: str) -> float:
    """The error of the whole decoder's frames and latent gradient as a share of the allowed one (see `share`)."""
    latents, k = CHECK
    decoder, z = network(latents, dtype, device)
    indices = teacher_frame_indices(decoder.temporal_stride * (latents[0] - 1) + 1, k)
    grad = torch.randn(k, 3, *(16 * size for size in latents[1:]), device=device).to(dtype)

    def run(decode: Callable[[Tensor], Tensor], z: Tensor, grad: Tensor) -> list[Tensor]:
        z = z.detach().requires_grad_()
        frames = decode(z)
        return [frames.detach(), torch.autograd.grad(frames, z, grad)[0]]

    def definition(weights: dict[str, Tensor], z: Tensor, grad: Tensor) -> list[Tensor]:
        plain = functools.partial(torch.func.functional_call, Plain(decoder), weights)
        return run(lambda z: plain((z,))[0][indices], z, grad)

    with forced(operator, namespace):
        ours = run(lambda z: decoder.decode(z, indices, chunk=4), z, grad)
    weights = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    return share(ours, definition, weights, z.detach(), grad)


def peak_bytes(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(preset: str, dtype: torch.dtype, pairs: int, chunk: int | None) -> dict[str, Any]:
    latents, k = PRESETS[preset]
    decoder, z = network(latents, dtype, "cuda")
    indices = teacher_frame_indices(decoder.temporal_stride * (latents[0] - 1) + 1, k)

    def ours() -> Tensor:
        return decoder.decode(z, indices, chunk)

    def plain() -> Tensor:
        return decoder.decode_batch(z)[0][indices]

    grad = torch.randn_like(plain().detach())

    def both(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), z, grad)

    def backward(forward: Callable[[], Tensor]) -> Callable[[], object]:
        frames = forward()
        return lambda: torch.autograd.grad(frames, z, grad, retain_graph=True)

    def without_graph(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return torch.no_grad()(forward)

    case = f"{preset}: {k} of {decoder.temporal_stride * (latents[0] - 1) + 1} frames"
    row: dict[str, Any] = {"case": case, "backends": {}}
    stock_peak = peak_bytes(both(plain))
    for name, namespace in ({"vendor": Vendor} | backends("surrogate_decoder")).items():
        with forced(operator, namespace):
            facts = compare(case, both(ours), both(plain), pairs, "cuda")
            for what, wrap in (("forward", without_graph), ("backward", backward)):
                facts[what] = compare(case, wrap(ours), wrap(plain), pairs, "cuda")
            facts["memory_ratio"] = peak_bytes(both(ours)) / stock_peak
        row["backends"][name] = facts
        times = ", ".join(f"{what} x{facts[what]['speedup']:.2f}" for what in ("forward", "backward"))
        print(
            f"{case:<28} {name:<7} {facts['ours_ms']:8.2f} ms  plain {facts['stock_ms']:8.2f} ms"
            f"  x{facts['speedup']:.2f} ({times}), peak memory {facts['memory_ratio']:.1%}"
        )
    row["fastest"] = min(row["backends"], key=lambda name: row["backends"][name]["ours_ms"])
    return row | row["backends"][row["fastest"]]


def main() -> None:
    parser = argument_parser(__doc__ or "", "bfloat16")
    parser.add_argument("--preset", choices=PRESETS, action="append", help="default: all of them")
    parser.add_argument("--chunk", type=int, help="frames at a time (default: the decoder's own)")
    settings = parsed_on_gpu(parser, "surrogate_decoder")
    dtype = getattr(torch, settings.dtype)
    torch.backends.cudnn.allow_tf32 = False
    for name, namespace in ({"vendor": Vendor} | backends("surrogate_decoder")).items():
        for check in (check_convolutions, check_decoder):
            error = check(namespace, dtype, "cuda")
            gate(check.__name__, name, error)
            print(f"{check.__name__}: {name} has {error:.2f} of the error that is allowed")
    if settings.check:
        return
    torch.backends.cudnn.benchmark = True  # the plain decoder's best
    rows = [measure(preset, dtype, settings.pairs, settings.chunk) for preset in settings.preset or PRESETS]
    if settings.json:
        facts = {"benchmark": "gpu.surrogate_decoder", "device": torch.cuda.get_device_name(), "dtype": settings.dtype}
        summary = {
            "speedup": statistics.geometric_mean(row["speedup"] for row in rows),
            "memory_ratio": statistics.fmean(row["memory_ratio"] for row in rows),
        }
        print(json.dumps(facts | {"rows": rows, "summary": summary}))


if __name__ == "__main__":
    main()
