"""Line charts as the numbers that the macro `draw` of `templates/macros.html` draws, in the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 40, 36, 12, 28  # margins; the end marks stand in the right one


@dataclass(frozen=True)
class Chart:
    """A chart of WIDTH x HEIGHT units.

    Attributes:
        label: what it shows, for a screen reader.
        lines: one for each series: "name", "points" of the polyline, "dots" with x, y and a title, and "end", a dot
            beside the steps, or None.
        x_ticks, y_ticks: place and text.
        levels: horizontal lines: place and text.
    """

    label: str
    lines: list[dict[str, Any]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    levels: list[tuple[float, str]]
    box: tuple[int, int, int, int] = field(default=(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM))
    size: tuple[int, int] = (WIDTH, HEIGHT)


def line_chart(
    label: str,
    series: Mapping[str, Sequence[float]],
    low: float = 0.0,
    high: float | None = None,
    levels: Mapping[str, float] | None = None,
    ends: Mapping[str, float] | None = None,
) -> Chart:
    """A chart of series over the steps from 0.

    low, high: range of the values, by default up to the largest one. levels: horizontal lines by their text. ends: a
    value of each series that belongs to the final video.
    """
    levels, ends = levels or {}, ends or {}
    values = [value for row in series.values() for value in row] + [*levels.values(), *ends.values()]
    top = max(values, default=1.0) * 1.05 if high is None else high
    top = top if top > low else low + 1
    steps = max((len(row) for row in series.values()), default=0)

    def x(step: float) -> float:
        return round(LEFT + step * (WIDTH - LEFT - RIGHT) / max(steps - 1, 1), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - low) / (top - low) * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for name, row in series.items():
        dots = [(x(step), y(value), f"step {step}: {value:.3f}") for step, value in enumerate(row)]
        end = (WIDTH - RIGHT + 18, y(ends[name]), f"final video: {ends[name]:.3f}") if name in ends else None
        points = " ".join(f"{a},{b}" for a, b, _ in dots)
        lines.append({"name": name, "points": points, "dots": dots, "end": end})
    return Chart(
        label,
        lines,
        [(x(step), f"{step:g}") for step in ticks(0, max(steps - 1, 1), 6) if step == int(step)],
        [(y(value), f"{value:g}") for value in ticks(low, top, 5)],
        [(y(value), text) for text, value in levels.items()],
    )


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers from `low` to `high`."""
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [round(k * step, 10) for k in range(math.ceil(low / step), math.floor(high / step * 1.0001) + 1)]


def sparkline(values: Sequence[float], width: int = 120, height: int = 28) -> str:
    """The points of a polyline without axes, scaled to its own range."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return " ".join(
        f"{2 + k * (width - 4) / max(len(values) - 1, 1):.1f},{height - 3 - (value - low) / span * (height - 6):.1f}"
        for k, value in enumerate(values)
    )
