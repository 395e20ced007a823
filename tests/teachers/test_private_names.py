"""Private names of the Teachers stay inside `vlmteacher/teachers/`."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEACHERS = ROOT / "vlmteacher" / "teachers"


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.Module) -> set[str]:
    """Private functions and classes of a file, and private attributes that it assigns."""
    functions = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    attributes = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    return set(filter(private, functions | attributes))


def uses(source: str, names: set[str]) -> Iterator[str]:
    """Uses of private names of the Teachers in a file that does not define them itself."""
    tree = ast.parse(source)
    foreign = names - defined(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in foreign:
            yield f"{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlmteacher.teachers"):
            yield from (f"{node.lineno}: import {alias.name}" for alias in node.names if private(alias.name))


NAMES = set().union(*(defined(ast.parse(file.read_text())) for file in TEACHERS.glob("*.py")))


@pytest.mark.parametrize("folder", ["vlmteacher", "benchmarks", "recipes", "tools", "docs"])
def test_nothing_outside_uses_them(folder: str) -> None:
    files = [file for file in (ROOT / folder).rglob("*.py") if TEACHERS not in file.parents]
    assert [f"{file.relative_to(ROOT)}:{use}" for file in files for use in uses(file.read_text(), NAMES)] == []


def test_uses_are_recognised() -> None:
    assert {"_chat", "_encode", "_question_chat", "_layouts"} <= NAMES
    source = "from vlmteacher.teachers.vlm import _secret\nteacher._chat('?')\nother._unknown()\n"
    assert list(uses(source, NAMES)) == ["1: import _secret", "2: teacher._chat"]
    assert list(uses("def _chat(): ...\nx._chat()", NAMES)) == []
