"""The fused layer against PEFT's: results, names, adapters, the cases that PEFT's forward runs, and the check."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from safetensors.torch import load, save
from torch import Tensor, nn

from vlmteacher.errors import InputError
from vlmteacher.lora import fused_layer as lora_linear
from vlmteacher.lora.fused_layer import LoRALinear, fuse_lora
from vlmteacher.ops.lora_linear import lora_linear_reference


def peft_model(dtype: torch.dtype = torch.float32, **config: object) -> nn.Module:
    """Two layers under PEFT's LoRA with random adapters in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 6, bias=False)).to(dtype).requires_grad_(False)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["0", "2"]} | config
    model = inject_adapter_in_model(LoraConfig(**config), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) / 4
    return model


def pair(dtype: torch.dtype = torch.float32, **config: object) -> tuple[nn.Module, nn.Module]:
    """The layers by PEFT, and the same layers fused."""
    stock = peft_model(dtype, **config)
    ours = copy.deepcopy(stock)
    assert fuse_lora(ours) == ["0", "2"]
    assert all(type(ours[i]) is LoRALinear for i in (0, 2))
    return stock, ours


def run(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Returns the output and the gradients of x and of every adapter."""
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(y.float().square().sum(), [x, *trained], allow_unused=True)
    return [y.detach(), *(t for t in found if t is not None)]


def assert_same(ours: nn.Module, stock: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    tolerance = 1e-4 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps  # either rounds about four times
    for a, b in zip(run(ours, dtype), run(stock, dtype), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture()
def calls(monkeypatch):
    """Counts the calls of the operator."""
    seen = []
    real = lora_linear.lora_linear
    monkeypatch.setattr(lora_linear, "lora_linear", lambda *args: seen.append(1) or real(*args))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_results_names_and_files_as_peft(dtype, calls):
    stock, ours = pair(dtype)
    calls.clear()
    assert_same(ours, stock, dtype)
    assert len(calls) == 2
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert "0.lora_A.default.weight" in ours.state_dict()
    mine, theirs = (load(save(get_peft_model_state_dict(model))) for model in (ours, stock))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_scaling_may_change_and_adapters_add_up(calls):
    stock, ours = pair()
    for model in (stock, ours):
        torch.manual_seed(3)
        for i in (0, 2):
            model[i].set_scale("default", 0.25)
            model[i].update_layer("second", 2, lora_alpha=5, config=LoraConfig(r=2, lora_alpha=5))
            nn.init.normal_(model[i].lora_B["second"].weight)
            model[i].set_adapter(["default", "second"])
    calls.clear()
    assert_same(ours, stock)
    assert len(calls) == 2
    for model in (stock, ours):
        for i in (0, 2):
            model[i].set_adapter(["second"])
    assert_same(ours, stock)


def test_what_the_operator_does_not_do_is_left_to_peft(calls):
    stock, ours = pair()
    calls.clear()
    for change in (lambda m: m.enable_adapters(False), lambda m: m.merge(), lambda m: m.unmerge()):
        for model in (stock, ours):
            for i in (0, 2):
                change(model[i])
        assert_same(ours, stock)
    assert not calls  # unmerge leaves the adapters disabled
    for config in ({"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}):
        stock, ours = pair(**config)
        calls.clear()
        torch.manual_seed(0)
        found = run(ours)
        torch.manual_seed(0)
        for a, b in zip(found, run(stock), strict=True):
            torch.testing.assert_close(a, b)
        assert not calls
    ours.eval()  # no dropout any more
    run(ours)
    assert len(calls) == 2


def test_a_hook_on_the_base_layer_is_still_called(calls):
    _, ours = pair()
    seen = []
    ours[0].base_layer.register_forward_hook(lambda *args: seen.append(1))
    calls.clear()
    run(ours)
    assert seen == [1] and len(calls) == 1


def test_a_plain_linear_layer_becomes_one():
    torch.manual_seed(0)
    linear = nn.Linear(8, 6, dtype=torch.bfloat16)
    layer = LoRALinear.from_linear(linear, rank=3, alpha=6)
    assert list(layer.state_dict()) == [
        "base_layer.weight", "base_layer.bias", "lora_A.default.weight", "lora_B.default.weight",
    ]  # fmt: skip
    assert {n: p.dtype for n, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A.default.weight": torch.float32,
        "lora_B.default.weight": torch.float32,
    }
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    assert torch.equal(layer(x), linear(x))  # B = 0
    nn.init.normal_(layer.lora_B["default"].weight)
    a, b = layer.lora_A["default"].weight.bfloat16(), layer.lora_B["default"].weight.bfloat16()
    plain = lora_linear_reference(x, linear.weight, linear.bias, a, b, 2.0)
    torch.testing.assert_close(layer(x), plain, rtol=0.05, atol=0.05)
    with pytest.raises(InputError, match="at least 1, not 0"):
        LoRALinear.from_linear(nn.Linear(2, 2), rank=0)


def test_a_layer_that_differs_is_refused_and_nothing_is_changed(monkeypatch):
    model = peft_model()
    before = run(model)
    real = lora_linear.lora_linear
    monkeypatch.setattr(lora_linear, "lora_linear", lambda *args: 1.01 * real(*args))
    with pytest.raises(
        InputError, match=r"0: the fused LoRA's output differs from PEFT's by 1.0e-02 .*fused_lora=False"
    ):
        fuse_lora(model)
    assert all(type(model[i]) is PeftLinear for i in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(run(model), before, strict=True))


def test_the_proof_leaves_weights_gradients_and_random_numbers_alone():
    model = peft_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    fuse_lora(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("change", ["none", "no biases", "one bias", "hook", "stock", "merged"])
def test_layers_that_share_x_are_one_call_of_the_operator(change, monkeypatch):
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(8, n) for n in (6, 4, 6)).requires_grad_(False)
    if change in ("no biases", "one bias"):
        for layer in model[: 3 if change == "no biases" else 1]:
            layer.bias = None
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "1", "2"]), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    expected_model = copy.deepcopy(model)
    fuse_lora(model)
    if change == "hook":
        model[1].register_forward_hook(lambda *_: None)
    elif change == "stock":
        model[1].__class__ = PeftLinear
    elif change == "merged":
        model[1].merge()
    calls = []
    real = lora_linear.lora_linear_group
    monkeypatch.setattr(lora_linear, "lora_linear_group", lambda *args: calls.append(args) or real(*args))
    x = torch.randn(3, 8)
    torch.testing.assert_close(lora_linear.linear_group(list(model), x), [layer(x) for layer in expected_model])
    assert len(calls) == (change in ("none", "no biases"))
