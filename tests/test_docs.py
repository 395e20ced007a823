"""The Markdown files: every relative link and its anchor resolve; docs/index.md names every page; the tools run."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import vlmteacher
from tests.test_house import ROOMS
from tools import diagrams, docs_site
from vlmteacher.cli import parser
from vlmteacher.cli.defaults import DefaultsFile
from vlmteacher.settings import GROUPS

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(
        page
        for folder in ("docs", "benchmarks", "examples", "integrations", "recipes", "vlmteacher")
        for page in ROOT.glob(f"{folder}/**/*.md")
    ),
]
LINK = re.compile(r"(?<!`)\[[^\]\[]*\]\(([^)\s]+)\)")
TOOLS = sorted(path.stem for path in ROOT.glob("tools/*.py") if path.stem != "__init__")


def prose(text: str) -> str:
    """Markdown without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ +(.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path, text: str) -> list[str]:
    """The relative links of `text`, the content of `page`, that lead nowhere."""
    result = []
    for link in LINK.findall(prose(text)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if re.match(r"[a-z]+:", link):
            continue
        content = text if target == page else target.read_text() if target.suffix == ".md" and target.is_file() else ""
        if not target.exists() or (anchor and anchor not in anchors(content)):
            result.append(link)
    return result


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors(page: Path) -> None:
    assert broken(page, page.read_text()) == []


def test_a_broken_link_and_anchor_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One & two\n[a](#one--two) [b](page.md#three) ![c](none.png) [d](https://example.com/x)\n")
    assert broken(page, page.read_text()) == ["page.md#three", "none.png"]


def commands(text: str) -> list[list[str]]:
    """The arguments of the commands that stand in blocks of code, but for those with blanks to fill in."""
    lines = re.sub(r" *\\\n *", " ", text).splitlines()
    found = (re.match(r"(?: {4,}|\| )?vlmteacher (.+)", line) for line in lines)
    return [
        shlex.split(match[1], comments=True) for match in found if match and not re.search(r"\.\.\.|\||\[", match[1])
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "guides"], ids=lambda page: page.stem)
def test_commands_exist_with_their_flags(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def has_all(file: DefaultsFile, parser: argparse.ArgumentParser, given: list[str]) -> None:
        """A file that does not exist here gives every flag that the command needs."""
        for action in parser._actions if set(file.option_strings) & set(given) else ():
            action.required = False

    monkeypatch.setattr(DefaultsFile, "apply", has_all)
    for arguments in commands(page.read_text()):
        try:
            parser().parse_args([re.sub(r"^[A-Z]$", "1", each) for each in arguments])
        except SystemExit as stop:
            pytest.fail(f"vlmteacher {shlex.join(arguments)}: exit status {stop.code}")


def test_a_command_is_read_over_its_lines() -> None:
    text = "    vlmteacher solve --prompt 'a b' \\\n        --out runs/x  # so\nvlmteacher plan --reasoner ...\n"
    assert commands(text) == [["solve", "--prompt", "a b", "--out", "runs/x"]]


def test_paths_that_are_named_exist() -> None:
    """Paths of pages and sources in comments, messages, settings and other pages, but for what earlier releases had."""
    folders, kinds = "docs|tests|tools|recipes|vlmteacher|benchmarks", "md|png|svg|py|cpp|cuh?|h|yaml"
    pattern = rf"\b({folders})/[a-z_0-9/]+\.({kinds})\b"
    old = [":!CHANGELOG.md", ":!tests/test_docs.py"]
    listed = subprocess.run(["git", "grep", "-nIoE", pattern, "--", ".", *old], cwd=ROOT, capture_output=True)
    places = [line.rsplit(":", 1) for line in listed.stdout.decode().splitlines()]
    if not places:
        pytest.skip("no checkout of git")
    assert [place for place, path in places if not (ROOT / path).is_file()] == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text()
    pages = [str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/*/**/*.md")]
    assert [page for page in pages if f"({page})" not in index] == []


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_says_how_it_is_called(tool: str) -> None:
    assert f"python -m tools.{tool}" in (ROOT / f"tools/{tool}.py").read_text()


def api_names() -> list[str]:
    return [
        name for page in (ROOT / "docs/api").glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    ]


def test_the_reference_has_the_public_face() -> None:
    named = {name.rpartition(".")[2]: name for name in api_names()}
    public = {
        *vlmteacher.__all__,
        "Reasoner",
        "Teacher",
        "SurrogateDecoder",
        "Benchmark",
        *(g.__name__ for g in GROUPS),
    }
    assert public - named.keys() == {"__version__"}
    for name in named.values():
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name


def test_the_navigation_is_made_of_the_index() -> None:
    index = "# A\n\n## Guides: how\n\n| page | x |\n|---|---|\n| [One](guides/one.md) | a |\n| [Two](../TWO.md) | b |\n"
    pages = [{"One": "guides/one.md"}, {"Two": "repository/TWO.md"}]
    assert docs_site.navigation(index) == [{"Home": "index.md"}, {"Guides": pages}]


def test_links_out_of_docs_lead_to_copies_in_the_site() -> None:
    kept = "[b](two.md) [![c](c.png)](../index.md) [d](https://e.f)\n```\n[g](../../g)\n```\n"
    text = f"[a](../../README.md#x) [h](../../tests) {kept}"
    site = f"[a](../repository/README.md#x) h {kept}"
    assert docs_site.relinked(text, "docs/guides/one.md") == site
    assert docs_site.relinked("[a](docs/index.md)", "README.md") == "[a](../index.md)"


def test_what_a_page_loads_from_outside_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<link rel="stylesheet" href="//cdn/x.css"><a href="https://fine"></a><script src="a.js"></script>'
        '<img src="https://cdn/x.png"><pre class="mermaid">'
    )
    (tmp_path / "a.css").write_text("@import 'b.css'; a { background: url(data:x); src: url(\"https://fonts/x\") }")
    loads = [
        "a.css: https://fonts/x",
        "a.html: //cdn/x.css",
        "a.html: https://cdn/x.png",
        "a.html: https://unpkg.com/mermaid",
    ]
    assert docs_site.outside(tmp_path) == loads


def test_the_drawn_rooms_are_those_of_the_house() -> None:
    drawn = ["/".join(title for title, _ in row) for row in diagrams.ROOMS]
    assert len(drawn) == len(ROOMS)
    for row, rooms in zip(drawn, ROOMS, strict=True):
        assert any(re.search(rf"\b{room}\b", row) for room in rooms), row
