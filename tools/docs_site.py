"""Build the documentation's site into build/site, and check that its pages load nothing from outside.

python -m tools.docs_site

mkdocs also runs this file as its hooks: the navigation follows the tables of docs/index.md, and files of the repository
that pages link to (CONTRIBUTING.md, examples, ...) are taken into the site under repository/.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build/site"
TARGET = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
}
LINK_KINDS = {"stylesheet", "preload", "preconnect", "dns-prefetch", "icon", "modulepreload", "manifest"}


# ---------------------------------------------------------------- hooks of mkdocs


def on_config(config: Any) -> Any:
    """Set the navigation: the index, then its headings with the pages of their tables."""
    config.nav = navigation((ROOT / "docs/index.md").read_text())
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside docs/ to which pages link, directly or through others of them."""
    from mkdocs.structure.files import File

    waiting = [f"docs/{file.src_uri}" for file in files if file.src_uri.endswith(".md")]
    done = set(waiting)
    while waiting:
        for path in linked(waiting.pop()):
            if path in done or path.startswith("docs/") or not (ROOT / path).is_file():
                continue
            done.add(path)
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
            if path.endswith(".md"):
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links that leave docs/ at the copies in the site; a link to a folder becomes its text."""
    return relinked(markdown, repository_path(page.file.src_uri))


# ---------------------------------------------------------------- paths


def site_path(path: str) -> str:
    """The place in the site of a file of the repository."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def repository_path(path: str) -> str:
    """The reverse of `site_path`."""
    return path.removeprefix("repository/") if path.startswith("repository/") else f"docs/{path}"


def resolved(page: str, target: str) -> str | None:
    """The path in the repository to which a link on `page` leads; None: an address or an anchor."""
    path = target.partition("#")[0]
    return None if re.match(r"[a-z]+:", target) or not path else posixpath.normpath(f"{Path(page).parent}/{path}")


def linked(page: str) -> Iterator[str]:
    """The paths in the repository to which a page links."""
    for part in FENCE.split((ROOT / page).read_text())[::2]:
        yield from (path for target in TARGET.findall(part) if (path := resolved(page, target)))


def relinked(markdown: str, page: str) -> str:
    """`markdown` of the repository's `page` with the links of the site."""

    def target(match: re.Match[str]) -> str:
        path, anchor = resolved(page, match[1]), match[1].partition("#")[1:]
        if path is None:
            return match[1]
        return os.path.relpath(site_path(path), Path(site_path(page)).parent) + "".join(anchor)

    def folder(match: re.Match[str]) -> str:
        path = resolved(page, match[2])
        return match[1] if path and (ROOT / path).is_dir() else match[0]

    parts = FENCE.split(markdown)
    for index in range(0, len(parts), 2):
        parts[index] = TARGET.sub(target, re.sub(r"(?<!!)\[([^\]\[]+)\]\(([^)\s]+)\)", folder, parts[index]))
    return "".join(parts)


def navigation(index: str) -> list[dict[str, Any]]:
    """The navigation that the tables of docs/index.md make: a section for each heading, a page for each row."""
    nav: list[dict[str, Any]] = [{"Home": "index.md"}]
    for section in re.split(r"^## ", index, flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| \[([^\]]+)\]\(([^)#]+)\)", section, re.MULTILINE)
        pages = [{title: site_path(str(resolved("docs/index.md", path)))} for title, path in rows]
        nav.append({section.splitlines()[0].partition(":")[0]: pages})
    return nav


# ---------------------------------------------------------------- the check of what was built


class Assets(HTMLParser):
    """Collects what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        name = "href" if tag == "link" and LINK_KINDS & set((values.get("rel") or "").split()) else LOADS.get(tag, "")
        if values.get(name):
            self.addresses.append(str(values[name]))
        if "mermaid" in (values.get("class") or "").split():  # the theme would fetch the library
            self.addresses.append("https://unpkg.com/mermaid")


def of_page(text: str) -> list[str]:
    """The addresses that an HTML page loads."""
    parser = Assets()
    parser.feed(text)
    return parser.addresses


def of_style(text: str) -> list[str]:
    """The addresses that a style sheet loads."""
    return re.findall(r"(?:url\(|@import )[\"']?([^\"')]+)", text)


def outside(folder: Path) -> list[str]:
    """Everything that the pages and style sheets in a folder load from outside, as "FILE: ADDRESS"."""
    readers: dict[str, Callable[[str], list[str]]] = {".html": of_page, ".css": of_style}
    return [
        f"{file.relative_to(folder)}: {address}"
        for file in sorted(folder.rglob("*"))
        if file.suffix in readers
        for address in readers[file.suffix](file.read_text())
        if re.match(r"(?:[a-z]+:)?//", address)
    ]


def main() -> None:
    began = time.perf_counter()
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--clean"], cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    if built.returncode:
        sys.exit(built.returncode)
    if loaded := outside(SITE):
        sys.exit("\n".join(["the site loads from outside:", *loaded]))
    pages = len(list(SITE.rglob("*.html")))
    print(f"build/site: {pages} pages in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
