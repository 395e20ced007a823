"""Instances one after the other in one process, and what stays in memory: `make soak`.

    python -m tests.trust.soak [INSTANCES]

Each is a whole call on the tiny pair, in turn with and without a first frame, with a run folder, from a LoRA, in
another size, refused for bad input, or broken off by its callback. Memory is what is resident and of no file after each
instance, without garbage collection by hand; the growth is that of its median from the second tenth of the instances
(what comes before is warm-up) to the last tenth. Objects are those that the garbage collector knows after a collection,
in the same places.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from tests.tiny_pair import PROMPT, QUERIES, tiny_pair
from tests.trust.report import count

MOST = 0.01  # growth of memory and of objects


@dataclass(frozen=True)
class Soak:
    """instances: that were run; refused, broken: of these, not to their end. memory, objects: growth, as a share."""

    instances: int
    refused: int
    broken: int
    resident: int
    memory: float
    objects: float

    def __str__(self) -> str:
        return (
            f"{self.instances} instances ({self.refused} refused, {self.broken} broken off): {self.resident >> 20} MiB"
            f" resident, growth {self.memory:+.2%} of memory, {self.objects:+.2%} of objects"
        )


class BrokenOff(Exception):
    """Raised by a callback."""


def break_off(*_: Any) -> None:
    raise BrokenOff


def soak(instances: int, folder: Path) -> Soak:
    """Run so many, 20 at least."""
    from vlmteacher.errors import InputError
    from vlmteacher.pipeline import TeacherPipeline
    from vlmteacher.queries import QuerySet

    pipe = TeacherPipeline.from_pretrained(**tiny_pair(folder / "pair"), dtype=torch.float32, device_map="cpu")
    image, queries = Image.new("RGB", (48, 32), (200, 30, 30)), QuerySet.from_dict(QUERIES)
    common: dict[str, Any] = {"queries": queries, "max_steps": 2, "threshold": 1e-9, "rank": 2, "teacher_frames": 4}
    common["progress"] = False
    lora = pipe(PROMPT, **common)
    kinds: list[dict[str, Any]] = [
        {},
        {"image": image},
        {"run_dir": folder / "run"},
        {"height": 48, "output_type": "pt"},
        {"num_frames": 9, "check_final": True},
        {"callback_on_step_end": break_off},
        {"width": 33},
        {"rank": None},
    ]
    refused = broken = 0
    resident: list[int] = []
    objects: list[int] = []
    for number in range(instances):
        kind = kinds[number % len(kinds)]
        pipe.load_lora(lora if "rank" in kind else None)
        try:
            pipe(PROMPT, generator=torch.Generator().manual_seed(number), **common | kind)
        except InputError:
            refused += 1
        except BrokenOff:
            broken += 1
        shutil.rmtree(folder / "run", ignore_errors=True)
        resident.append(resident_bytes())
        if number % len(kinds) == 0:
            gc.collect()
            objects.append(len(gc.get_objects()))
    return Soak(instances, refused, broken, resident[-1], growth(resident), growth(objects))


def growth(values: list[int]) -> float:
    """From the second tenth to the last."""
    tenth = max(1, len(values) // 10)
    first, last = median(values[tenth : 2 * tenth]), median(values[-tenth:])
    return (last - first) / first


def resident_bytes() -> int:
    """Anonymous memory: pages of files, such as the libraries, come and go with what else the machine does."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def main(instances: int) -> int:
    os.environ["VLMTEACHER_CHECK_DECODER"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        found = soak(instances, Path(folder))
    print(found)
    good = found.memory < MOST and found.objects < MOST
    count("instances in one process", instances, f"memory {found.memory:+.2%}, objects {found.objects:+.2%}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
