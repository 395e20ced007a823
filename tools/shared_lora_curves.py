"""Draw the curves of post-training and Flow-GRPO: ``python -m tools.shared_lora_curves`` (extra: docs).

The Teacher's loss in training and on held-out prompts, from the logs in docs/results/shared_lora.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).parents[1] / "docs/results/shared_lora"


def curve(axis: Axes, name: str, entry: str, label: str, sign: int = 1, window: int = 1) -> None:
    """Plot an entry of a log, times `sign`, against the step; over several rows as a mean of the last `window`."""
    rows = [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]
    values = [sign * row[entry] for row in rows]
    smooth = [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
    axis.plot([row["step"] for row in rows], smooth, label=label, marker="o" if window == 1 else None, markersize=3)


def main() -> None:
    plt.rcParams.update(
        {"svg.hashsalt": "vlmteacher", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, (post, grpo) = plt.subplots(1, 2, figsize=(8.5, 2.9), layout="constrained", sharey=True)
    curve(post, "post", "loss", "training, one step", window=5)
    curve(post, "post-validation", "loss_one_step", "held out, one step")
    curve(post, "post-validation", "loss_few_step", "held out, few steps")
    post.set(title="shared post-training", ylabel="the Teacher's loss")
    curve(grpo, "grpo", "reward", "training, few steps", sign=-1, window=3)
    curve(grpo, "grpo-validation", "loss_one_step", "held out, one step")
    curve(grpo, "grpo-validation", "loss_few_step", "held out, few steps")
    grpo.set(title="Flow-GRPO", ylim=(0, None))
    for axis in (post, grpo):
        axis.set_xlabel("step")
        axis.legend(frameon=False)
    figure.savefig(HERE / "curves.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
