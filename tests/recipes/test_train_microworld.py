"""`vlmteacher train-microworld`, the recipe's old name, and old import paths, in a checkout and outside of one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlmteacher.cli import main, train_microworld

ROOT = Path(__file__).parents[2]


def test_the_old_command_warns_and_runs_the_recipe(tmp_path, capsys):
    assert main(["train-microworld", "--stage", "decoder", "--out", str(tmp_path)]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: `vlmteacher train-microworld` goes with the next release")
    assert error.startswith("error: stage decoder needs ")


def test_the_old_command_says_where_the_recipe_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_microworld, "CHECKOUT", tmp_path)
    assert main(["train-microworld", "--stage", "vae", "--out", str(tmp_path / "out")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "no part of the installed package" in error and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package alone, as an installation has it."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "vlmteacher", folder / "vlmteacher", ignore=shutil.ignore_patterns("models", "__pycache__"))
    return folder


def test_an_old_path_without_the_recipe_names_the_new_one(installed):
    code = "from vlmteacher.microworld.pointing import Loras"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=installed, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: vlmteacher.microworld.pointing is now recipes.microworld.teacher.pointing" in done.stderr
    assert "run from the root of the repository" in done.stderr


def test_the_library_imports_no_recipe():
    for path in (ROOT / "vlmteacher").rglob("*.py"):
        assert not any(line.strip().startswith(("from recipes", "import recipes")) for line in path.open()), path
