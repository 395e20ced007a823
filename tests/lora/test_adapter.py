"""The LoRA of an instance: new, removed, resumed, and loaded by diffusers itself."""

import json

import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open

from tests.tiny_models import tiny_wan_pipeline
from vlmteacher.errors import InputError
from vlmteacher.lora.adapter import (
    add_lora,
    export_lora,
    load_lora_state,
    lora_parameters,
    lora_state_dict,
    remove_lora,
)
from vlmteacher.reasoners.loading import load_reasoner


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_wan_pipeline(tmp_path_factory.mktemp("wan"))


@pytest.fixture()
def transformer(directory):
    return load_reasoner(directory).transformer


def run(transformer):
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 8, 2, 4, 6, generator=generator), torch.randn(1, 12, 32, generator=generator)
    with torch.no_grad():
        return transformer(x, torch.tensor([700.0]), text, return_dict=False)[0]


def train(transformer):
    """Make every B differ from 0, as an optimisation does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(transformer):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_starts_as_the_base_model_and_goes_without_a_trace(transformer):
    before, names = run(transformer), set(transformer.state_dict())
    add_lora(transformer, rank=4, fused=False)
    assert torch.equal(run(transformer), before)
    add_lora(transformer, rank=4)  # rounds in other places
    torch.testing.assert_close(run(transformer), before)
    train(transformer)
    assert not torch.allclose(run(transformer), before, atol=1e-3)
    remove_lora(transformer)
    assert torch.equal(run(transformer), before)
    assert set(transformer.state_dict()) == names
    remove_lora(transformer)


def test_adapts_every_linear_layer_of_the_blocks_in_float32(directory):
    transformer = load_reasoner(directory, torch.bfloat16).transformer
    linears = [name for name, module in transformer.blocks.named_modules() if isinstance(module, torch.nn.Linear)]
    add_lora(transformer, rank=4)
    adapted = {name.split(".lora_")[0] for name in lora_state_dict(transformer)}
    assert adapted == {f"blocks.{name}" for name in linears}
    assert {p.dtype for p in lora_parameters(transformer)} == {torch.float32}
    trainable = [p for p in transformer.parameters() if p.requires_grad]
    assert [id(p) for p in trainable] == [id(p) for p in lora_parameters(transformer)]


def test_seed_fixes_a_and_a_second_call_starts_afresh(transformer):
    add_lora(transformer, rank=4, seed=5)
    first = lora_state_dict(transformer)
    train(transformer)
    torch.rand(3)
    add_lora(transformer, rank=4, seed=5)
    again = lora_state_dict(transformer)
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert all((value == 0).all() == ("lora_B" in name) for name, value in first.items())
    add_lora(transformer, rank=2, seed=6)
    assert lora_state_dict(transformer)["blocks.0.attn1.to_q.lora_A.weight"].shape == (2, 32)


def test_state_goes_out_and_back(transformer):
    add_lora(transformer, rank=4, seed=0)
    train(transformer)
    state, expected = lora_state_dict(transformer), run(transformer)
    add_lora(transformer, rank=4, seed=1)
    optimised = lora_parameters(transformer)
    load_lora_state(transformer, state)
    assert torch.equal(run(transformer), expected)
    assert all(a is b for a, b in zip(optimised, lora_parameters(transformer), strict=True))  # an optimiser holds them
    state.popitem()
    with pytest.raises(InputError, match="other layers"):
        load_lora_state(transformer, state)


@pytest.mark.parametrize("alpha", [None, 6])
def test_diffusers_loads_the_export(directory, transformer, tmp_path, alpha):
    add_lora(transformer, rank=4, alpha=alpha, seed=0)
    train(transformer)
    (tmp_path / "lora.safetensors").write_bytes(export_lora(transformer))
    pipe = WanPipeline.from_pretrained(directory)
    base = run(pipe.transformer)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    theirs = run(pipe.transformer)
    torch.testing.assert_close(theirs, run(transformer), atol=1e-5, rtol=1e-5)
    assert (theirs - base).abs().max() > 1e-3
    (config,) = pipe.transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (4, alpha or 4)


def test_export_is_what_diffusers_itself_would_save(transformer, tmp_path):
    add_lora(transformer, rank=4, seed=0)
    train(transformer)
    (tmp_path / "ours.safetensors").write_bytes(export_lora(transformer))
    state = lora_state_dict(transformer)
    metadata = transformer.peft_config["default"].to_dict()
    WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=state,
        weight_name="theirs.safetensors",
        transformer_lora_adapter_metadata=metadata,
    )
    with safe_open(tmp_path / "ours.safetensors", "pt") as a, safe_open(tmp_path / "theirs.safetensors", "pt") as b:
        assert set(a.keys()) == set(b.keys())
        assert all(torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in a.keys())  # noqa: SIM118
        ours, theirs = (json.loads(f.metadata()["lora_adapter_metadata"]) for f in (a, b))
    theirs["transformer.target_modules"].sort()
    assert ours == theirs


def test_equal_adapters_give_equal_bytes(transformer):
    """The safetensors library's order of metadata differs between calls, which eight calls would show."""
    files = set()
    for _ in range(8):
        add_lora(transformer, rank=4, seed=0)
        files.add(export_lora(transformer))
    assert len(files) == 1


def test_rank_below_one(transformer):
    with pytest.raises(InputError, match="at least 1, not 0"):
        add_lora(transformer, rank=0)


def test_only_the_last_blocks(transformer, directory, tmp_path):
    add_lora(transformer, rank=4, seed=0)
    names = list(lora_state_dict(transformer))
    whole = lora_state_dict(transformer)
    add_lora(transformer, rank=4, seed=0, blocks="last:2")  # there are two
    assert all(torch.equal(whole[name], value) for name, value in lora_state_dict(transformer).items())
    add_lora(transformer, rank=4, seed=0, blocks="last:1")
    assert list(lora_state_dict(transformer)) == [name for name in names if name.startswith("blocks.1.")]
    train(transformer)
    expected = run(transformer)
    (tmp_path / "lora.safetensors").write_bytes(export_lora(transformer))
    pipe = WanPipeline.from_pretrained(directory)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    torch.testing.assert_close(run(pipe.transformer), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", ["2", "first:2", "last:0", "last:-1", "last:two", "last", "last:3"])
def test_bad_blocks_are_named(transformer, bad):
    with pytest.raises(InputError, match=f"lora_blocks.*{bad}"):
        add_lora(transformer, rank=4, blocks=bad)
    assert not lora_parameters(transformer)
