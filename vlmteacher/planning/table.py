"""Format a plan as a table."""

from __future__ import annotations

from typing import Any

from vlmteacher.planning.cards import SHARE
from vlmteacher.planning.plan import GB


def format_plan(plan: dict[str, Any]) -> str:
    """Format a plan as a table of stages, ours beside stock, with weights, settings and advice."""
    ours, stock = plan["ours"], plan["stock"]
    lines = [
        f"{plan['reasoner']} + {plan['teacher']} + {plan['decoder']}",
        f"{plan['num_frames']} frames {plan['height']}x{plan['width']}, {plan['reasoner_tokens']} tokens; "
        f"the Teacher sees {plan['teacher_frames']}, {plan['questions']} questions, {plan['teacher_tokens']} tokens",
        "",
        f"{'':28}{'TFLOP':>22}{'peak GB':>22}",
        f"{'stage':28}{'ours':>11}{'stock':>11}{'ours':>11}{'stock':>11}",
    ]
    names = list(dict.fromkeys([*ours["stages"], *stock["stages"]]))
    order = {part: i for i, part in enumerate(dict.fromkeys(name.rpartition(".")[0] or name for name in names))}
    rows = ("forward", "recompute", "backward")
    names.sort(key=lambda n: (order[n.rpartition(".")[0] or n], rows.index(n.rpartition(".")[2]) if "." in n else 0))

    def cells(key: str, unit: float, name: str | None) -> str:
        both = [(part if name is None else part["stages"].get(name, {})).get(key) for part in (ours, stock)]
        return "".join(
            f"{'-' if value is None else format(value / unit, '.4g' if unit == 1e12 else '.1f'):>11}" for value in both
        )

    lines += [f"{name:28}{cells('flops', 1e12, name)}{cells('peak_bytes', GB, name)}" for name in names]
    lines += [f"{'step':28}{cells('flops', 1e12, None)}{cells('peak_bytes', GB, None)}", ""]
    weights = ", ".join(f"{name} {size / GB:.2f}" for name, size in ours["weights"].items())
    lines += [f"weights (GB, in every peak): {weights}", f"FLOPs of ours: {plan['ratio']:.1%} of stock"]
    lines.append(f"`solve --fp8` would save {plan['fp8_saves_bytes'] / GB:.2f} GB of the weights, with its errors")
    others = ", ".join(f"{choice} {size / GB:.2f}" for choice, size in plan["quantization_saves_bytes"].items())
    lines.append(f"`solve --quantize-reasoner` saves, of plain weights, in GB: {others}")
    seconds = ", ".join(f"{card} {s:.3g}" for card, s in plan["seconds"].items() if s is not None)
    if seconds:
        lines.append(f"seconds of a step, estimated at {SHARE:.0%} of each card's peak: {seconds}")
    settings = ", ".join(f"{name} {value}" for name, value in ours["settings"].items())
    room = plan["memory_bytes"] / GB
    if plan["fits"]:
        lines.append(f"It fits in {room:g} GB with: {settings}")
    else:
        lines.append(f"It does not fit in {room:g} GB: the least is {ours['peak_bytes'] / GB:.1f} GB, with {settings}")
        lines += [f"  {text}" for text in plan["advice"]]
    return "\n".join(lines)
