"""Draw true score against the Teacher's loss: ``python -m tools.hacking_picture DIR FILE.svg`` (extra: docs).

DIR holds the results.json of ``vlmteacher bench microworld --method teacher --trace --out DIR``. The picture of
docs/results/evaluation.md: mean loss and score over the steps, their change in each instance, the guards. An instance
that has stopped keeps its last values.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from vlmteacher.optimization.guards import GUARDS


def curves(instances: list[dict[str, Any]], value: Any) -> np.ndarray:
    """Return `value(row)` as (instances, steps); an instance that has stopped keeps its last value."""
    length = max(len(each["steps"]) for each in instances)
    rows = [[value(row) for row in each["steps"]] for each in instances]
    return np.array([row + row[-1:] * (length - len(row)) for row in rows])


def mean_curve(axis: Axes, values: np.ndarray, label: str, color: str) -> None:
    mean, error = values.mean(0), values.std(0) / np.sqrt(len(values))
    axis.plot(mean, color=color, label=label)
    axis.fill_between(range(len(mean)), mean - error, mean + error, color=color, alpha=0.2, linewidth=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, metavar="DIR")
    parser.add_argument("picture", type=Path, metavar="FILE.svg")
    arguments = parser.parse_args()
    instances = json.loads((arguments.results / "results.json").read_text())["instances"]
    instances = [each for each in instances if each["steps"]]

    plt.rcParams.update(
        {"svg.hashsalt": "vlmteacher", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
    )
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    loss, score = (curves(instances, lambda row, name=name: row[name]) for name in ("loss", "score"))
    mean_curve(left, loss, "Teacher's loss", "C0")
    twin = left.twinx()
    mean_curve(twin, score, "true score", "C1")
    left.set(xlabel="step", ylabel="Teacher's loss", ylim=(0, None), title=f"mean of {len(instances)} instances")
    twin.set(ylabel="true score", ylim=(0, 1))
    left.legend(handles=[*left.lines, *twin.lines], frameon=False)

    better = score[:, -1] > score[:, 0] + 0.01
    worse = score[:, -1] < score[:, 0] - 0.01
    for chosen, color, label in (
        (better, "C2", "score rose"),
        (worse, "C3", "score fell"),
        (~better & ~worse, "0.7", "the same"),
    ):
        start, change = loss[chosen, 0] - loss[chosen, -1], score[chosen, -1] - score[chosen, 0]
        middle.scatter(start, change, color=color, s=14, label=f"{label}: {chosen.sum()}")
    middle.set(xlabel="fall of the Teacher's loss", ylabel="rise of the true score", title="an instance each")
    middle.legend(frameon=False)

    for place, name in enumerate(GUARDS):
        values = curves(instances, lambda row, name=name: row["guards"][name])
        whole = 6.0 if name == "colour_entropy" else 1.0  # bits
        right.plot((values.mean(0) - values[:, 0].mean()) / whole, color=f"C{place}", label=name.replace("_", " "))
    right.set(xlabel="step", title="guards: change, as a share of their range")
    right.legend(frameon=False)
    figure.savefig(arguments.picture, metadata={"Date": None})
    print(f"loss {loss[:, 0].mean():.3f} -> {loss[:, -1].mean():.3f}, score {score[:, 0].mean():.3f} -> ", end="")
    print(f"{score[:, -1].mean():.3f}; rose in {better.sum()}, fell in {worse.sum()} of {len(instances)}")


if __name__ == "__main__":
    main()
