"""A step of the optimisation whose n-th allocation fails, for every n (or every so many): it takes a rung of the memory
ladder and ends as it should, or raises OutOfMemory in one line and leaves everything as it was.

A process of its own, under full_memory.cpp: `python -m tests.trust.full_memory MODELS TRIALS`. Prints each trial before
it starts. Either one allocation fails, be it a tensor's, an operator's or a large one of Python or C++, or all of
tensors and operators from one on.
"""

from __future__ import annotations

import copy
import ctypes
import faulthandler
import json
import logging
import sys
from collections import Counter
from typing import Any

import torch

from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher.errors import OutOfMemory
from vlmteacher.lora.adapter import add_lora, remove_lora
from vlmteacher.optimization.loop import Optimization
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.queries import QuerySet
from vlmteacher.settings import Settings

MEMORY = ctypes.CDLL(None)
MEMORY.full_memory.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_size_t)
MEMORY.room_again.restype = ctypes.c_long
FOREVER = 1 << 60
LARGE = 4096  # bytes


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


class Trials:
    """Steps of one instance, each by a loop of its own from the same state."""

    def __init__(self, models: dict[str, str]) -> None:
        self.pipe = TeacherPipeline.from_pretrained(**models)
        reasoner = self.pipe.reasoner
        self.condition = reasoner.encode(PROMPT, None, 5, 32, 48)
        self.noise = reasoner.noise(self.condition, torch.Generator().manual_seed(0))
        self.outcomes: Counter[str] = Counter()
        add_lora(reasoner.transformer, 2, seed=0)
        for _ in range(2):  # the first one fills caches
            loop = self.loop(None)
            self.states = [copy.deepcopy(loop.state_dict())]
            self.rows = [loop.step()]
            self.states.append(copy.deepcopy(loop.state_dict()))
            self.rows.append(loop.step())
            loop.close()
            remove_lora(reasoner.transformer)
            add_lora(reasoner.transformer, 2, seed=0)

    def loop(self, state: dict[str, Any] | None) -> Optimization:
        settings = Settings(max_steps=3, threshold=1e-6, teacher_frames=4, rank=2, learning_rate=1e-2, keep="best")
        parts = (self.pipe.reasoner, self.pipe.decoder, self.pipe.teacher, self.condition, self.noise)
        loop = Optimization(*parts, QuerySet.from_dict(QUERIES), settings)
        if state is not None:
            loop.load_state_dict(copy.deepcopy(state))
        return loop

    def count(self, number: int, least: int) -> int:
        loop = self.loop(self.states[number])
        MEMORY.full_memory(FOREVER, FOREVER, least)
        loop.step()
        found = MEMORY.room_again()
        loop.close()
        return int(found)

    def trial(self, number: int, first: int, last: int) -> None:
        """Step `number`, of which the allocations from first to last fail."""
        print(f"step {number}, allocations {first} to {'the last' if last == FOREVER else last}", flush=True)
        loop, before = self.loop(self.states[number]), self.states[number]
        MEMORY.full_memory(first, last, FOREVER if last == FOREVER else LARGE)
        try:
            row = loop.step()
        except OutOfMemory as error:
            MEMORY.room_again()
            assert "\n" not in str(error), error
            # The first frames' contrast is that which the same step will find again.
            after = loop.state_dict() | {name: before[name] for name in ("rungs", "first_contrast")}
            assert same(before, after), [key for key in before if not same(before[key], after[key])]
            loop.close()
            loop = self.loop(before)
            row = loop.step()  # with room again
            self.outcomes["OutOfMemory"] += 1
        else:
            MEMORY.room_again()
            self.outcomes["a rung" if "out_of_memory" in row else "no rung needed"] += 1
        after, expected = loop.state_dict(), self.states[1] if number == 0 else None
        loop.close()
        assert abs(row["loss"] - self.rows[number]["loss"]) <= 1e-4 * abs(row["loss"]), row
        if expected is not None:
            for name, value in expected["lora"].items():
                torch.testing.assert_close(after["lora"][name], value, rtol=1e-2, atol=1e-3)


def main(models: str, count: int) -> None:
    faulthandler.enable()
    logging.disable()
    torch.set_num_threads(1)
    trials = Trials(json.loads(models))
    counted = {}
    for number in (0, 1):
        for last, least in ((None, LARGE), (FOREVER, FOREVER)):
            name = f"step {number}, {'all from one on' if last else 'one'}"
            most = counted[name] = trials.count(number, least)
            for first in range(1, most + 1, max(1, most * 4 // count)):
                trials.trial(number, first, last or first)
    print(json.dumps({"outcomes": trials.outcomes, "allocations": counted}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
