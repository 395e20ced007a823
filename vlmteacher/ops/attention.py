"""Softmax attention under a mask of two intervals: every query attends to the keys [0, a) and [b, c).

Three numbers per query express full attention, causal attention, segments of a row, sliding windows and questions that
share a prefix; masked blocks are not computed. On CPUs with AVX-512 the operator is our own: sums and softmax in
float32, and for the backward it keeps the output and two numbers per query. Elsewhere, and on request, it is torch's or
another library's: see `BACKENDS`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from vlmteacher.errors import InputError, MissingExtra
from vlmteacher.ops.backends import cpp_status, plain
from vlmteacher.ops.processors import is_own
from vlmteacher.ops.sdpa import MASKED
from vlmteacher.torch_modes import keepable

cpp_status()  # loads the operators here, for torch.compile cannot trace it
MOST_RUNS = 16  # of queries that are computed one by one
Run = tuple[int, int, int, int, int]
BACKENDS = ("native", "sdpa", "flex", "xformers", "flash")


@dataclass(frozen=True)
class Spans:
    """Which of `keys` keys each of N queries attends to: [0, a) and [b, c).

    Attributes:
        table: (N, 3) int32, contiguous, with rows (a, b, c), 0 <= a, b, c <= keys, and at least one key per query.
        keys: number of keys.
        causal: number of leading queries that attend to exactly the keys up to their own position.
        lengths: the segments' lengths if the table was made by `segments`. Other libraries have fast paths for these
            two special cases.

    Raises InputError for an invalid table; the check waits for the device once.
    """

    table: Tensor
    keys: int
    causal: int = 0
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        table = self.table
        if table.dim() != 2 or table.shape[1] != 3 or table.dtype != torch.int32 or not table.is_contiguous():
            raise InputError(f"spans must be a contiguous (N, 3) int32 table, not {tuple(table.shape)} {table.dtype}")
        a, b, c = table.unbind(1)
        if (
            len(table)
            and not table.is_meta
            and bool(((table < 0) | (table > self.keys)).any() | ((a < 1) & (b >= c)).any())
        ):
            raise InputError(f"spans must lie within the {self.keys} keys and give every query at least one key")

    @staticmethod
    def segments(lengths: Sequence[int], device: torch.device | None = None) -> Spans:
        """Every token of a row of sum(lengths) attends to its own segment."""
        sizes = torch.tensor(lengths)
        ends = sizes.cumsum(0).repeat_interleave(sizes)
        starts = ends - sizes.repeat_interleave(sizes)
        return Spans(
            torch.stack([torch.zeros_like(ends), starts, ends], 1).int().to(device),
            sum(lengths),
            lengths=tuple(lengths),
        )

    def at(self, rows: Tensor) -> Spans:
        """The spans of the queries `rows`."""
        return Spans(self.table[rows].contiguous(), self.keys)

    def mask(self, first: int = 0) -> Tensor:
        """(N - first, keys) bool, True where a query attends to a key, of the queries from `first` on."""
        a, b, c = self.table[first:, :, None].unbind(1)
        key = torch.arange(self.keys, device=self.table.device)
        return (key < a) | (b <= key) & (key < c)

    @functools.cached_property
    @keepable()
    def rest(self) -> Tensor:
        """The mask of the queries after the causal ones."""
        return self.mask(self.causal)

    @functools.cached_property
    def runs(self) -> list[Run]:
        """The queries after the causal ones in runs (first, last, a, b, c): the queries from `first` to before `last`
        are the last of the keys [0, a) and [b, c), and each attends to those up to itself."""
        runs: list[Run] = []
        for place, (a, b, c) in enumerate(self.table[self.causal :].tolist(), self.causal):
            if b >= c:  # [0, a) alone
                b = c = a
            last = runs[-1] if runs else None
            if last and last[2:4] == (a, b) and c == last[4] + 1 and last[4] > b:
                runs[-1] = (last[0], place + 1, a, b, c)
            else:
                runs.append((place, place + 1, a, b, c))
        return runs

    @functools.cached_property
    @keepable()
    def block_mask(self) -> Any:
        """The mask for FlexAttention."""
        from torch.nn.attention.flex_attention import create_block_mask

        a, b, c = self.table.unbind(1)

        def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key < a[query]) | (b[query] <= key) & (key < c[query])

        return create_block_mask(attends, None, None, len(self.table), self.keys, device=self.table.device.type)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, spans: Spans | None = None) -> Tensor:
    """The definition of `attention`, in plain differentiable torch."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if spans is not None:
        scores = scores.masked_fill(~spans.mask(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def _forward(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> list[Tensor]:
    """The output, and (2, B, H, N) float32: the softmax's largest exponent and 1 / its sum of exponentials."""
    results: list[Tensor] = torch.ops.vlmteacher_cpp.attention(q, k, v, table, q.shape[-1] ** -0.5)
    return results


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    """The gradients of q, k and v; rest: `_forward`'s output and softmax statistics, and the table."""
    grads: list[Tensor] = torch.ops.vlmteacher_cpp.attention_backward(grad, q, k, v, *rest, q.shape[-1] ** -0.5)
    return grads


# Registered with torch.library for torch.compile, fake tensors and dispatch modes, see `backends.plain`.
@torch.library.custom_op("vlmteacher::attention", mutates_args=())
def _forward_operator(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> list[Tensor]:
    return _forward(q, k, v, table)


@torch.library.custom_op("vlmteacher::attention_backward", mutates_args=())
def _backward_operator(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, softmax: Tensor, table: Tensor | None
) -> list[Tensor]:
    return _backward(grad, q, k, v, output, softmax, table)


@_forward_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> list[Tensor]:
    batch, queries, heads, _ = q.shape
    return [q.new_empty(q.shape), q.new_empty(2, batch, heads, queries, dtype=torch.float32)]


@_backward_operator.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v)]


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        output, softmax = (_forward if plain(q) else _forward_operator)(q, k, v, table)
        ctx.save_for_backward(q, k, v, output, softmax)
        ctx.table = table
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run = _backward if plain(grad) else _backward_operator
        return *run(grad, *ctx.saved_tensors, ctx.table), None


def _native(q: Tensor, k: Tensor, v: Tensor, spans: Spans | None) -> Tensor:
    output: Tensor = _Native.apply(q, k, v, None if spans is None else spans.table)
    return output


def is_native(q: Tensor) -> bool:
    """Whether our own operator runs on tensors like q."""
    takes = q.dtype == torch.float32 or q.shape[-1] % 2 == 0
    return takes and q.device.type == "cpu" and q.numel() > 0 and is_own("attention", q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    masked = mask is not None and q.device.type == "cuda"
    with sdpa_kernel(MASKED) if masked else contextlib.nullcontext():
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, **grouped)
    return output.transpose(1, 2)


def _sdpa_run(q: Tensor, k: Tensor, v: Tensor, run: Run) -> Tensor:
    """Attention of the queries of a run, without a tensor for its mask.

    Computed again in the backward: the keys and values of a run are copies, which are larger than all else of it.
    """
    result: Tensor = checkpoint(_one_run, q, k, v, run, use_reentrant=False, preserve_rng_state=False)
    return result


def _one_run(q: Tensor, k: Tensor, v: Tensor, run: Run) -> Tensor:
    first, last, a, b, c = run
    k, v = (torch.cat([x[:, :a], x[:, b:c]], 1) for x in (k, v))
    queries = last - first
    mask = causal_lower_right(queries, k.shape[1]) if queries > 1 else None
    grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
    q, k, v = (x.transpose(1, 2) for x in (q[:, first:last], k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **grouped).transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Sequence[int] = ()) -> Tensor:
    ops = _extra("xformers.ops", "xformers")
    bias: Any = ops.LowerTriangularMask() if causal else None
    shape, group = q.shape, q.shape[2] // k.shape[2]
    if lengths:
        bias = ops.fmha.BlockDiagonalMask.from_seqlens([*lengths] * len(q))
        q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
    if group > 1:
        q = q.unflatten(2, (-1, group))
        k, v = (x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v))
    output: Tensor = ops.memory_efficient_attention(q, k, v, attn_bias=bias)
    return output.reshape(shape)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Sequence[int] = ()) -> Tensor:
    flash = _extra("flash_attn", "flash")
    if not lengths:
        whole: Tensor = flash.flash_attn_func(q, k, v, causal=causal)
        return whole
    ends = torch.tensor([0, *[*lengths] * len(q)], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(q.device)
    rows = (x.flatten(0, 1) for x in (q, k, v))
    output: Tensor = flash.flash_attn_varlen_func(*rows, ends, ends, max(lengths), max(lengths))
    return output.view(q.shape)


def _extra(module: str, backend: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"attention by {backend} needs a package: pip install 'vlmteacher[{backend}]'") from error


_LIBRARIES: dict[str, Callable[..., Tensor]] = {"sdpa": _sdpa, "xformers": _xformers, "flash": _flash}


def _library(name: str, q: Tensor, k: Tensor, v: Tensor, spans: Spans | None) -> Tensor:
    run = _LIBRARIES[name]
    if spans is None:
        return run(q, k, v, False)
    if spans.lengths and name != "sdpa":
        return run(q, k, v, False, spans.lengths)
    n, parts = spans.causal, []
    if n:
        parts.append(run(q[:, :n], k[:, :n], v[:, :n], True))
    if n < q.shape[1] or not n:
        # On a CPU torch makes the mask of every run again; the one of all is faster (benchmarks/NEGATIVE.md).
        if q.device.type == "cuda" and len(spans.runs) <= MOST_RUNS:
            parts += [_sdpa_run(q, k, v, run) for run in spans.runs]
        else:
            parts.append(_sdpa(q[:, n:], k, v, False, spans.rest))
    return torch.cat(parts, 1)


@functools.cache
def _flex_attention(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


def _flex(q: Tensor, k: Tensor, v: Tensor, spans: Spans | None) -> Tensor:
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise InputError("torch's FlexAttention has no backward on CPUs: take attention by native or sdpa there")
    run = _flex_attention(q.device.type != "cpu" and not torch.compiler.is_compiling())
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if spans is None else spans.block_mask
    return run(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans | None = None, backend: str | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v under the mask of `spans`.

    Args:
        q: (B, N, H, d) and k, v: (B, M, G, d), where each of the G key heads serves H / G consecutive query heads.
            Floating point, of one dtype; copied if the last dimension is not contiguous.
        spans: which keys each query attends to, the same for all batch entries and heads; None: all keys.
        backend: "native" (CPUs with AVX-512, float32 and bfloat16), "sdpa" (torch's), "flex" (torch's FlexAttention),
            "xformers" and "flash" (the package flash-attn), both for GPUs, with "sdpa" for the masks that they do not
            support. None: "native" where it runs, else "sdpa".

    Returns:
        (B, N, H, d). Differentiable with respect to q, k and v; once by the native operator.

    Raises:
        InputError: shapes, dtypes or a mask that do not fit; an unknown backend, or one that cannot run these tensors.
        MissingExtra: the backend's package is not installed.
    """
    _check(q, k, v, spans)
    if backend is None:
        backend = "native" if is_native(q) else "sdpa"
    if backend not in BACKENDS:
        raise InputError(f"unknown attention backend {backend!r}: choose from {', '.join(BACKENDS)}")
    if backend == "native":
        if not is_native(q):
            raise InputError(
                f"native attention cannot run on {q.dtype} with {q.shape[-1]} channels on {q.device} here: "
                "it needs a CPU with AVX-512, and float32 or bfloat16 of even channels (see `vlmteacher env`)"
            )
        return _native(q, k, v, spans)
    return _flex(q, k, v, spans) if backend == "flex" else _library(backend, q, k, v, spans)


def _check(q: Tensor, k: Tensor, v: Tensor, spans: Spans | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
    if not fits or not k.shape[1] or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise InputError(f"attention takes (B, N, H, d), (B, M, G, d) and (B, M, G, d), G a divisor of H, got {shapes}")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise InputError(f"attention takes q, k and v of one floating-point dtype on one device, got {kinds}")
    if spans is not None and spans.table.device != q.device:
        raise InputError(f"spans on {spans.table.device} do not fit q on {q.device}: make them there")
    if spans is not None and (len(spans.table), spans.keys) != (q.shape[1], k.shape[1]):
        raise InputError(
            f"spans of {len(spans.table)} queries and {spans.keys} keys do not fit {shapes}: make them for these"
        )
