"""Write what is made from the fields of `vlmteacher.settings` into files: `Keywords` and the table of the docs.

python -m tools.settings
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from vlmteacher import settings

ROOT = Path(__file__).parents[1]
PAGE = "docs/guides/settings.md"
KEYWORDS = "    # written by `python -m tools.settings`:\n", "\n\n@dataclass(frozen=True)\nclass Settings("
TABLE = "<!-- written by `python -m tools.settings` -->\n", "<!-- end -->"


def keywords() -> str:
    """The body of `Keywords`."""
    names = [each for group in settings.GROUPS for each in fields(group)]
    kinds = [str(each.type).removesuffix(" | None").replace("'", '"') for each in names]
    return "".join(f"    {each.name}: {kind} | None\n" for each, kind in zip(names, kinds, strict=True))


def table() -> str:
    """A table of the settings for each group, in Markdown."""
    text = ""
    for group in settings.GROUPS:
        text += f"\n## {group.__name__}\n\n{group.__doc__}\n\n"
        text += "| keyword | flag | default | values | |\n|---|---|---|---|---|\n"
        for each in fields(group):
            kind = settings.types()[each.name]
            if kind in (int, float):
                values = settings.range_text(each)
            elif kind is bool:
                values = "`true`, `false`"
            else:
                names = settings.choices(each.name) or (each.metadata["metavar"],)
                values = ", ".join(f"`{name}`" for name in names).replace("|", "\\|")
            default = "" if each.default is None else json.dumps(each.default).strip('"')
            text += f"| `{each.name}` | `{settings.flag(each)}` | {default} | {values} | {each.metadata['help']} |\n"
    return text + "\n"


def written(text: str, marks: tuple[str, str], content: str) -> str:
    """`text` with `content` between the marks."""
    before, rest = text.split(marks[0], 1)
    return before + marks[0] + content + marks[1] + rest.split(marks[1], 1)[1]


def files() -> dict[Path, str]:
    """What each file must hold."""
    parts = {"vlmteacher/settings.py": (KEYWORDS, keywords()), PAGE: (TABLE, table())}
    return {ROOT / name: written((ROOT / name).read_text(), *part) for name, part in parts.items()}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
