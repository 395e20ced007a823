"""What a step of the optimisation does when the memory is full: it starts again, with less alive at once.

Every rung costs time and changes no loss. They are tried in this order, each on top of those before it:

    activations=long, activations=input     the Reasoner's blocks compute more again in the backward
    teacher_activation_bytes=0              so do the Teacher's layers
    smaller chunks                          of the visual encoder and the surrogate decoder
    offload                                 (GPUs) saved activations, and networks that no step needs, in main memory
"""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from vlmteacher.reasoners.checkpointing import Keep, keep_activations, kept_levels

if TYPE_CHECKING:
    from vlmteacher.optimization.loop import Optimization

log = logging.getLogger(__name__)


# What a RuntimeError says when memory is full: torch's allocators, C++, the CUDA runtime, cuBLAS and cuDNN, oneDNN. Our
# own operators pass on the message of what failed within them (csrc/operator.h).
_FULL = re.compile(r"can't allocate memory|out of memory|std::bad_alloc|_ALLOC_FAILED|could not create a memory object")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is full: a GPU's or the CPU's, torch's own, an operator's or Python's."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and _FULL.search(str(error)) is not None
    )


class MemoryLadder:
    """The rungs for one loop. `taken`: the names of those it stands on, in order.

    make_room: moves to main memory what no step needs; called at the rung "offload".
    """

    def __init__(self, loop: Optimization, make_room: Callable[[], object] = lambda: None) -> None:
        self.loop, self.make_room = loop, make_room
        self.taken: list[str] = []
        self._undo = ExitStack()
        self._rungs: dict[str, Callable[[], bool]] = {
            "activations=long": lambda: loop.settings.engine != "compile" and self._keep(Keep.LONG),
            "activations=input": lambda: self._keep(Keep.INPUT),
            "teacher_activation_bytes=0": lambda: self.set(loop.teacher, "activation_bytes", 0),
            "smaller chunks": self._smaller_chunks,
            "offload": self._offload,
        }

    def down(self, why: str) -> bool:
        """Take the next rung that makes a difference; False where there is none."""
        while self._rungs:
            name = next(iter(self._rungs))
            if self._rungs.pop(name)():
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                log.warning("step %d: out of memory (%s): again with %s", len(self.loop.history), why, name)
                self.taken.append(name)
                return True
        return False

    def take(self, names: Iterable[str]) -> None:
        """Stand on these rungs, as a run did that is taken up again."""
        for name in names:
            if name in self._rungs and self._rungs.pop(name)():
                self.taken.append(name)

    def restore(self) -> None:
        """Leave everything as it was found: the next instance may be smaller."""
        self._undo.close()

    def set(self, owner: Any, name: str, value: Any) -> bool:
        """Set an attribute until `restore`; False where it has that value already."""
        before = getattr(owner, name)
        if before == value:
            return False
        self._undo.callback(setattr, owner, name, before)
        setattr(owner, name, value)
        return True

    def _keep(self, level: Keep) -> bool:
        transformer = self.loop.reasoner.transformer
        before = kept_levels(transformer)
        after = [max(each, level) for each in before]
        if after == before:
            return False
        self._undo.callback(keep_activations, transformer, before)
        keep_activations(transformer, after)
        return True

    def _smaller_chunks(self) -> bool:
        smaller = self.set(self.loop.teacher, "chunk_patches", 1)  # one frame or pair of frames at a time
        return self.set(self.loop, "decoder_chunk", self.loop.decoder.temporal_stride) or smaller

    def _offload(self) -> bool:
        if not any(part.device.type == "cuda" for part in (self.loop.reasoner, self.loop.teacher)):
            return False
        self.make_room()
        self.set(self.loop.teacher, "offload", True)
        return self.set(self.loop, "offload", True)
