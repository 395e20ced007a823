"""Run the steps of an optimisation operator by operator, with compiled blocks, or as a CUDA graph.

Every step has the same shapes and the same inputs, only the LoRA's weights differ, so that a recorded step can be
replayed. What a step computes is in `Objective`. An engine reads the device once a step, or twice where it is long.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from vlmteacher.checkpoints.quantized import is_gguf
from vlmteacher.errors import InputError, first_line
from vlmteacher.optimization.objective import Metrics, Objective
from vlmteacher.optimization.out_of_memory import is_out_of_memory
from vlmteacher.reasoners.checkpointing import Keep, block_list, kept_levels
from vlmteacher.settings import Engine

if TYPE_CHECKING:
    from vlmteacher.reasoners.base import Reasoner
    from vlmteacher.teachers.base import Teacher

ENGINES: tuple[Engine, ...] = get_args(Engine)
LONG = 0.3  # seconds of an evaluation from which a GPU's wait of milliseconds between forward and backward is nothing
WARM_UP_STEPS = 2  # real steps, which fill the caches that a graph must not fill, and create the optimiser's state


def _numbered(device: torch.device) -> torch.device:
    """The device with its index: "cuda" is the current cuda:N."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_engine(engine: Engine, reasoner: Reasoner, teacher: Teacher) -> None:
    """Raise InputError when devices, ranks or activation levels of these models exclude `engine`."""
    if engine != "eager" and reasoner.ranks.size > 1:
        raise InputError(f'engine "{engine}" runs in one process, not with --context-parallel: take "eager"')
    if engine == "cuda_graph":
        devices = {_numbered(reasoner.device), _numbered(teacher.device)}
        if len(devices) > 1 or next(iter(devices)).type != "cuda":
            where = " and ".join(sorted(map(str, devices)))
            raise InputError(
                f'engine "cuda_graph" needs Reasoner and Teacher on one NVIDIA GPU, they are on {where}: take "eager"'
            )
    if engine != "eager" and is_gguf(reasoner.transformer):  # diffusers' tensors and tables of constants
        raise InputError(f'engine "{engine}" does not take GGUF weights: take "eager", or quantise them otherwise')
    if engine == "compile":
        between = {level for level in kept_levels(reasoner.transformer) if Keep.ALL < level < Keep.INPUT}
        if between:
            raise InputError(
                f'engine "compile" cannot keep {min(between).name.lower()}: a compiled block keeps "all" or its "input"'
            )


@contextmanager
def _all_or_none(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Restore the parameters and the optimiser's state when the block raises."""
    known = dict(optimizer.state)
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    owned += [value for state in known.values() for value in state.values() if isinstance(value, Tensor)]
    before = [tensor.detach().clone() for tensor in owned]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(owned, before, strict=True):
                tensor.copy_(value)
        for parameter in optimizer.state.keys() - known.keys():
            del optimizer.state[parameter]
        raise


class Eager:
    """Operator by operator."""

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer) -> None:
        self.objective, self.optimizer = objective, optimizer
        self.seconds = math.inf  # of the last evaluation; the first may be the only one

    @property
    def recorded(self) -> bool:
        """Whether the steps are replayed as they were recorded, so that new settings have no effect on them."""
        return False

    def evaluate(self, step: int = 0) -> Metrics:
        """Evaluate the objective and leave its gradient on the parameters; see `Objective.evaluate` for `step`.

        Where reading the metrics costs little, the backward is left out when no update can follow.
        """
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss, packed = self.objective.evaluate(step)
        if self.reads_first(packed.device) and not self.objective.needs_gradient(
            metrics := self.objective.read(packed)
        ):
            return metrics
        metrics = self.objective.read(self.objective.backward(loss, packed))
        self.seconds = time.perf_counter() - start
        return metrics

    def reads_first(self, device: torch.device) -> bool:
        """Whether to read the metrics before the backward, which a GPU then waits for: only where a step is long."""
        return device.type == "cpu" or self.seconds > LONG

    def update(self) -> None:
        """Apply the gradients that `evaluate` left: to all parameters, or, where memory is full, to none."""
        with _all_or_none(self.optimizer):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def reset(self) -> None:
        """Discard what was recorded, because a step now computes something else."""

    def close(self) -> None:
        """Restore the models."""


class Compiled(Eager):
    """The Reasoner's blocks under torch.compile, one graph for all that are alike. Surrogate decoder and Teacher are
    our own autograd functions already, with little left to fuse."""

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(objective, optimizer)
        self.blocks: list[Any] = list(block_list(objective.reasoner.transformer))
        for block in self.blocks:
            block.compile()

    def close(self) -> None:
        for block in self.blocks:
            block._compiled_call_impl = None


class CudaGraph(Eager):
    """Two CUDA graphs: forward, backward and clipping; and the update.

    The host reads the metrics between the two, so that a step that is not finite, or is good enough, changes nothing.
    The first steps run eagerly on the stream that the graphs are recorded on. Follows "CUDA Graphs" in PyTorch's notes:
    gradients are None before recording, so that they are allocated in the graph's memory, and are never set to None
    while it is replayed; the optimiser is `capturable`. `tests/optimization/test_engines.py`, which has no GPU, records
    the CPU's operators and replays them, and checks on tensors without data that nothing between the inputs and the
    metrics reads from the device or copies to it.
    """

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(objective, optimizer)
        self.device = objective.reasoner.device
        self.stream = torch.cuda.Stream(self.device)
        self._activation_bytes = objective.teacher.activation_bytes
        self.reset()

    def reset(self) -> None:
        self.warm = 0
        self.step: torch.cuda.CUDAGraph | None = None
        self.apply: torch.cuda.CUDAGraph | None = None
        self.packed: Tensor | None = None  # the metrics, in the graph's memory

    @property
    def recorded(self) -> bool:
        return self.step is not None

    def evaluate(self, step: int = 0) -> Metrics:
        if self.objective.offload:  # a graph cannot hold copies to pinned memory
            return super().evaluate(step)
        with torch.cuda.device(self.device):
            if self.warm < WARM_UP_STEPS:
                self.warm += 1
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    metrics = super().evaluate(step)
                torch.cuda.current_stream().wait_stream(self.stream)
                return metrics
            if self.step is None:
                self.step = self._record_step()
            self.step.replay()
            assert self.packed is not None
            return self.objective.read(self.packed)

    def _record_step(self) -> torch.cuda.CUDAGraph:
        self.optimizer.zero_grad(set_to_none=True)
        teacher = self.objective.teacher
        if teacher.activation_bytes is None:  # as in the step before, which found the Reasoner's activations in place
            teacher.activation_bytes = teacher.kept_bytes
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.packed = self.objective.backward(*self.objective.evaluate())
        except RuntimeError as error:
            for cause in (error, error.__context__):  # ending a broken recording raises once more
                if cause is not None and is_out_of_memory(cause):
                    raise torch.OutOfMemoryError(str(cause)) from None
            raise InputError(
                f'a step cannot be recorded as a CUDA graph ({first_line(error)}): take engine "eager"'
            ) from error
        return graph

    def update(self) -> None:
        if self.step is None:
            return super().update()
        with torch.cuda.device(self.device):
            if self.apply is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.step.pool(), stream=self.stream):
                    self.optimizer.step()
                self.apply = graph
            self.apply.replay()

    def close(self) -> None:
        self.reset()
        self.optimizer.zero_grad(set_to_none=True)  # the gradients are in the graph's memory
        self.objective.teacher.activation_bytes = self._activation_bytes


def make_engine(engine: Engine, objective: Objective, optimizer: torch.optim.Optimizer) -> Eager:
    """The engine of this name. Raises InputError as `check_engine` does."""
    check_engine(engine, objective.reasoner, objective.teacher)
    return {"eager": Eager, "compile": Compiled, "cuda_graph": CudaGraph}[engine](objective, optimizer)
