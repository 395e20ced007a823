"""Methods that run with a LoRA from a file: `base --lora`, `post` and `flow-grpo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Run
from tests.evaluation.test_tables import pair  # noqa: F401 (a fixture)
from vlmteacher.lora.adapter import add_lora, export_lora, lora_parameters, remove_lora
from vlmteacher.pipeline import TeacherPipeline


@pytest.fixture(scope="module")
def lora(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A random LoRA for the pair's Reasoner."""
    transformer = TeacherPipeline.from_pretrained(pair=pair).reasoner.transformer
    add_lora(transformer, 2, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in lora_parameters(transformer):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    file.write_bytes(export_lora(transformer))
    remove_lora(transformer)
    return file


def bench(run: Run, pair: Path, out: Path, method: str, *flags: object) -> dict[str, Any]:  # noqa: F811
    status, _, err = run("bench", "microworld", "--pair", pair, "--method", method, "--limit", 1, "--out", out, *flags)
    assert status == 0, err
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


@pytest.mark.slow
def test_all_three_are_the_base_with_the_lora(run: Run, pair: Path, lora: Path, tmp_path: Path) -> None:  # noqa: F811
    def losses(method: str, name: str, *flags: object) -> tuple[float, str | None]:
        results = bench(run, pair, tmp_path / name, method, *flags)
        (row,) = results["instances"]
        assert (row["method"], row["updates"], row["generator_calls"]) == (method, 0, 1)
        return row["loss_final"], results.get("lora") or results.get("post_lora") or results.get("grpo_lora")

    plain = losses("base", "base")
    adapted = losses("base", "adapted", "--lora", lora)
    assert adapted[0] != plain[0] and plain[1] is None and adapted[1] is not None
    assert losses("post", "post", "--post-lora", lora) == adapted
    assert losses("base", "again", "--post-lora", lora)[0] == plain[0]  # the models are the same, the LoRA is off
    assert losses("flow-grpo", "grpo", "--grpo-lora", lora) == adapted


def test_another_lora_is_another_sweep(run: Run, pair: Path, lora: Path, tmp_path: Path) -> None:  # noqa: F811
    out, file = tmp_path / "out", tmp_path / "lora.safetensors"
    file.write_bytes(lora.read_bytes())
    bench(run, pair, out, "post", "--post-lora", file)
    bench(run, pair, out, "post", "--post-lora", lora, "--resume")  # the same content at another place
    transformer = TeacherPipeline.from_pretrained(pair=pair).reasoner.transformer
    add_lora(transformer, 2, seed=0)
    file.write_bytes(export_lora(transformer))
    command = ("bench", "microworld", "--pair", pair, "--method", "post", "--limit", 1, "--out", out)
    status, _, err = run(*command, "--post-lora", file, "--resume")
    assert status == 2 and "holds other results" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--method", "post"), "method 'post' needs --post-lora FILE, which `vlmteacher train post` makes"),
        (("--method", "flow-grpo"), "method 'flow-grpo' needs --grpo-lora FILE, which `vlmteacher train grpo` makes"),
        (("--method", "teacher", "--lora", "x"), "--lora x is of the method base, not of teacher"),
        (("--method", "base", "--lora", "none.safetensors"), "none.safetensors"),
        (("--table", "paper", "--lora", "x"), "--lora goes with --method"),
    ],
)
def test_bad_loras_are_refused(run: Run, tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    out = tmp_path / "out"
    status, _, err = run("bench", "microworld", *flags, "--limit", 1, "--out", out)
    assert status == 2 and message in err
    assert not out.exists() or not [entry for entry in out.iterdir() if entry.name != ".lock"]
