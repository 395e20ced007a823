"""The figures that the paper prints, to stand beside measured ones: data, none of it measured by this project.

Source: arXiv 2606.02564 v3, Tables I to IV. Closed models, Wan2.2-14B and samples of the Reasoner before its
distillation are left out. A blank of the paper is a blank here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SOURCE = "arXiv 2606.02564 v3"

Figures = Mapping[str, Mapping[str, float]]
"""By method, then by column: "overall", "seconds", a split, "split/category", a category or a task."""

CATEGORIES = ("abstraction", "knowledge", "perception", "spatiality", "transformation")
IN, OUT = "In-Domain_50", "Out-of-Domain_50"
RULES = {  # of RULER-Bench, with their tasks in the paper's order, by the names in the data
    "humanity": "transportation sport social safety festival dress food emotion",
    "science": "chemistry physics biology earth math medicine life",
    "hypothetical": "subjective_change objective_change",
    "semantic": "idioms metaphors definition",
    "vision rule": "anomaly color count direction position shape size style view motion",
}
TASKS = tuple(task for tasks in RULES.values() for task in tasks.split())


def _read(columns: tuple[str, ...], text: str) -> Figures:
    """Read lines of a method and its numbers, "-" for a blank."""
    figures = {}
    for line in text.strip().splitlines():
        method, *numbers = line.split()
        values = zip(columns, numbers, strict=True)
        figures[method] = {column: float(number) for column, number in values if number != "-"}
    return figures


TABLE_I = _read(
    ("seconds", "overall", *(part for s in (IN, OUT) for part in (s, *(f"{s}/{name}" for name in CATEGORIES)))),
    """
    many-step-base 87 .676 .713 .675 .722 .715 .733 .715 .639 .711 .618 .642 .678 .548
    base 14 .666 .692 .638 .709 .661 .732 .712 .640 .688 .603 .651 .693 .565
    pass@2 28 .675 .702 .653 .717 .674 .743 .718 .647 .701 .603 .651 .707 .575
    pass@3 42 .678 .707 .659 .719 .679 .748 .722 .650 .702 .603 .651 .720 .576
    pass@4 56 .681 .711 .673 .722 .680 .748 .726 .652 .703 .603 .651 .727 .581
    pass@5 70 .683 .712 .676 .722 .680 .751 .726 .653 .709 .603 .651 .728 .582
    videotpo@2 57 .634 .671 .624 .687 .643 .712 .689 .597 .652 .584 .613 .641 .495
    teacher 69 .781 .803 .806 .920 .837 .820 .787 .759 .873 .765 .759 .818 .639
    """,
)
TABLE_II = _read(
    ("seconds", "overall", *TASKS),
    """
    many-step-base 98 46.7 48.6 57.5 47.9 56.5 65.2 81.7 59.1 37.7 49.2 50.7 50.2 46.0 41.5 44.9 52.5 42.2 58.2 53.7 66.7 60.7 26.7 31.2 35.7 40.7 34.7 35.2 38.7 30.2 35.7 48.2
    base 18 46.4 47.7 57.0 47.2 56.0 64.6 81.0 58.5 37.3 48.3 50.0 49.6 45.3 41.2 44.0 52.1 41.7 57.7 53.3 66.3 60.2 26.7 31.5 36.0 40.8 35.0 35.6 39.0 30.6 35.9 48.8
    pass@5 90 49.1 49.9 58.8 49.4 58.0 65.3 82.4 59.9 41.1 50.5 52.8 53.4 47.6 43.8 44.7 52.8 42.0 58.1 53.9 68.3 62.5 32.1 36.2 37.8 45.6 40.4 40.3 44.4 35.3 41.0 50.6
    pe 20 48.3 47.2 59.5 46.7 59.0 69.6 83.8 62.0 33.8 50.3 51.0 48.1 47.8 42.4 49.5 56.6 46.7 63.2 57.3 68.8 59.7 27.7 33.0 39.5 42.3 33.5 37.6 37.2 32.1 37.9 52.8
    videotpo@2 71 50.3 48.5 61.5 47.9 61.2 72.4 85.9 64.3 35.8 52.4 52.8 49.3 49.8 43.9 52.6 59.4 50.1 66.6 60.1 71.0 60.8 29.1 34.7 41.7 43.9 34.6 39.3 38.4 33.8 39.8 55.3
    teacher 88 68.2 78.6 79.8 75.3 85.6 72.8 93.8 91.0 63.7 85.9 79.2 83.4 57.4 70.2 53.0 59.6 49.5 66.9 76.6 81.5 86.7 65.0 66.1 61.3 64.8 46.9 54.0 51.3 51.6 56.0 69.1
    """,  # noqa: E501
)
TABLE_III = _read(
    ("overall", IN, OUT),
    """
    post .688 .716 .660
    flow-grpo .681 .707 .655
    generic .712 .739 .685
    goal-only .758 .782 .734
    process-only .692 .718 .666
    many-step .714 .739 .689
    last-step .705 .713 .698
    full-step .769 .792 .746
    frames@half .773 .797 .749
    frames@double .782 .805 .759
    steps@0 .666 .692 .640
    steps@5 .710 .735 .685
    steps@10 .750 .774 .726
    steps@16 .781 .803 .759
    steps@20 .783 .804 .762
    steps@40 .778 .800 .756
    teacher .781 .803 .759
    """,
)
TABLE_IV = _read(
    ("overall", "humanity", "science", "hypothetical", "semantic", "vision rule"),
    """
    base 46.4 55.5 47.5 50.3 58.6 36.1
    teacher 68.2 79.9 70.6 58.9 80.8 58.1
    teacher+InternVL3-8B 68.1 79.7 70.4 58.7 80.5 58.2
    teacher+Qwen3-VL-8B 69.2 80.7 71.5 59.5 81.6 59.4
    base+HunyuanVideo-1.5 35.8 43.0 36.5 39.5 46.0 27.5
    teacher+HunyuanVideo-1.5 44.5 51.0 44.0 43.5 54.0 38.3
    """,
)
PRINTED: Mapping[tuple[str, str], Figures] = {
    ("vbvr", "I"): TABLE_I,
    ("vbvr", "III"): TABLE_III,
    ("vbvr", "paper"): {**TABLE_III, **TABLE_I},
    ("ruler", "II"): TABLE_II,
    ("ruler", "IV"): TABLE_IV,
    ("ruler", "paper"): TABLE_II,
}


def figures(benchmark: str, table: str, methods: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return what the paper prints for methods of a table on a benchmark; nothing where it has no such table.

    A method with another model, as "teacher+Qwen3-VL-8B-Instruct", has the figures of the model that its name begins
    with.
    """
    chosen = {}
    for method in methods:
        for name, row in PRINTED.get((benchmark, table), {}).items():
            if method == name or ("+" in name and plain(method).startswith(plain(name))):
                chosen[method] = dict(row)
    return chosen


def plain(name: str) -> str:
    """Return the name of a column or part without what spellings differ in."""
    return "".join(c for c in name.casefold() if c.isalnum() or c in "/+")
