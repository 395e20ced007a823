"""A new benchmark needs its one file: the command line finds it, a sweep and a table run it, resuming compares it."""

from __future__ import annotations

import importlib.util
import json
import sys
import weakref
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.evaluation.test_tables import pair, written  # noqa: F401 (fixtures)
from vlmteacher.errors import InputError
from vlmteacher.evaluation import microworld, sweep
from vlmteacher.evaluation.benchmark import Benchmark, Instance, Score
from vlmteacher.evaluation.formats import format_table
from vlmteacher.evaluation.models import Models, load
from vlmteacher.evaluation.tables import Table, run_table
from vlmteacher.microworld import world

FILE = '''
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from vlmteacher.evaluation.benchmark import Benchmark, Instance, Score


@dataclass(frozen=True, kw_only=True)
class Bench(Benchmark):
    """The first frame must stay as bright as the given one. There are only scores."""

    name: ClassVar[str] = "vbvr"
    splits: ClassVar[tuple[str, ...]] = ("in", "out")
    pair: str | None = {pair!r}

    def instances(self, splits, limit, noises):
        return [
            Instance(f"still/{{index}}", split, index, k, "still", "perception", {{"grey": 40 * (index + 1)}})
            for k in range(noises)
            for split in splits
            for index in range(limit)
        ]

    def load(self, instance):
        return "Keep still.", Image.new("RGB", (64, 64), (instance.meta["grey"],) * 3)

    def score(self, instance, video):
        difference = abs(video[0].mean().item() - instance.meta["grey"] / 255)
        return Score(None, 1 - difference, {{"first": 1 - difference}}, "too dark" if instance.index else None)
'''


@pytest.fixture
def bench(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Benchmark:  # noqa: F811
    """The benchmark of a file that takes the place of VBVR's."""
    name, file = "vlmteacher.evaluation.vbvr", tmp_path / "vbvr.py"
    file.write_text(FILE.format(pair=str(pair)))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module.Bench()


def test_the_command_line_runs_it(bench: Benchmark, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["bench", "vbvr", "--method", "base", "--limit", 2, "--split", "in", "--out", out]
    status, text, _ = run(*command)
    assert status == 0 and "vbvr, method base" in text and "in             2        - " in text
    results = json.loads((out / "results.json").read_text())
    assert (results["benchmark"], results["n"], results["success_rate"]) == ("vbvr", 2, None)
    assert list(results["splits"]) == ["in", "out"] and results["splits"]["out"]["n"] == 0
    assert results["tasks"]["still"]["score"] == results["score"] and "failures" not in results
    first, second = results["instances"]
    assert first["category"] == "perception" and first["subscores"]["first"] == first["score"] > 0
    assert first["truths"] is None and "error" not in first and second["error"] == "too dark"
    before = (out / "instances.jsonl").read_bytes()
    assert run(*command, "--resume")[0] == 0 and (out / "instances.jsonl").read_bytes() == before
    status, _, err = run(*command, "--resume", "--seed", 2)
    assert status == 2 and "holds other results" in err


def test_a_table_of_scores_alone(bench: Benchmark, tmp_path: Path) -> None:
    table = Table(main=("base", "pass@2"), others=("steps@1",), against=("base",))
    content = run_table(table, bench, 2, 1, tmp_path / "table")
    sampled = content["methods"]["pass@2"]
    assert sampled["success_rate"] is sampled["low"] is sampled["oracle"]["success_rate"] is None
    assert sampled["score_low"] <= sampled["score"] <= sampled["oracle"]["score"] <= 1
    against = sampled["against"]["base"]
    assert against["success_difference"] is against["sign_p"] is None and 0 < against["permutation_p"] <= 1
    assert against["score_difference"] == pytest.approx(sampled["score"] - content["methods"]["base"]["score"])
    lines = format_table(content).splitlines()[1:]
    assert len({line.count("|") for line in lines if line}) == 1 and "nan" not in "".join(lines).lower()


def test_an_instance_is_its_split_index_and_noise() -> None:
    one = Instance("a", "id", 3, 1, "task", meta={"frames": [1]})
    assert one.key == sweep.key_of(one.entries()) == ("id", 3, 1)
    assert len({one, Instance("a", "id", 3, 1, "task", meta={"frames": [2]})}) == 1  # can be a key
    assert Score(True, 1.0).entries() == {"success": True, "score": 1.0, "subscores": {}}


def test_the_microworld_describes_itself_as_earlier_releases_did() -> None:
    """Folders of their sweeps can be resumed."""
    models = Models(settings=(("lora_blocks", "last:1"),))
    bench = microworld.Bench(seed=3, families=("maze",), trace=True, models=models)
    described = {"seed": 3, "families": ["maze"], "trace": True, "lora_blocks": "last:1"}
    assert list(bench.described().items()) == list(described.items())
    assert microworld.Bench(seed=0).described() == {"families": list(world.FAMILIES)}


def test_the_microworld_names_its_scenes() -> None:
    bench, families = microworld.Bench(seed=5), len(world.FAMILIES)
    made = bench.instances(("id", "ood"), families + 1, 2)
    assert len({one.key for one in made}) == len(made) == 4 * (families + 1)
    assert [one.noise for one in made] == sorted(one.noise for one in made)  # all scenes once before any twice
    for one in made[-2:]:
        scene, prompt = world.instance(one.index, 5, one.split)
        assert (one.id, one.task) == (f"{scene.family}/5/{one.index:04d}", scene.family)
        assert bench.load(one)[0] == prompt
    with pytest.raises(InputError, match="unknown split 'none'"):
        bench.instances(("none",), 1, 1)


def test_one_set_of_models_is_held_at_a_time(pair: Path) -> None:  # noqa: F811
    """Two large ones do not fit on a GPU."""
    first = load(Models(), str(pair))
    assert load(Models(), str(pair)) is first
    gone = weakref.ref(first)
    del first
    other = load(Models(settings=(("max_steps", 1),)), str(pair))
    assert gone() is None and other.defaults.max_steps == 1
