"""Warm starts: an instance starts from an earlier one's LoRA where the first look says so, and resumes to the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.test_pipeline import call, seed
from tests.tiny_pair import QUERIES
from vlmteacher import InputError, TeacherPipeline
from vlmteacher.lora.adapter import add_lora, lora_state_dict, remove_lora
from vlmteacher.queries import QuerySet
from vlmteacher.warm_starts import WarmStarts, embed, mean_of

STEPS = 5
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def threshold(pipe: TeacherPipeline) -> float:
    """A loss that an instance reaches by two updates."""
    losses = [row["loss"] for row in call(pipe, image=IMAGE, max_steps=3).history]
    assert losses[2] < losses[1] < losses[0]
    return (losses[1] + losses[2]) / 2


@pytest.fixture
def run(pipe: TeacherPipeline, threshold: float, tmp_path: Path) -> Any:
    given: dict[str, Any] = {"image": IMAGE}
    given |= {"max_steps": STEPS, "threshold": threshold, "warm_start": str(tmp_path / "store"), "output_type": "pt"}
    return lambda **changed: call(pipe, **given | changed)


def test_an_instance_starts_from_the_most_similar_one(run: Any, tmp_path: Path) -> None:
    first = run()
    assert (first.stopped, first.updates, first.warm_start) == ("threshold", 2, None)
    (entry,) = (tmp_path / "store").glob("*.json")
    assert entry.with_suffix(".safetensors").read_bytes() == first.lora
    assert json.loads(entry.read_text())["updates"] == 2 and entry.with_suffix(".png").exists()
    assert run().lora == first.lora  # never from itself: an instance can be repeated

    fresh, second = run(generator=seed(1), warm_start=None), run(generator=seed(1))
    start = second.warm_start
    assert start["from"] == entry.stem and start["similarity"] == pytest.approx(1.0, abs=1e-6)
    assert start["loss_fresh"] == pytest.approx(fresh.history[0]["loss"], rel=1e-5)
    assert start["taken"] == (start["loss_start"] < start["loss_fresh"])
    assert second.history[0]["loss"] == pytest.approx(min(start["loss_start"], start["loss_fresh"]), rel=1e-5)
    assert torch.equal(second.frames_before, fresh.frames_before) and second.record()["warm_start"] == start


def test_a_start_that_is_no_better_is_left(run: Any, tmp_path: Path) -> None:
    run()
    (path,) = (tmp_path / "store").glob("*.safetensors")
    spoilt = {name: value * (-1 if "lora_B" in name else 1) for name, value in load_file(path).items()}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(spoilt, path, metadata)
    queries = QuerySet(QUERIES["goal"], tuple(QUERIES["process"][::-1]))  # another instance with the same loss
    fresh, second = run(queries=queries, warm_start=None), run(queries=queries)
    assert second.warm_start["loss_start"] > second.warm_start["loss_fresh"]
    assert not second.warm_start["taken"] and second.lora == fresh.lora


def test_a_warm_start_below_the_threshold_needs_no_update(run: Any, tmp_path: Path) -> None:
    first = run()
    start = run(generator=seed(1), threshold=1e-6).warm_start
    assert start["taken"] and start["from"] == key(first, tmp_path)
    second = run(generator=seed(1), threshold=1.01 * start["loss_start"])
    assert second.updates == 0 and second.stopped == "threshold"
    assert not torch.equal(second.frames, second.frames_before)  # the LoRA is at work nevertheless


def key(output: Any, tmp_path: Path) -> str:
    """The name of an instance's entry."""
    (name,) = (path.stem for path in (tmp_path / "store").glob("*.safetensors") if path.read_bytes() == output.lora)
    return name


@pytest.mark.parametrize("kind", ["nearest", "mean"])
def test_it_resumes_to_the_same_result(run: Any, tmp_path: Path, kind: str) -> None:
    """Also where the folder has changed meanwhile."""
    run()
    run(generator=seed(2))
    given = {"generator": seed(1), "warm_start_from": kind, "threshold": 1e-6}
    whole = run(**given)
    assert whole.warm_start["from"] == ("mean" if kind == "mean" else whole.warm_start["from"])

    def stop(_: object, step: int, __: object) -> None:
        if step == 1:
            raise KeyboardInterrupt

    given["generator"] = seed(1)
    with pytest.raises(KeyboardInterrupt):
        run(**given, run_dir=tmp_path / "run", callback_on_step_end=stop)
    for file in (tmp_path / "store").iterdir():
        file.unlink()
    again = run(**given | {"generator": seed(1)}, run_dir=tmp_path / "run", resume=True)
    assert again.lora == whole.lora and again.warm_start == whole.warm_start


def test_only_fitting_entries_count(run: Any, pipe: TeacherPipeline, tmp_path: Path) -> None:
    first = run()
    assert run(generator=seed(1), rank=1).warm_start is None
    store = WarmStarts(str(tmp_path / "store"), "another Reasoner")
    add_lora(pipe.reasoner.transformer, 2, seed=0)
    like = lora_state_dict(pipe.reasoner.transformer)
    remove_lora(pipe.reasoner.transformer)
    vector = embed(pipe.reasoner, first.prompt, first.queries)
    assert store.find(vector, "", like) is None
    store.reasoner = first.models["reasoner"]
    found = store.find(vector, "", like)
    assert found is not None and found.state.keys() == like.keys()
    other = embed(pipe.reasoner, "the blue ball", QuerySet("Is it there?", ("Is it one?",)))
    assert store.entries(other, "")[0][0] < store.entries(vector, "")[0][0] == pytest.approx(1.0, abs=1e-6)


def test_bad_folders_and_entries_are_named(run: Any, pipe: TeacherPipeline, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"warm_start .*file' is no folder"):
        run(warm_start=str(tmp_path / "file"))
    first = run()
    pipe.load_lora(first)
    try:
        with pytest.raises(InputError, match="leave out warm_start, or the LoRA"):
            run(rank=None)
    finally:
        pipe.load_lora(None)
    (entry,) = (tmp_path / "store").glob("*.json")
    entry.write_text('{"embedding": ["x"]}')
    with pytest.raises(InputError, match=f"{entry.name} is no warm start: remove it"):
        run(generator=seed(1))


def test_the_mean_is_that_of_the_updates() -> None:
    generator = torch.Generator().manual_seed(0)
    states = [
        {
            "l.lora_A.weight": torch.randn(2, 6, generator=generator),
            "l.lora_B.weight": torch.randn(5, 2, generator=generator),
        }
        for _ in range(3)
    ]

    def update(state: dict[str, torch.Tensor]) -> torch.Tensor:
        return state["l.lora_B.weight"] @ state["l.lora_A.weight"]

    mean = mean_of(states)
    assert mean.keys() == states[0].keys() and all(mean[key].shape == states[0][key].shape for key in mean)
    u, s, v = torch.linalg.svd(torch.stack([update(state) for state in states]).mean(0))
    torch.testing.assert_close(update(mean), u[:, :2] * s[:2] @ v[:2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(update(mean_of(states[:1])), update(states[0]), atol=1e-5, rtol=1e-4)
