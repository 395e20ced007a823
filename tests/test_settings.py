"""Every place that shows the settings of a call equals the fields of `Settings`."""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from tests.test_pipeline import call
from tools.settings import files
from vlmteacher import InputError, TeacherPipeline, settings
from vlmteacher.cli import parser
from vlmteacher.settings import GROUPS, Keywords, Settings

NAMES = [each.name for each in fields(Settings)]


def test_groups_are_all_of_the_settings() -> None:
    assert [each.name for group in GROUPS for each in fields(group)] == NAMES


def test_keywords_of_a_call_equal_the_fields() -> None:
    assert get_type_hints(Keywords) == {name: kind | None for name, kind in settings.types().items()}
    assert inspect.signature(TeacherPipeline.__call__).parameters["keywords"].annotation == "Unpack[Keywords]"


def test_flags_of_solve_equal_the_fields() -> None:
    flags = [text for each in fields(Settings) for text in (settings.flag(each), *_value(each.name))]
    arguments = parser().parse_args(["solve", "--prompt", "p", "--out", "o", *flags])
    assert list(settings.given(arguments)) == NAMES
    assert settings.given(parser().parse_args(["solve", "--prompt", "p", "--out", "o"])) == {}


def _value(name: str) -> list[str]:
    if settings.types()[name] is bool:
        return []
    return [*settings.choices(name)[:1]] or ["1" if settings.types()[name] in (int, float) else "last:1"]


def test_files_are_up_to_date() -> None:
    assert [str(path) for path, text in files().items() if path.read_text() != text] == [], "python -m tools.settings"


def test_config_of_a_run_equals_the_fields(pipe: TeacherPipeline, tmp_path: Path) -> None:
    call(pipe, max_steps=0, run_dir=tmp_path / "run")
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert list(config)[: len(NAMES)] == NAMES


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"threshold": 0}, "threshold must be greater than 0 and at most 1e+18, not 0"),
        ({"goal_weight": 1.5}, "goal_weight must be between 0 and 1, not 1.5"),
        ({"pull": -1}, "pull must be 0 (off) or greater, at most 1e+18, not -1"),
        ({"pull": float("nan")}, "pull must be 0 (off) or greater, at most 1e+18, not nan"),
        ({"rank": 0}, "rank must be a whole number of at least 1, not 0"),
        ({"engine": "fast"}, "engine must be eager or compile or cuda_graph, not 'fast'"),
        ({"lora_blocks": "first:1"}, "lora_blocks must be of the form last:n, n at least 1, not 'first:1'"),
        ({"preserve": 1}, "preserve must be True or False, not 1"),
    ],
)
def test_values_out_of_range_are_named_in_one_line(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Settings(**bad)
    assert str(caught.value) == message


def test_settings_updated_by_keywords() -> None:
    assert Settings(rank=4).updated(rank=None, pull=0.5) == Settings(rank=4, pull=0.5)
    with pytest.raises(TypeError, match=r"'learning_rat': did you mean learning_rate\?"):
        Settings().updated(learning_rat=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        Settings().updated(steps=3)  # type: ignore[call-arg]


def test_some_flags_only() -> None:
    some = argparse.ArgumentParser()
    settings.add_flags(some, "lora_blocks")
    assert settings.given(some.parse_args(["--lora-blocks", "last:2"])) == {"lora_blocks": "last:2"}
    with pytest.raises(SystemExit):
        some.parse_args(["--rank", "2"])


def test_settings_import_nothing_heavy() -> None:
    code = "import sys, vlmteacher.settings; sys.exit(bool({'torch', 'numpy', 'diffusers'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)
