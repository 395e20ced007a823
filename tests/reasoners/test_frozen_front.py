from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Run
from tests.tiny_pair import PROMPT, QUERIES
from tests.tiny_transformers import FAMILIES, call, tiny_transformer
from vlmteacher.errors import InputError
from vlmteacher.lora.adapter import add_lora, export_lora, lora_parameters, lora_state_dict, remove_lora
from vlmteacher.optimization.loop import Optimization
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.queries import QuerySet
from vlmteacher.reasoners import frozen_front
from vlmteacher.reasoners.checkpointing import Keep, block_list, block_names, keep_activations
from vlmteacher.settings import Settings


@pytest.mark.parametrize("level", [Keep.ALL, Keep.INPUT, [Keep.LONG, Keep.ATTENTION]])
def test_the_front_is_computed_once_and_no_bit_differs(
    pipe: TeacherPipeline, level: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasoner = pipe.reasoner
    condition = reasoner.encode(PROMPT, None, 5, 32, 48)
    noise = reasoner.noise(condition, torch.Generator().manual_seed(0))
    blocks = reasoner.transformer.blocks
    calls: Counter[int] = Counter()
    for place, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, place=place: calls.update([place]))
    keep_activations(reasoner.transformer, level)
    found = []
    try:
        for remember in (True, False):
            if not remember:  # the stock way: everything at every step
                monkeypatch.setattr(frozen_front.FrozenFront, "__enter__", lambda front: None)
            calls.clear()
            add_lora(reasoner.transformer, 2, seed=0, blocks="last:1")
            settings = Settings(4, 1e-6, teacher_frames=4, rank=2, learning_rate=1e-2, lora_blocks="last:1")
            parts = (reasoner, pipe.decoder, pipe.teacher, condition, noise)
            loop = Optimization(*parts, QuerySet.from_dict(QUERIES), settings)
            losses = [row["loss"] for row in loop]
            found.append((losses, lora_state_dict(reasoner.transformer)))
            assert calls[0] == (1 if remember else 4) and calls[1] >= 4
            assert reasoner.transformer.blocks is blocks and all("blocks.1." in name for name in found[-1][1])
    finally:
        keep_activations(reasoner.transformer, Keep.ALL)
        for block in blocks:
            block._forward_pre_hooks.clear()
        remove_lora(reasoner.transformer)
    (losses, lora), (expected, whole) = found
    assert losses == expected and losses[3] < losses[0]
    assert all(torch.equal(lora[name], value) for name, value in whole.items())


def test_sampling_inside_the_loop_uses_the_whole_network(pipe: TeacherPipeline) -> None:
    reasoner = pipe.reasoner
    condition = reasoner.encode(PROMPT, None, 5, 32, 48)
    noise = reasoner.noise(condition, torch.Generator().manual_seed(0))
    add_lora(reasoner.transformer, 2, seed=0, blocks="last:1")
    try:
        expected = reasoner.sample(condition, noise)
        front = frozen_front.FrozenFront(reasoner.transformer, 1)
        with front:
            reasoner.predict_clean(condition, noise).sum().backward()
        assert sum(p.grad is not None for p in lora_parameters(reasoner.transformer)) > 0
        assert torch.equal(reasoner.sample(condition, noise), expected)  # B is 0
    finally:
        remove_lora(reasoner.transformer)


def test_guidance_has_two_forwards_in_a_pass(pipe: TeacherPipeline) -> None:
    reasoner = pipe.reasoner.with_sampling(guidance_scale=3.0, negative_prompt="red")
    condition = reasoner.encode(PROMPT, None, 5, 32, 48)
    noise = reasoner.noise(condition, torch.Generator().manual_seed(0))
    assert condition.negative is not None
    add_lora(reasoner.transformer, 2, seed=0, blocks="last:1")
    try:
        front = frozen_front.FrozenFront(reasoner.transformer, 1)
        parameters = lora_parameters(reasoner.transformer)
        for step in range(3):
            expected = reasoner.predict_clean(condition, noise)
            with front:
                found = reasoner.predict_clean(condition, noise)
            assert torch.equal(found, expected)
            gradients = [torch.autograd.grad(z0.square().sum(), parameters) for z0 in (found, expected)]
            assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)), step
            for parameter in parameters:
                parameter.data.add_(0.1)
    finally:
        remove_lora(reasoner.transformer)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_blocks(family: str) -> None:
    """Also blocks that are called by keywords (LTX), or return video and text (HunyuanVideo)."""
    model = tiny_transformer(family)
    blocks = block_list(model)
    add_lora(model, 4, seed=0, blocks="last:1")
    assert all(name.startswith(f"{block_names(model)[-1]}.") for name in lora_state_dict(model))
    front = frozen_front.FrozenFront(model, len(blocks) - 1)
    calls = []
    blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    outputs = []
    for _ in range(2):
        with front:
            found = call(model)
        assert len(calls) == 1 and [*block_list(model)] == [*blocks]
        outputs.append((found, call(model)))
        calls.pop()
        for parameter in lora_parameters(model):
            parameter.data.add_(0.1)
    assert all(torch.equal(found, whole) for found, whole in outputs)
    assert not torch.equal(outputs[0][0], outputs[1][0])


def test_a_lora_to_go_on_from_has_its_own_layers(models: dict[str, str], tmp_path: Path, run: Run) -> None:
    pipe = TeacherPipeline.from_pretrained(**models)
    add_lora(pipe.reasoner.transformer, 2, seed=0)
    (tmp_path / "lora.safetensors").write_bytes(export_lora(pipe.reasoner.transformer))
    remove_lora(pipe.reasoner.transformer)
    pipe.load_lora(tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match="has its own layers: it cannot go on with lora_blocks"):
        pipe(PROMPT, queries=QuerySet.from_dict(QUERIES), lora_blocks="last:1", progress=False)


def test_solve_writes_it_down(models: dict[str, str], tmp_path: Path, run: Run) -> None:
    queries = tmp_path / "queries.json"
    queries.write_text(json.dumps(QUERIES))
    given = [f"--{name}={value}" for name, value in models.items()]
    given += [f"--prompt={PROMPT}", f"--queries={queries}", "--max-steps=1", "--rank=2", "--teacher-frames=4"]
    given += ["--num-frames=5", "--height=32", "--width=48"]
    for bad, said in (("last:3", "lora_blocks last:3: the transformer has 2 blocks"), ("3", "of the form last:n")):
        status, _, err = run("solve", *given, "--lora-blocks", bad, "--out", tmp_path / "run")
        assert status == 2 and said in err and err.count("\n") == 1 and not (tmp_path / "run").exists()
    assert run("solve", *given, "--lora-blocks", "last:1", "--out", tmp_path / "run")[0] == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["lora_blocks"] == "last:1"


def test_bench_refuses_what_makes_no_sense(tmp_path: Path, run: Run) -> None:
    for method, blocks, said in (
        ("base", "last:2", "is of the method teacher, not of base"),
        ("teacher", "last:9", "the transformer has 5 blocks"),
        ("teacher", "2", "of the form last:n"),
    ):
        out = tmp_path / "out"
        status, _, err = run("bench", "microworld", "--method", method, "--lora-blocks", blocks, "--out", out)
        assert status == 2 and said in err and not out.exists()
