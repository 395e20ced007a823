"""Runs under a cap on the address space: `python memory_ladder_process.py PAIR`; the last line is JSON.

A process of its own, for the cap holds for all of it.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher.errors import OutOfMemory
from vlmteacher.lora import add_lora
from vlmteacher.optimization import Optimization, Settings
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.planning.tracing import Trace
from vlmteacher.queries import QuerySet

torch.set_num_threads(1)
pair = Path(sys.argv[1])
pipe = TeacherPipeline.from_pretrained(pair / "reasoner", pair / "teacher", pair / "decoder.safetensors")
condition = pipe.reasoner.encode(PROMPT, None, 17, 128, 160)
noise = pipe.reasoner.noise(condition, torch.Generator().manual_seed(0))
settings = Settings(max_steps=1, threshold=1e-6, teacher_frames=16, rank=2, learning_rate=1e-2)


def loop() -> Optimization:
    add_lora(pipe.reasoner.transformer, 2, seed=0)
    queries = QuerySet.from_dict(QUERIES)
    return Optimization(pipe.reasoner, pipe.decoder, pipe.teacher, condition, noise, queries, settings)


def cap(beyond: int) -> None:
    """Let the process have `beyond` bytes more than it has now."""
    gc.collect()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + beyond, resource.RLIM_INFINITY))


free = loop()
expected = [row["loss"] for row in free]
traced = loop()
with Trace() as trace:
    traced.step()
peak = trace.peak[""]
found: dict[str, Any] = {"expected": expected, "taken": []}
too_small, enough = 25, 140  # percent; what torch needs besides is not known: halved until a rung is taken
while not found["taken"] and enough - too_small > 1:
    share = (too_small + enough) // 2
    capped = loop()
    cap(peak * share // 100)
    try:
        found["losses"] = [row["loss"] for row in capped]
    except OutOfMemory:
        too_small = share
        continue
    finally:
        capped.close()
    found["taken"] = capped.ladder.taken
    if not found["taken"]:
        enough = share
tight = loop()
cap(peak // 4)
try:
    tight.step()
except OutOfMemory as error:
    found["error"], found["steps"] = str(error), len(tight.history)
tight.close()
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps(found))
