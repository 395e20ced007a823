"""YAML files of trainings: plain values of the right types, or one line."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from vlmteacher.baselines import flow_grpo, post_training
from vlmteacher.distillation import decoder, distill, sft
from vlmteacher.errors import InputError

CONFIGS = Path(__file__).parents[2] / "vlmteacher/distillation/configs"
KINDS = {
    **{sft: "sft.yaml", distill: "dmd2.yaml", decoder: "decoder.yaml"},
    **{post_training: "post.yaml", flow_grpo: "grpo.yaml"},
}
WRONG: dict[type, tuple[Any, ...]] = {
    str: (3, ["x"], None, True),
    bool: (1, "yes", None),
    int: (True, 0.5, "3", [3], None),
    float: (True, "1e-4", [1.0], None),
    list: ("x", 3, [True], [[1]]),
}


@pytest.mark.parametrize("module", KINDS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_entry_has_its_type(module: ModuleType, tmp_path: Path) -> None:
    values = yaml.safe_load((CONFIGS / KINDS[module]).read_text())
    file = tmp_path / "settings.yaml"
    for name, value in values.items():
        if isinstance(value, dict):
            continue
        for wrong in WRONG[type(value)]:
            file.write_text(yaml.safe_dump({**values, name: wrong}))
            with pytest.raises(InputError, match=name):
                module.load_settings(file, {})
    file.write_text(yaml.safe_dump({**values, "learning_rate": 1}))  # a whole number is a number
    assert module.load_settings(file, {}).train.learning_rate == 1


BOMB = "a: &a [x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "an alias"),
        ("a: !!python/object/apply:builtins.open ['ran', 'w']", "could not determine a constructor"),
        ("a: 1\na: 2", "'a' stands twice"),
        ("[" * 20_000, "nested too deep"),
        ("a: " + "9" * 400, "64 bits"),
        ("a: " + "9" * 9000, "no YAML"),
        ("a: .nan", "no number"),
        ("reasoner: a\ndata: b\nout: c\nbatch_size: 1000000000\n", "batch_size must be at most 65536"),
        ("a: 2001-01-01", "date"),
        ("a: 2001-99-99", "no YAML"),
        ('a: "\\uD800"', "position 0"),
        ("- 1", "must be a mapping of `name: value`"),
        ("", "must be a mapping of `name: value`"),
        (b"\xff\xfe\x00", "no UTF-8"),
        (b"#" * (2**24 + 1), "larger than"),
    ],
)
def test_strange_files(content: str | bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "settings.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as found:
        sft.load_settings(file, {})
    assert "\n" not in str(found.value) and [each.name for each in tmp_path.iterdir()] == ["settings.yaml"]
