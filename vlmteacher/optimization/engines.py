"""How the steps of an optimisation are run: operator by operator, with compiled blocks, or as a CUDA graph.

Every step has the same shapes and the same inputs, only the LoRA's weights differ, so that a recorded step can be
played again and again. What a step computes is in `Optimization`; here is who calls it. All engines read the device
once a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.optimization.memory_ladder import is_out_of_memory
from vlmteacher.reasoners.checkpointing import Keep, block_list, kept_levels
from vlmteacher.settings import Engine

if TYPE_CHECKING:
    from vlmteacher.optimization.loop import Optimization
    from vlmteacher.reasoners.base import Reasoner
    from vlmteacher.teachers.base import Teacher

ENGINES: tuple[Engine, ...] = get_args(Engine)
WARM_UP_STEPS = 2  # real ones; they fill every cache that a graph must not fill, and make the optimiser's state


def _numbered(device: torch.device) -> torch.device:
    """cuda as the cuda:N that it stands for."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_engine(engine: Engine, reasoner: Reasoner, teacher: Teacher) -> None:
    """Raise InputError where these models cannot be run by `engine`."""
    if engine == "cuda_graph":
        devices = {_numbered(reasoner.device), _numbered(teacher.device)}
        if len(devices) > 1 or next(iter(devices)).type != "cuda":
            where = " and ".join(sorted(map(str, devices)))
            raise InputError(
                f'engine "cuda_graph" needs Reasoner and Teacher on one NVIDIA GPU, they are on {where}: take "eager"'
            )
    if engine == "compile":
        between = {level for level in kept_levels(reasoner.transformer) if Keep.ALL < level < Keep.INPUT}
        if between:
            raise InputError(
                f'engine "compile" cannot keep {min(between).name.lower()}: a compiled block keeps "all" or its "input"'
            )


@contextmanager
def _all_or_none(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """An error within leaves the parameters and the optimiser's state as they were."""
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

    def __init__(self, loop: Optimization) -> None:
        self.loop = loop

    def facts(self) -> list[float]:
        """A forward and a backward: `Optimization.look` on the host, and the gradient's norm. The gradients stay.

        On the CPU, where looking costs nothing, no backward follows when the step needs none; then the norm is missing.
        """
        loop = self.loop
        loop.optimizer.zero_grad(set_to_none=True)
        loss, facts = loop.look()
        if facts.device.type == "cpu" and not loop.needs_gradient(found := facts.tolist()):
            return found
        return loop.differentiate(loss, facts).tolist()

    def update(self) -> None:
        """Apply the gradients that `facts` left: to all parameters, or, where memory is full, to none."""
        with _all_or_none(self.loop.optimizer):
            self.loop.optimizer.step()
        self.loop.optimizer.zero_grad(set_to_none=True)

    def reset(self) -> None:
        """Forget what was recorded: what a step does has changed."""

    def close(self) -> None:
        """Leave the models as they were."""


class Compiled(Eager):
    """The Reasoner's blocks by torch.compile, one graph for all that are alike. Decoder and Teacher are our own
    autograd functions already, with little left to fuse."""

    def __init__(self, loop: Optimization) -> None:
        super().__init__(loop)
        self.blocks: list[Any] = list(block_list(loop.reasoner.transformer))
        for block in self.blocks:
            block.compile()

    def close(self) -> None:
        for block in self.blocks:
            block._compiled_call_impl = None


class CudaGraph(Eager):
    """Two graphs: forward, backward and clipping; and the update, which the host starts when it has read the facts.

    So that a step that is not finite, or is good enough, changes nothing. The first steps run eagerly on the stream
    that the graphs are recorded on. Follows "CUDA Graphs" in PyTorch's notes: gradients are None before recording, so
    that they get a place in the graph's memory, and are never set to None while it is played; the optimiser is
    `capturable`. `tests/optimization/test_engines.py`, which has no GPU, records the CPU's operators and replays them,
    and checks on tensors without data that nothing between the inputs and the facts reads from the device or copies to
    it.
    """

    def __init__(self, loop: Optimization) -> None:
        super().__init__(loop)
        self.device = loop.reasoner.device
        self.stream = torch.cuda.Stream(self.device)
        if loop.teacher.activation_bytes is None:  # chosen once: free memory is another number in every step
            loop.ladder.set(loop.teacher, "activation_bytes", torch.cuda.mem_get_info(self.device)[0] // 2)
        self.reset()

    def reset(self) -> None:
        self.warm = 0
        self.step: torch.cuda.CUDAGraph | None = None
        self.apply: torch.cuda.CUDAGraph | None = None
        self.found: Tensor | None = None

    def facts(self) -> list[float]:
        if self.loop.offload:  # copies to pinned memory are no part of a graph
            return super().facts()
        with torch.cuda.device(self.device):
            if self.warm < WARM_UP_STEPS:
                self.warm += 1
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    found = super().facts()
                torch.cuda.current_stream().wait_stream(self.stream)
                return found
            if self.step is None:
                self.step = self._record_step()
            self.step.replay()
            assert self.found is not None
            return self.found.tolist()

    def _record_step(self) -> torch.cuda.CUDAGraph:
        self.loop.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.found = self.loop.differentiate(*self.loop.look())
        except RuntimeError as error:
            for each in (error, error.__context__):  # ending a broken recording raises once more
                if each is not None and is_out_of_memory(each):
                    raise torch.OutOfMemoryError(str(each)) from None
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f'a step cannot be recorded as a CUDA graph ({reason}): take engine "eager"') from error
        return graph

    def update(self) -> None:
        if self.step is None:
            return super().update()
        with torch.cuda.device(self.device):
            if self.apply is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.step.pool(), stream=self.stream):
                    self.loop.optimizer.step()
                self.apply = graph
            self.apply.replay()

    def close(self) -> None:
        self.reset()
        self.loop.optimizer.zero_grad(set_to_none=True)  # the gradients are in the graph's memory


def make_engine(engine: Engine, loop: Optimization) -> Eager:
    check_engine(engine, loop.reasoner, loop.teacher)
    return {"eager": Eager, "compile": Compiled, "cuda_graph": CudaGraph}[engine](loop)
