"""What a plan means for a user: seconds of a step by card, and the flags of `solve`."""

from __future__ import annotations

import os
from typing import Any

from vlmteacher.planning.models import read_known

# memory in GB and the published peak of dense bfloat16 products with float32 sums, in TFLOPS
CARDS: dict[str, tuple[int, float]] = {
    "RTX 4090": (24, 165),
    "RTX 5090": (32, 210),
    "A100 40GB": (40, 312),
    "L40S": (48, 362),
    "A100 80GB": (80, 312),
    "H100": (80, 989),
    "H200": (141, 989),
    "B200": (180, 2250),
}
SHARE = 0.4  # of the peak that large products and attention reach together; an assumption, measured on none of these


def seconds_by_card(flops: int, peak_bytes: int) -> dict[str, float | None]:
    """Seconds of a step on each card at `SHARE` of its peak; None where the step does not fit its memory."""
    return {
        name: flops / (SHARE * tflops * 1e12) if peak_bytes <= memory * 1e9 else None
        for name, (memory, tflops) in CARDS.items()
    }


def solve_flags(plan: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The flags of `vlmteacher solve` that make the plan's step, by their names without dashes."""
    ours = plan["ours"]["settings"]
    flags = {name: plan[name] for name in ("num_frames", "height", "width", "teacher_frames", "windows")}
    flags |= {"rank": ours["rank"], "activations": ours["activations"], "dtype": dtype}
    flags |= {name: ours[name] for name in ("quantize_reasoner",) if name in ours}
    for kind in ("reasoner", "teacher"):
        if plan[kind] != "packaged":  # a directory or a hub id is a name for `solve` too
            known = "/" not in plan[kind] and not os.path.isdir(plan[kind])
            flags[kind] = read_known(plan[kind], kind)["source"] if known else plan[kind]
    if os.path.isfile(plan["decoder"]):
        flags["decoder"] = plan["decoder"]
    return flags | ({"offload": True} if ours["text_encoder"] == "cpu" else {})
