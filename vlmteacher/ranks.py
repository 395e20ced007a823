"""The processes of torchrun that work on one instance together, one GPU each ("ranks").

Every rank runs the whole program on the same inputs. Numbers that decide anything are rank 0's, so that all ranks go
the same way; only rank 0 writes files. `ALONE` is the one rank of a program without torchrun.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vlmteacher.errors import InputError, MissingExtra, RankLost, first_line

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
LOST = ("closed by peer", "reset by peer", "NCCL", "ProcessGroup", "Broken pipe", "recvValue failed")


@dataclass(frozen=True)
class Ranks:
    """This process among `size` ones. With one, every method does nothing.

    device: the kind of device on which tensors are exchanged, "cpu" (gloo) or "cuda" (NCCL).
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The mesh of diffusers' context parallelism: one ring of `size` ranks that exchange heads (Ulysses)."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device, (1, self.size), mesh_dim_names=("ring", "ulysses"))

    def first(self, value: T) -> T:
        """Rank 0's value, an object that pickle takes, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    def same(self, tensor: Tensor) -> Tensor:
        """Rank 0's numbers on every rank: `tensor`, overwritten, or a contiguous copy."""
        if self.size > 1:
            tensor = tensor.contiguous()
            dist.broadcast(tensor.detach(), 0)
        return tensor

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up the tensors of all ranks, in place and as one."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors (n, ...) of all ranks, of one shape, as (size * n, ...) in their order."""
        whole = tensor.new_empty(self.size * len(tensor), *tensor.shape[1:])
        dist.all_gather([*whole.chunk(self.size)], tensor.contiguous())
        return whole

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run checks, without a word between the ranks; where one rank refuses, all end.

        The lowest rank that refuses raises its own error, the others end with the same exit status and no message.
        """
        error: Exception | None = None
        try:
            yield
        except (InputError, MissingExtra) as refusal:
            if self.size == 1:
                raise
            error = refusal
        if self.size == 1:
            return
        refused: list[bool] = [False] * self.size
        dist.all_gather_object(refused, error is not None)
        if any(refused):
            speaker = refused.index(True)
            if error is not None and speaker == self.rank:
                raise error
            with suppress(RuntimeError):  # torchrun ends the others as soon as one has ended: it must be the speaker
                dist.broadcast_object_list([None], speaker)
            raise SystemExit(2)

    def check_same(self, entries: Mapping[str, str]) -> None:
        """Raise InputError on the first rank whose `entries`, hashes by name, are not rank 0's; all end."""
        ours = self.first(dict(entries))
        with self.together():
            if different := [name for name, value in entries.items() if ours[name] != value]:
                raise InputError(
                    f"rank {self.rank} has another {' and '.join(different)} than rank 0: give all ranks the same"
                    " arguments and files, in one torchrun command"
                )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise RankLost where a word between the ranks fails inside the block, because one of them has ended."""
        try:
            yield
        except RuntimeError as error:
            if not self.has_lost(error):
                raise
            raise RankLost(
                f"another of the {self.size} ranks has ended ({first_line(error)}): torchrun names it, and the reason"
            ) from error

    def has_lost(self, error: object) -> bool:
        """Whether an error is that of a word to a rank that has ended."""
        broken = isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)
        return self.size > 1 and (broken or isinstance(error, RankLost))


ALONE = Ranks()


def join(count: int, device: str | None) -> Ranks:
    """The ranks of a program that torchrun has started `count` times.

    device: "cpu", "cuda" or None (see `find_devices`). Raises InputError without torchrun, with another number of
    processes, for another device, and for a process without a GPU.
    """
    if count < 2:
        raise InputError(f"--context-parallel must be at least 2, not {count}: leave it out for one process")
    world, command = os.environ.get("WORLD_SIZE"), f"torchrun --nproc-per-node {count} -m vlmteacher solve ..."
    if world is None or "MASTER_ADDR" not in os.environ:
        raise InputError(f"--context-parallel {count} needs {count} processes: {command}")
    if world != str(count):
        raise InputError(f"--context-parallel {count} under torchrun of {world} processes: {command}")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise InputError(f"--device {device} with --context-parallel: each rank takes its own GPU: give --device cuda")
    if kind == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise InputError(f"--context-parallel {count}: process {local} has no GPU, there are {gpus}")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), kind)


def leave(ranks: Ranks) -> None:
    """End the words between the ranks, after the last one."""
    if ranks.size > 1:
        dist.destroy_process_group()


def split_rows(
    encode: Callable[[Tensor], tuple[Tensor, ...]], rows: Tensor, unit: int, ranks: Ranks
) -> tuple[Tensor, ...]:
    """`encode(rows)`, of which each rank computes and differentiates an equal part.

    encode: from (n, ...) to tensors, each with the same number of rows for every `unit` rows and independent between
    such units. rows: (N, ...), the same on all ranks, as the gradients of the outputs must be; the last unit may be
    short. Returns the whole outputs on every rank; so is the gradient of `rows`.
    """
    if ranks.size == 1:
        return encode(rows)
    units = -(-len(rows) // unit)
    each = -(-units // ranks.size)
    if missing := each * ranks.size * unit - len(rows):  # every rank has as many units: the last row fills them up
        rows = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])
    outputs = encode(_Own.apply(rows, ranks))
    return tuple(_Whole.apply(output, ranks)[: units * (len(output) // each)] for output in outputs)


class _Own(torch.autograd.Function):
    """The part (N / size, ...) of this rank; the gradients of all parts are put together."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return rows.chunk(ranks.size)[ranks.rank]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.gather(grad), None


class _Whole(torch.autograd.Function):
    """The parts (n, ...) of all ranks in one; of the gradient, which all ranks have, each takes its part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.ranks.size)[ctx.ranks.rank], None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        ctx.ranks.sum([grad])
        return grad, None


def summed(x: Tensor, ranks: Ranks) -> Tensor:
    """x itself, of which each rank uses a part from here on: the ranks' gradients are added up."""
    return _Summed.apply(x, ranks) if ranks.size > 1 else x
