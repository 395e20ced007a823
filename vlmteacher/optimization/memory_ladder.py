"""Fit the steps of an optimisation into memory: use what they leave, and need less, rung by rung, when it runs out.

On a GPU the Teacher's layers start with what surely fits, and keep more where a step has left memory unused (`climb`).
Every rung costs time and changes no loss. The rungs, each on top of those before it:

    teacher_activation_bytes=start          as before the first `climb`
    activations=products, =long, =input     the Reasoner's blocks recompute more in the backward
    teacher_activation_bytes=0              so do the Teacher's layers
    smaller chunks                          of the visual encoder and the surrogate decoder
    offload                                 (GPUs) saved activations, and networks that no step needs, in main memory
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch

from vlmteacher.optimization.objective import Objective
from vlmteacher.placement import allocator
from vlmteacher.reasoners.checkpointing import Keep, keep_activations, kept_levels

CLIMBED = 0.9  # of the unused memory: the rest is for what fragments


class MemoryLadder:
    """The rungs for one objective. `taken`: the names of those in effect, in order.

    make_room: moves to main memory the networks that no step needs; called at the rung "offload".
    """

    def __init__(self, objective: Objective, make_room: Callable[[], object] = lambda: None) -> None:
        self.objective, self.make_room = objective, make_room
        self.taken: list[str] = []
        self._undo = ExitStack()
        teacher = objective.teacher
        by_room = teacher.activation_bytes is None  # else it is the user's choice
        self._room = (teacher.room or allocator(teacher.device)) if by_room else None
        compiled = objective.settings.engine == "compile"  # such blocks keep all, or their input
        self._rungs: dict[str, Callable[[], bool]] = {
            "teacher_activation_bytes=start": self._stop_climbing,
            "activations=products": lambda: not compiled and self._keep(Keep.PRODUCTS),
            "activations=long": lambda: not compiled and self._keep(Keep.LONG),
            "activations=input": lambda: self._keep(Keep.INPUT),
            "teacher_activation_bytes=0": lambda: self._set(teacher, "activation_bytes", 0),
            "smaller chunks": self._smaller_chunks,
            "offload": self._offload,
        }

    def start(self) -> None:
        """Measure the memory of a step from now on."""
        if self._room:
            self._room.start()

    def climb(self) -> None:
        """Let the Teacher's layers keep as much more as the step since `start` has left unused, on a GPU."""
        teacher = self.objective.teacher
        if self._room and not self.taken and not teacher.offload:
            more = int(CLIMBED * self._room.unused())
            if more > 0:
                self._set(teacher, "activation_bytes", teacher.kept_bytes + more)

    def _stop_climbing(self) -> bool:
        climbs, self._room = self._room is not None, None
        return climbs and self._set(self.objective.teacher, "activation_bytes", None)

    def down(self) -> str | None:
        """Take the next rung that makes a difference and return its name; None where no rung is left."""
        while self._rungs:
            name = next(iter(self._rungs))
            if self._rungs.pop(name)():
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                self.taken.append(name)
                return name
        return None

    def take(self, names: Iterable[str]) -> None:
        """Take these rungs at once, as a resumed run had."""
        for name in names:
            if name in self._rungs and self._rungs.pop(name)():
                self.taken.append(name)

    def restore(self) -> None:
        """Undo every rung: the next instance may be smaller."""
        self._undo.close()

    def _set(self, owner: Any, name: str, value: Any) -> bool:
        """Set an attribute until `restore`; False where it has that value already."""
        before = getattr(owner, name)
        if before == value:
            return False
        self._undo.callback(setattr, owner, name, before)
        setattr(owner, name, value)
        return True

    def _keep(self, level: Keep) -> bool:
        transformer = self.objective.reasoner.transformer
        before = kept_levels(transformer)
        after = [max(kept, level) for kept in before]
        if after == before:
            return False
        self._undo.callback(keep_activations, transformer, before)
        keep_activations(transformer, after)
        return True

    def _smaller_chunks(self) -> bool:
        objective = self.objective
        encoder = self._set(objective.teacher, "chunk_patches", 1)  # one frame or pair of frames at a time
        return self._set(objective, "decoder_chunk", objective.decoder.temporal_stride) or encoder

    def _offload(self) -> bool:
        objective = self.objective
        if not any(part.device.type == "cuda" for part in (objective.reasoner, objective.teacher)):
            return False
        self.make_room()
        self._set(objective.teacher, "offload", True)
        return self._set(objective, "offload", True)
