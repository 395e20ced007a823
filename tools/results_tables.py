"""Write the microworld's tables of README and docs from a table.json.

    vlmteacher bench microworld --table rewards --seed 402 --limit 100 --workers 2 --out runs/rewards
    python -m tools.results_tables runs/rewards

README has the main methods, docs/results/evaluation.md all methods and the causes of their failures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tools.settings import written

ROOT = Path(__file__).parents[1]
SPLITS = {"id": "in domain", "ood": "out of it"}
MAIN = ("base", "pass@5", "teacher", "goal-only", "process-only")
CAUSES = ("perception", "query", "few_steps", "threshold", "updates")
Entries = Mapping[str, Mapping[str, Any]]


def marks(table: str, tool: str = "results_tables") -> tuple[str, str]:
    """The lines around a table in its page, which `tool` writes."""
    return f"<!-- `python -m tools.{tool}` writes this table: {table} -->\n", "<!-- end -->"


def rate(value: float) -> str:
    """A share without its zero: .37, 1.00."""
    return f"{value:.2f}".removeprefix("0")


def p_value(value: float) -> str:
    return "<.001" if value < 0.001 else "1" if value > 0.9995 else f"{value:.3f}".removeprefix("0")


def lines(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    names = list(columns)
    head, *body = [f"| {' | '.join(row)} |\n" for row in (names, *rows)]
    return "".join([head, "|---" * len(names), "|\n", *body])


def successes(entry: Mapping[str, Any]) -> list[str]:
    """The success rate with its interval, and that of each split."""
    whole = f"{rate(entry['success_rate'])} [{rate(entry['low'])}, {rate(entry['high'])}]"
    return [whole, *(rate(entry[split]["success_rate"]) for split in SPLITS)]


def short(entries: Entries) -> str:
    """The main methods."""
    rows = []
    for method in (name for name in MAIN if name in entries):
        entry, name = entries[method], method
        if "oracle" in entry:
            name += f", picked by the Teacher (the scorer's choice: {rate(entry['oracle']['success_rate'])})"
        costs = [f"{entry['updates_mean']:.1f}", f"{entry['seconds_mean']:.1f}"]
        rows.append([name, *successes(entry), f"{entry['score']:.3f}", *costs])
    return lines(["method", "success [95%]", *SPLITS.values(), "score", "updates", "seconds"], rows)


def full(entries: Entries) -> str:
    """All methods, with their intervals and tests."""
    columns = ["method", "success [95%]", *SPLITS.values(), "score", "wins, losses, p against base"]
    rows = []
    for method, entry in entries.items():
        base, best = entry["against"].get("base"), entry["against"].get("pass@5")
        rows.append(
            [
                f"`{method}`",
                *successes(entry),
                f"{entry['score']:.3f}",
                f"{base['wins']}, {base['losses']}, {p_value(base['sign_p'])}" if base else "",
                p_value(best["sign_p"]) if best else "",
                f"{entry['updates_mean']:.1f}",
                f"{entry['seconds_mean']:.1f}",
            ]
        )
    return lines([*columns, "p against pass@5", "updates", "seconds"], rows)


def failures(entries: Entries) -> str:
    """The causes of failures of the methods that are optimised."""
    rows = []
    for method, entry in entries.items():
        if (counts := entry.get("failures")) and entry["updates_mean"]:
            cells = [str(sum(counts.values())), *(str(counts[name]) for name in CAUSES)]
            rows.append([f"`{method}`", *cells, rate(entry["perception"]), rate(entry["wrong_query"])])
    return lines(["", "failures", *CAUSES, "wrong answer", "wrong query"], rows)


PAGES: Mapping[str, tuple[Callable[[Entries], str], ...]] = {
    "README.md": (short,),
    "docs/results/evaluation.md": (full, failures),
}


def pages(table: Path, root: Path = ROOT) -> dict[Path, str]:
    """The pages under `root` with the tables of a table.json. Raises ValueError for that of another benchmark."""
    content = json.loads(table.read_text())
    if content.get("benchmark") != "microworld" or content["splits"] != list(SPLITS):
        raise ValueError(f"{table} is no table of the microworld's test splits: run bench microworld --table rewards")
    texts = {}
    for page, tables in PAGES.items():
        text = (root / page).read_text()
        for table_of in tables:
            text = written(text, marks(table_of.__name__), table_of(content["methods"]))
        texts[root / page] = text
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="--out of bench microworld --table")
    for page, text in pages(parser.parse_args().folder / "table.json").items():
        page.write_text(text)


if __name__ == "__main__":
    main()
