"""Draw the curves of docs/results/distillation.md: ``python -m tools.distillation_curves`` (extra: docs).

Training loss, DMD2's losses and the gap between one step and four, from the logs in docs/results/distillation.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).parents[1] / "docs/results/distillation"


def rows(name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]


def curve(axis: Axes, name: str, entry: str, label: str, window: int = 5) -> None:
    """Plot an entry of the log against the step, and its running mean over `window` rows."""
    logged = [row for row in rows(name) if entry in row]
    steps, values = [row["step"] for row in logged], [row[entry] for row in logged]
    smooth = [
        sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
        for i in range(len(values))
    ]
    (line,) = axis.plot(steps, smooth, label=label)
    axis.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.8)


def main() -> None:
    plt.rcParams.update(
        {"svg.hashsalt": "vlmteacher", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 2.9), layout="constrained")
    curve(axes[0], "sft", "flow", "training")
    curve(axes[0], "sft-validation", "flow", "held out", window=1)
    axes[0].set(title="many-step: flow-matching loss", ylim=(0.1, 0.25))
    curve(axes[1], "dmd2", "fake", "fake score's loss")
    curve(axes[1], "dmd2", "error", "student - real score, RMS")
    axes[1].set(title="DMD2")
    for name, label in (("dmd2", "DMD2"), ("consistency", "consistency"), ("few-timesteps", "few timesteps")):
        curve(axes[2], f"{name}-validation", "relative_rms", label, window=1)
    axes[2].set(title="one step against four, relative RMS", ylim=(0, None))
    for axis in axes:
        axis.set_xlabel("step")
        axis.legend(frameon=False)
    figure.savefig(HERE / "curves.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
