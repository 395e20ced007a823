"""The fused Wan transformer against diffusers' own: results, gradients, saved bytes, and fallbacks."""

from __future__ import annotations

import copy
import itertools

import diffusers
import pytest
import torch
from diffusers.models.transformers import transformer_wan as stock
from torch import Tensor

from benchmarks.memory import saved_bytes
from vlmteacher.errors import InputError
from vlmteacher.lora.adapter import add_lora, lora_parameters, remove_lora
from vlmteacher.reasoners.checkpointing import Keep, keep_activations
from vlmteacher.reasoners.condition import Condition, Noise
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.reasoners.wan import blocks as wan_blocks
from vlmteacher.reasoners.wan.blocks import fuse_blocks, unfuse_blocks
from vlmteacher.reasoners.wan.reasoner import by_token


def instance(reasoner, first_frame: bool, batch: int = 1, seed: int = 1) -> tuple[Condition, Noise]:
    """A random condition of 9 frames of 32 x 48 pixels: 3 x 2 x 3 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    text = randn(batch, 12, 32).to(reasoner.dtype)
    condition = Condition(text, randn(batch, 8, 1, 4, 6) if first_frame else None, 9, 32, 48)
    return condition, reasoner.noise(condition, generator)


def with_lora(reasoner, fused: bool) -> list[torch.nn.Parameter]:
    add_lora(reasoner.transformer, 4, seed=0, fused=fused)
    generator = torch.Generator().manual_seed(2)
    parameters = lora_parameters(reasoner.transformer)
    for parameter in parameters:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return parameters


def results(reasoner, condition: Condition, noise: Noise, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    """Returns the one-step prediction, its gradients and the sampler's video."""
    latents = reasoner.predict_clean(condition, noise)
    grads = torch.autograd.grad(latents.square().mean(), parameters)
    return [latents.detach(), *grads, reasoner.sample(condition, noise)]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).double().norm() / b.double().norm()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("first_frame", [True, False])
def test_it_is_diffusers_transformer(reasoner, first_frame, batch):
    given = instance(reasoner, first_frame, batch)
    theirs = results(reasoner, *given, with_lora(reasoner, fused=False))
    assert type(reasoner.transformer) is diffusers.WanTransformer3DModel
    ours = results(reasoner, *given, with_lora(reasoner, fused=True))
    assert type(reasoner.transformer) is wan_blocks.WanTransformer3DModel
    assert distance(ours, theirs) < 2e-5


def test_in_bfloat16_no_further_from_the_truth_than_diffusers_own(directory):
    exact = load_reasoner(directory)
    exact.transformer.double()
    exact.dtype = torch.float64
    reasoner = load_reasoner(directory, torch.bfloat16)
    errors = []
    for seed in range(4):  # one draw of diffusers' rounding may be a lucky one
        truth = results(exact, *instance(exact, True, seed=seed), with_lora(exact, fused=False))
        assert not fuse_blocks(exact.transformer)
        given = instance(reasoner, True, seed=seed)
        errors.append(
            [distance(results(reasoner, *given, with_lora(reasoner, fused)), truth) for fused in (True, False)]
        )
    ours, theirs = torch.tensor(errors).square().mean(0).sqrt()
    assert ours < 2 * theirs


def test_cross_attention_without_a_norm():
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8}
    torch.manual_seed(0)
    network = diffusers.WanTransformer3DModel(**config, freq_dim=8, ffn_dim=32, num_layers=2, cross_attn_norm=False)
    network.requires_grad_(False)
    x, text, timestep = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 3, 8), torch.tensor([500.0])
    x.requires_grad_()
    found = []
    for _ in range(2):
        y = network(x, timestep, text).sample
        found.append([y.detach(), *torch.autograd.grad(y.sum(), x)])
        fuse_blocks(network)
    assert type(network) is wan_blocks.WanTransformer3DModel
    assert distance(found[1], found[0]) < 1e-5


def test_less_is_saved(reasoner):
    """Saved bytes of two blocks at 18 tokens; the counts are exact on any machine."""
    given = instance(reasoner, True)
    saved = []
    for fused in (False, True):
        with_lora(reasoner, fused)
        weights = list(reasoner.transformer.parameters())
        saved.append(saved_bytes(lambda: reasoner.predict_clean(*given), weights)[0])
    assert saved[1] < 0.75 * saved[0]


@pytest.mark.parametrize("level", Keep)
def test_every_activation_level(reasoner, level):
    given = instance(reasoner, True)
    parameters = with_lora(reasoner, fused=True)
    expected = results(reasoner, *given, parameters)
    keep_activations(reasoner.transformer, level)
    found = results(reasoner, *given, parameters)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiled_and_fake(reasoner):
    reasoner.transformer.blocks = reasoner.transformer.blocks[:1]
    given = instance(reasoner, True)
    parameters = with_lora(reasoner, fused=True)
    expected = reasoner.predict_clean(*given)
    compiled = torch.compile(lambda: reasoner.predict_clean(*given), fullgraph=True, backend="aot_eager")()
    for a, b in zip(*(torch.autograd.grad(y.sum(), parameters) for y in (compiled, expected)), strict=True):
        torch.testing.assert_close(a, b)
    meta = copy.deepcopy(reasoner.transformer).to("meta")
    timestep = torch.empty(1, 2, device="meta")
    sample = meta(torch.empty(1, 8, 3, 4, 6, device="meta"), timestep, torch.empty(1, 12, 32, device="meta")).sample
    assert sample.shape == (1, 8, 3, 4, 6)


def test_a_timestep_for_every_token_is_diffusers_own_forward(reasoner):
    """Image encoders and autocast run diffusers' forward, to the bit, except two timesteps, which diffusers lacks."""
    with_lora(reasoner, fused=True)
    network = reasoner.transformer
    x, text = torch.randn(1, 8, 3, 4, 6), torch.randn(1, 12, 32)
    two = torch.tensor([[0.0, 700.0]])
    each = by_token(two, 6, 18)
    ours = network(x, two, text).sample
    per_token = network(x, each, text, return_dict=False)[0]
    with torch.autocast("cpu", torch.bfloat16):
        autocast = network(x, two, text).sample
    unfuse_blocks(network)
    assert torch.equal(network(x, each, text).sample, per_token)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(x, each, text).sample, autocast)
    torch.testing.assert_close(ours, per_token)


def test_everything_trained_gets_its_gradient(reasoner):
    """Tables and norms are trained too: there the operators' plain expressions run."""
    network = reasoner.transformer.requires_grad_(True)
    condition, noise = instance(reasoner, True)
    found = []
    for _ in range(2):
        network.zero_grad()
        reasoner.predict_clean(condition, noise).square().mean().backward()
        found.append([p.grad.clone() for p in network.parameters()])
        fuse_blocks(network)
    for name, ours, theirs in zip(dict(network.named_parameters()), *found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7, msg=name)


def test_taken_away_with_the_lora(reasoner, tmp_path):
    network = reasoner.transformer
    add_lora(network, 4)
    assert not [block for block in network.blocks if type(block) is not wan_blocks.WanTransformerBlock]
    network.save_pretrained(tmp_path / "fused")
    assert copy.deepcopy(network).config == network.config
    remove_lora(network)
    network.save_pretrained(tmp_path / "stock")
    assert type(network) is diffusers.WanTransformer3DModel
    assert not [block for block in network.blocks if type(block) is not stock.WanTransformerBlock]
    names = [(tmp_path / kind / "config.json").read_text() for kind in ("fused", "stock")]
    assert names[0] == names[1]


class OtherProcessor(stock.WanAttnProcessor):
    pass


@pytest.mark.parametrize("change", ["processor", "hook", "projections", "subclass", "qk norm"])
def test_what_is_not_covered_stays_as_it_is(reasoner, change):
    network, block = reasoner.transformer, reasoner.transformer.blocks[1]
    if change == "processor":
        block.attn1.set_processor(OtherProcessor())
    elif change == "hook":
        block.norm3.register_forward_hook(lambda *_: None)
    elif change == "projections":
        block.attn1.fuse_projections()
    elif change == "subclass":
        block.__class__ = type("Other", (stock.WanTransformerBlock,), {})
    else:
        block.attn2.norm_q = torch.nn.LayerNorm(32)
    assert not fuse_blocks(network) and type(network) is diffusers.WanTransformer3DModel
    add_lora(network, 4)  # which fuses what it can
    reasoner.predict_clean(*instance(reasoner, True))


def test_a_difference_is_refused(reasoner, monkeypatch):
    real = wan_blocks.gated_residual
    monkeypatch.setattr(wan_blocks, "gated_residual", lambda x, y, *rest: real(x, 1.001 * y, *rest))
    with pytest.raises(InputError, match="the fused Wan block's output differs from diffusers' by"):
        fuse_blocks(reasoner.transformer)
    assert type(reasoner.transformer) is diffusers.WanTransformer3DModel
    assert type(reasoner.transformer.blocks[0]) is stock.WanTransformerBlock


def test_an_adapter_weight_of_zero_and_a_second_adapter(reasoner):
    """linear_group returns the results of the single layers, whichever adapters are active."""
    network = reasoner.transformer
    add_lora(network, 4, seed=0)
    given = instance(reasoner, True)
    for scale, disabled in itertools.product((0.0, 2.0), (False, True)):
        found = []
        for module in network.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", scale)
        (network.disable_lora if disabled else network.enable_lora)()
        for _ in range(2):
            found.append([reasoner.predict_clean(*given).detach()])
            unfuse_blocks(network)
        fuse_blocks(network)
        assert distance(*found) < 1e-5
