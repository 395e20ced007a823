"""Draw the diagrams of the docs as SVG: the method, and the rooms of the code.

python -m tools.diagrams

Boxes have colours of their own and arrows are of a middle grey, so that one file can be read on light and dark pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DOCS = Path(__file__).parents[1] / "docs"
ARROW, GRADIENT = "#8a94a6", "#d97706"
FROZEN, TRAINED, DATA, RESULT = "#dbe4f5", "#fde7c2", "#ffffff", "#d5efdd"  # fills, under dark text
EDGE, TEXT = "#5b6b85", "#1c2430"


@dataclass(frozen=True)
class Box:
    """A box with its centre, size and text: a title, and lines below it."""

    x: float
    y: float
    width: float
    height: float
    title: str
    lines: str = ""
    fill: str = FROZEN


def canvas(width: float, height: float) -> Axes:
    """Axes of width x height units, 0.4 inch each, without a background."""
    matplotlib.rcParams.update({"svg.hashsalt": "vlmteacher", "font.family": "DejaVu Sans"})
    figure = plt.figure(figsize=(0.4 * width, 0.4 * height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return axes


def draw(axes: Axes, box: Box) -> None:
    corner = (box.x - box.width / 2, box.y - box.height / 2)
    style = "round,pad=0,rounding_size=0.25"
    axes.add_patch(
        FancyBboxPatch(corner, box.width, box.height, boxstyle=style, facecolor=box.fill, edgecolor=EDGE, linewidth=1)
    )
    lines = box.lines.count("\n") + 1 if box.lines else 0
    top = box.y - 0.26 * lines
    axes.text(box.x, top, box.title, ha="center", va="center", fontsize=9.5, fontweight="bold", color=TEXT)
    if lines:
        axes.text(box.x, top + 0.42, box.lines, ha="center", va="top", fontsize=7.6, color=TEXT, linespacing=1.35)


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str = ARROW,
    label: str = "",
    bend: float = 0.0,
    dashed: bool = False,
) -> None:
    """An arrow, with a label on a background of its own in its middle."""
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=11,
            color=colour,
            linewidth=1.6,
            shrinkA=1,
            shrinkB=1,
            linestyle=(0, (4, 2)) if dashed else "-",
            connectionstyle=f"arc3,rad={bend}",
        )
    )
    if label:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        note(axes, x, y, label)


def note(axes: Axes, x: float, y: float, text: str) -> None:
    background = {"boxstyle": "round,pad=0.25", "facecolor": "#f4f5f7", "edgecolor": "none"}
    axes.text(x, y, text, ha="center", va="center", fontsize=7.6, color=TEXT, bbox=background, linespacing=1.3)


def save(path: Path) -> None:
    plt.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close()


# ---------------------------------------------------------------- the method


def method() -> None:
    """Algorithm 1: the forward pass from left to right, the gradient back, and the final sampling below."""
    axes = canvas(26, 11.8)
    task = Box(2.7, 2.2, 4.4, 2.4, "the task", "prompt, and a first\nframe if there is one", DATA)
    noise = Box(2.7, 6.6, 4.4, 2.0, "noise z1", "one draw for the\nwhole instance", DATA)
    reasoner = Box(9.0, 6.6, 4.8, 3.0, "Reasoner", "few-step video model,\nfrozen", FROZEN)
    lora = Box(9.0, 10.4, 4.8, 1.6, "LoRA", "all that is trained", TRAINED)
    decoder = Box(15.4, 6.6, 4.2, 3.0, "surrogate decoder", "small and frozen,\nK frames only", FROZEN)
    teacher = Box(21.6, 6.6, 4.6, 3.0, "Teacher", "vision-language model,\nfrozen", FROZEN)
    queries = Box(
        21.6, 2.2, 7.4, 2.4, "queries", "one goal question and 1 to 3\nabout the process, each yes or no", DATA
    )
    final = Box(20.3, 10.4, 7.2, 1.6, "the final video", "few-step sampling, standard VAE", RESULT)
    for box in (task, noise, reasoner, lora, decoder, teacher, queries, final):
        draw(axes, box)
    arrow(axes, (4.9, 2.2), (17.9, 2.2), label="the Teacher writes them once, from the task")
    arrow(axes, (21.6, 3.4), (21.6, 5.1))
    arrow(axes, (4.9, 3.0), (6.6, 5.3))
    arrow(axes, (4.9, 6.6), (6.6, 6.6))
    for left, right, label in ((11.4, 13.3, "one-step\nprediction"), (17.5, 19.3, "K\nframes")):
        arrow(axes, (left, 6.1), (right, 6.1))
        note(axes, (left + right) / 2, 4.6, label)
        arrow(axes, (right, 7.4), (left, 7.4), GRADIENT, dashed=True)
    note(axes, 21.6, 8.6, "loss: weighted mean of -log P(Yes)")
    arrow(axes, (9.6, 8.1), (9.6, 9.6), GRADIENT, dashed=True)
    arrow(axes, (8.4, 9.6), (8.4, 8.1))
    note(axes, 15.4, 8.6, "gradient, at most 40 times")
    arrow(axes, (11.4, 10.4), (16.7, 10.4), label="at the end, the same z1")


# ---------------------------------------------------------------- the rooms of the code

ROOMS = [  # in the order of tests/test_house.py
    [
        ("cli/", "one file per command"),
        ("app/", "the page of vlmteacher ui:\nline of runs, folders, server"),
        ("recipes/", "how the packaged models were\ntrained (outside the package)"),
    ],
    [("evaluation/", "benchmarks, sweeps, methods, tables")],
    [("baselines/", "methods to compare with, trained ones among them")],
    [("distillation/", "train and distil a Reasoner, train a surrogate decoder")],
    [("pipeline.py", "TeacherPipeline, whose __call__ is Algorithm 1")],
    [("session.py, output.py", "one call from begin to end, and its result")],
    [
        ("instance.py, frozen_models.py", "checked inputs, the models\non their devices"),
        ("runs/", "run folder, report,\nmodel card"),
        ("planning/", "FLOPs and memory of a\nstep, without a GPU"),
    ],
    [("optimization/", "objective, engines, memory ladder, loop, guards")],
    [
        ("reasoners/", "video models"),
        ("teachers/", "vision-language\nmodels"),
        ("decoders/", "surrogate\ndecoder"),
        ("lora/", "adapter, fused\nlayer, formats"),
        ("rewards.py", "beside the\nTeacher"),
    ],
    [("microworld/", "the built-in world,\nits packaged models"), ("checkpoints/", "hub, weight files")],
    [
        ("ops/", "operators: reference,\nautograd, dispatch"),
        ("csrc/, kernels/", "C++, CUDA, Triton\n(outside the package)"),
    ],
    [("settings, queries, media, prompts, state, placement, ranks, files, errors, ...", "used by all rooms")],
]


def rooms() -> None:
    """The folders in rows: what stands higher may import what stands lower."""
    width, step = 25.0, 2.05
    axes = canvas(width, step * len(ROOMS) + 0.4)
    for row, boxes in enumerate(ROOMS):
        y = 0.2 + step * (row + 0.5)
        room = (width - 2.4) / len(boxes)
        for column, (title, lines) in enumerate(boxes):
            size = min(room - 0.6, 16.0)
            draw(
                axes,
                Box(2.0 + room * (column + 0.5), y, size, step - 0.45, title, lines, FROZEN if row % 2 else RESULT),
            )
    arrow(axes, (0.9, 0.6), (0.9, step * len(ROOMS) - 0.2))
    axes.text(0.45, step * len(ROOMS) / 2, "imports", rotation=90, ha="center", va="center", fontsize=8, color=ARROW)


def main() -> None:
    method()
    save(DOCS / "concepts/method.svg")
    rooms()
    save(DOCS / "internals/architecture.svg")


if __name__ == "__main__":
    main()
