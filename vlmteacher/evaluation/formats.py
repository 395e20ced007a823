"""table.json as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmteacher.evaluation.failures import CAUSES
from vlmteacher.evaluation.methods import Row
from vlmteacher.evaluation.paper import SOURCE, plain
from vlmteacher.files import write_json, write_text

COSTS = {
    "updates": "updates_mean",
    "seconds": "seconds_mean",
    "generator calls": "generator_calls_mean",
    "VLM calls": "vlm_calls_mean",
}
LATEX = {
    "\\": r"\textbackslash{}",
    **{c: rf"\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


@dataclass(frozen=True)
class Grid:
    """A table of texts: names of the columns, and rows of as many cells."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def write_table(content: Row, out: Path) -> None:
    """Write table.json, and table.md, table.csv and table.tex of the same content. Raises OutputError."""
    write_json(out / "table.json", content)
    write_text(out / "table.md", format_table(content) + "\n")
    write_text(out / "table.csv", format_csv(content))
    write_text(out / "table.tex", format_latex(content))


def format_table(content: Row) -> str:
    """Format table.json as Markdown: results, scores of the parts, causes of failures, and what was not run."""
    parts = [note for note in [content["caption"], _source(content)] if note]
    for grid in grids(content):
        lines = [grid.columns, ("---",) * len(grid.columns), *grid.rows]
        parts.append("\n".join(f"| {' | '.join(_pipes(cells))} |" for cells in lines))
    parts.append("\n".join(_not_run(content)))
    return "\n\n".join(parts).strip()


def _pipes(cells: Sequence[str]) -> list[str]:
    return [cell.replace("|", r"\|") for cell in cells]


def format_latex(content: Row) -> str:
    """Format table.json as LaTeX: one `table` for each grid, with the rules of the package booktabs."""
    notes = " ".join(note for note in [content["caption"], _source(content), *_not_run(content)] if note)
    text = "% \\usepackage{booktabs}\n"
    for grid in grids(content):
        lines = [" & ".join(map(escape, cells)) + r" \\" for cells in (grid.columns, *grid.rows)]
        text += "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{escape(notes)}}}",
                rf"\begin{{tabular}}{{l{'r' * (len(grid.columns) - 1)}}}",
                r"\toprule",
                lines[0],
                r"\midrule",
                *lines[1:],
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )
    return text


def escape(text: str) -> str:
    """Return `text` as LaTeX that prints it; a minus of a number is one."""
    text = "".join(LATEX.get(c, c) for c in text)
    return re.sub(r"(?<![\w$.])-(?=\d)", "$-$", text)


def format_csv(content: Row) -> str:
    """Format table.json as one value a line; the paper's figure stands beside ours in a column of its own."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("method", "part", "measure", "value", "low", "high", f"paper ({SOURCE})", "note"))
    for method, printed, entry in _methods(content):
        rest = {plain(name): (name, value) for name, value in printed.items()}
        note = "" if entry else f"not run: {content['missing'][method]}"
        for part, measure, cells in _values(content, entry):
            _, figure = rest.pop(plain(_printed_as(content, part, measure)), ("", ""))
            writer.writerow((method, part, measure, *cells, figure, note))
        for name, value in rest.values():  # what has no counterpart here
            writer.writerow((method, name, "", "", "", "", value, note))
        if note and not rest:
            writer.writerow((method, "", "", "", "", "", "", note))
    return file.getvalue()


def _printed_as(content: Row, part: str, measure: str) -> str:
    """Return the paper's column for a measure; "" where it has none."""
    if part:
        return part if measure == "score" else ""
    headline = next((name for entry in content["methods"].values() for name in entry["overall"]), "score")
    return "overall" if measure == headline else measure


def _values(content: Row, entry: Row) -> Iterator[tuple[str, str, tuple[Any, Any, Any]]]:
    """Yield the part, the measure, and the value of a method with its interval."""
    if not entry:
        return
    for measure, low, high in (("success_rate", "low", "high"), ("score", "score_low", "score_high")):
        if entry[measure] is not None:
            yield "", measure, (entry[measure], entry[low], entry[high])
    for name, values in entry["overall"].items():
        yield "", name, (values["value"], values["low"], values["high"])
    scale = content["scale"]
    for part, values in {**{name: entry[name] for name in content["splits"]}, **entry["parts"]}.items():
        if values["success_rate"] is not None:
            yield part, "success_rate", (values["success_rate"], "", "")
        if values["score"] is not None:
            yield part, "score", (scale * values["score"], "", "")
    for name, key in COSTS.items():
        if entry.get(key) is not None:
            yield "", name, (entry[key], "", "")


# ---------------------------------------------------------------- grids


def grids(content: Row) -> list[Grid]:
    """Return the tables of texts: results, scores of the parts, causes of failures; those without rows are left out."""
    found = [_results(content), _parts(content), _failures(content)]
    return [grid for grid in found if grid.rows]


def _methods(content: Row) -> Iterator[tuple[str, Row, Row]]:
    """Yield each method with the paper's figures and its entry, which is empty where it was not run.

    The paper's pass@N picks by the benchmark's own score: its figures belong to that choice among the samples.
    """
    printed = content["paper"]
    for name, entry in content["methods"].items():
        if "oracle" in entry:
            yield name, {}, entry
            yield f"{name}, the scorer's choice", printed.get(name, {}), entry["oracle"]
        else:
            yield name, printed.get(name, {}), entry
    for name in content["missing"]:
        yield name, printed.get(name, {}), {}


def _results(content: Row) -> Grid:
    """Return the results of the methods; the paper's columns come after ours."""
    scale, printed = content["scale"], content["paper"]
    names = [name for name in ("overall", *_splits(content), "seconds") if any(name in row for row in printed.values())]
    columns = list(next((_cells(content, entry) for entry in content["methods"].values()), {"": ""}))
    rows = []
    for method, figures, entry in _methods(content):
        ours = _cells(content, entry).values() if entry else ["not run", *[""] * (len(columns) - 1)]
        paper = [_figure(figures.get(name), 1 if name == "seconds" else scale) for name in names]
        rows.append((method, *ours, *paper))
    return Grid(("method", *columns, *(f"paper: {name}" for name in names)), rows)


def _splits(content: Row) -> list[str]:
    splits: list[str] = content["splits"]
    return splits if len(splits) > 1 else []


def _cells(content: Row, entry: Row) -> dict[str, str]:
    """Return a method's results by column."""
    entries, scale = content["methods"].values(), content["scale"]
    wins = any(each["success_rate"] is not None for each in entries)
    cells = {}
    if wins:
        cells["success [95%]"] = _interval(entry["success_rate"], entry["low"], entry["high"])
    for name, value in entry["overall"].items():
        cells[f"{name} [95%]"] = _interval(value["value"], value["low"], value["high"], scale)
    for split in _splits(content):
        cells[split] = _part(entry[split], scale, wins)
    if not entry["overall"]:
        cells["score [95%]"] = _interval(entry["score"], entry["score_low"], entry["score_high"])
    for other in content["against"]:
        comparison = entry.get("against", {}).get(other)
        cells[f"against {other}: {'success, p; ' if wins else ''}score, p"] = _against(comparison)
    for name, key in COSTS.items():
        cells[name] = "" if entry.get(key) is None else f"{entry[key]:.1f}"
    return cells | {"n": str(entry["n"])}


def _parts(content: Row) -> Grid:
    """Return the scores of the parts (tasks or categories), a part a row; the paper's columns come after ours."""
    scale = content["scale"]
    methods = [(name, {plain(part): value for part, value in row.items()}, e) for name, row, e in _methods(content)]
    parts = list(dict.fromkeys(part for _, _, entry in methods for part in entry.get("parts", {})))
    ours = [(name, entry["parts"]) for name, _, entry in methods if entry]
    theirs = [(name, row) for name, row, _ in methods if any(plain(part) in row for part in parts)]
    rows = []
    for part in parts:
        cells = [_part(values.get(part, {"score": None}), scale, False) for _, values in ours]
        rows.append((part, *cells, *(_figure(row.get(plain(part)), scale) for _, row in theirs)))
    return Grid(("score", *(name for name, _ in ours), *(f"paper: {name}" for name, _ in theirs)), rows)


def _failures(content: Row) -> Grid:
    causes = [name.replace("_", "-") for name in CAUSES]
    rows = []
    for name, entry in content["methods"].items():
        if "failures" in entry:
            counts = [sum(entry["failures"].values()), *entry["failures"].values(), entry["judgements"]]
            rows.append((name, *map(str, counts), f"{entry['perception']:.3f}", f"{entry['wrong_query']:.3f}"))
    return Grid(("method", "failures", *causes, "judgements", "wrong answer", "wrong query"), rows)


def _source(content: Row) -> str:
    """Return what the paper's columns are; "" without any."""
    note = (
        f'Columns marked "paper" are printed in {SOURCE}, for its own models on all instances, and not measured here.'
    )
    return note if content["paper"] else ""


def _not_run(content: Row) -> list[str]:
    """Return what is not in the table, a line each."""
    scenes = [
        f"Left out of the methods{suffix and f' with {suffix[1:]}'}: {count} scenes, of which an instance failed."
        for suffix, count in content.get("left_out", {}).items()
    ]
    return scenes + [f"Not run: {name}: {reason}" for name, reason in content["missing"].items()]


def _number(value: float | None, scale: float = 1) -> str:
    return "" if value is None else f"{value:.{3 if scale == 1 else 1}f}"


def _figure(value: float | None, scale: float) -> str:
    return "" if value is None else f"{value:.3f}" if scale == 1 and value < 1 else f"{value:g}"


def _interval(value: float | None, low: float, high: float, scale: float = 1) -> str:
    return "" if value is None else f"{_number(value, scale)} [{_number(low, scale)}, {_number(high, scale)}]"


def _part(values: Row, scale: float, wins: bool) -> str:
    if wins:
        return _number(values["success_rate"])
    return "" if values["score"] is None else _number(scale * values["score"], scale)


def _against(comparison: Row | None) -> str:
    if comparison is None:
        return ""
    score = f"{comparison['score_difference']:+.3f}, {comparison['permutation_p']:.3f}"
    if comparison["success_difference"] is None:
        return score
    return f"{comparison['success_difference']:+.3f}, {comparison['sign_p']:.3f}; {score}"
