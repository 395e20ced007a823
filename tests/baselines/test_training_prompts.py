"""Prompts of a shared LoRA: where they come from, and that no test has them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.tiny_pair import QUERIES
from vlmteacher.baselines.training_prompts import QueryFile, check_disjoint, load_prompts, read_folder
from vlmteacher.errors import InputError
from vlmteacher.microworld import world
from vlmteacher.microworld.export import export
from vlmteacher.queries import QuerySet


def test_the_microworlds_train_split_is_disjoint_from_its_tests() -> None:
    prompts = load_prompts("microworld", 20, seed=1)
    assert len({one.digest for one in prompts}) == 20
    assert {world.split_of(one.source) for one in prompts if isinstance(one.source, world.Scene)} == {"train"}
    check_disjoint(prompts, ())


@pytest.mark.parametrize("split", ["id", "ood", "validation"])
def test_an_exported_test_split_is_refused(tmp_path: Path, split: str) -> None:
    export(tmp_path / "data", 4, 1, split)
    train = load_prompts("microworld", 3, seed=0)
    shared = load_prompts(str(tmp_path / "data"), 2, seed=0)
    with pytest.raises(InputError, match=rf"2 of 5 training prompts are instances of a test.*microworld {split} \d"):
        check_disjoint([*train, *shared], ())


def test_a_folder_of_tests_is_refused_by_prompt_and_first_frame(prompts: Path, tmp_path: Path) -> None:
    trained = read_folder(prompts)
    test = tmp_path / "tests" / "a"
    shutil.copytree(prompts / "task" / "002", test)
    (test / "prompt.txt").write_text("move  the\nball box")  # other white space is the same prompt
    with pytest.raises(InputError, match="1 of 4 training prompts"):
        check_disjoint(trained, [str(tmp_path / "tests")])
    (test / "prompt.txt").write_text("move the ball")
    check_disjoint(trained, [str(tmp_path / "tests")])
    (test / "prompt.txt").write_text("move the ball box")
    Image.new("RGB", (48, 32)).save(test / "first_frame.png")
    check_disjoint(trained, [str(tmp_path / "tests")])
    (test / "first_frame.png").unlink()  # a task without an image
    check_disjoint(trained, [str(tmp_path / "tests")])
    with pytest.raises(InputError, match="none does not exist"):
        check_disjoint(trained, [str(tmp_path / "none")])


def test_folders_that_hold_no_prompts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no instance: an instance is a directory with a prompt\.txt"):
        read_folder(tmp_path)
    (tmp_path / "first_frame.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"prompt .*prompt\.txt does not exist"):
        read_folder(tmp_path)


def test_queries_are_kept_and_a_cut_line_is_dropped(prompts: Path, tmp_path: Path) -> None:
    first, second, third, _ = read_folder(prompts)
    path = tmp_path / "queries.jsonl"
    kept = QueryFile(path, write=True)
    kept[first], kept[second] = QuerySet.of(QUERIES), None
    with path.open("a") as file:
        file.write(json.dumps({"digest": third.digest, "queries": QUERIES})[:-9])
    again = QueryFile(path, write=False)
    assert first in again and again[first] == QuerySet.of(QUERIES) and again[second] is None
    assert third not in again
    path.write_text('{"queries": {"goal": "Is it done?"}}\n')
    with pytest.raises(InputError, match="has no queries: remove that line"):
        QueryFile(path, write=False)
