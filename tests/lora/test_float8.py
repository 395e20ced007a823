"""Frozen products in 8-bit floating point: the quantised numbers, both products, what is saved, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import Run, Solve
from vlmteacher.errors import InputError
from vlmteacher.lora import float8
from vlmteacher.lora.adapter import add_lora, lora_parameters, remove_lora
from vlmteacher.lora.float8 import Float8Linear, check_float8, quantize, quantize_blocks, saved_bytes
from vlmteacher.pipeline import TeacherPipeline

ROUNDING = 2**-4  # of e4m3, which has three bits after the first


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_numbers_are_right_to_a_sixteenth() -> None:
    x = draw(5, 32) * torch.tensor([[1e-6], [1.0], [1e4], [0.0], [3.0]])
    values, scale = quantize(x)
    again = values.float() * scale
    normal = x.abs() > 2**-6 * scale  # below, e4m3 has fewer bits
    assert ((again - x).abs() <= ROUNDING * x.abs())[normal].all() and not again[3].any()
    assert (values.float().abs().amax(1)[[0, 1, 2, 4]] == float8.LARGEST).all()


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_quantised_numbers(bias: bool) -> None:
    linear = nn.Linear(48, 32, bias=bias).requires_grad_(False)
    stock = copy.deepcopy(linear).double()
    layer = Float8Linear.of(linear)
    x, grad = draw(3, 7, 48, seed=1).requires_grad_(), draw(3, 7, 32, seed=2)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, grad)
    weight = layer.weight.double() * layer.scale.double()
    rows, scale = quantize(x.detach().flatten(0, 1))
    expected = (rows.double() * scale @ weight.T).unflatten(0, (3, 7)) + (0 if stock.bias is None else stock.bias)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    rows, scale = quantize(grad.flatten(0, 1) * layer.scale.T)
    torch.testing.assert_close(
        dx.double().flatten(0, 1), rows.double() * scale @ layer.weight.double(), rtol=1e-5, atol=1e-5
    )
    for ours, theirs in ((y, stock(x.double())), (dx, grad.double() @ stock.weight)):
        assert (ours - theirs).norm() / theirs.norm() < ROUNDING


def test_torch_multiplies_the_same_numbers() -> None:
    """`_scaled_mm`, with the layouts and scales that a GPU gets, where torch has it on a CPU."""
    (a, scale_a), (b, scale_b) = quantize(draw(16, 32).bfloat16()), quantize(draw(48, 32, seed=1).bfloat16())
    try:
        theirs = torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b.t(), out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(str(error))
    torch.testing.assert_close(float8._product(a, b, scale_a, scale_b, torch.bfloat16), theirs, rtol=2**-7, atol=2**-7)


def test_gradients_of_a_lora_keep_their_direction(pipe: TeacherPipeline) -> None:
    stock = pipe.reasoner.transformer
    eight = copy.deepcopy(stock)
    before = sum(tensor.nbytes for tensor in eight.state_dict().values())
    expected = saved_bytes(eight)
    quantize_blocks(eight)
    after = sum(tensor.nbytes for tensor in eight.state_dict().values())
    assert saved_bytes(eight) == 0 and before - after == expected > 0.3 * before
    gradients = []
    for transformer in (stock, eight):
        add_lora(transformer, 2, seed=0)
        for index, parameter in enumerate(lora_parameters(transformer)):
            parameter.data.add_(0.1 * draw(*parameter.shape, seed=index))
        text, latents = draw(1, 4, 32, seed=3), draw(1, 8, 2, 4, 6, seed=4)
        transformer(latents, torch.tensor([1000.0]), text, return_dict=False)[0].square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in lora_parameters(transformer)]))
        remove_lora(transformer)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98
    with pytest.raises(InputError, match="fuse without fp8"):
        pipe_of_eight = copy.copy(pipe)
        pipe_of_eight.reasoner = copy.copy(pipe.reasoner)
        pipe_of_eight.reasoner.transformer = eight
        pipe_of_eight.fuse("none.safetensors")


def test_refused(run: Run, solve: Solve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, error = run(*solve(tmp_path / "run", "--fp8"))
    assert status == 2 and "fp8 needs a GPU with 8-bit products" in error and "is on cpu" in error
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(InputError, match="the Reasoner is on A100"):
        check_float8(gpu, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_float8(gpu, torch.bfloat16)
    with pytest.raises(InputError, match="give bfloat16, not float32"):
        check_float8(gpu, torch.float32)
