"""Reasoners in fewer bits; without bitsandbytes and torchao most are skipped: pip install 'vlmteacher[quantized]'."""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.checkpoints.test_weight_files import gguf_file
from tests.conftest import QUERIES, Run, Solve
from tests.reasoners.checks import check_kept_levels
from tests.reasoners.test_parts import original_names, weights
from tests.reasoners.tiny_checkpoints import SIZE
from tests.tiny_transformers import FAMILIES, call, tiny_transformer
from vlmteacher import TeacherPipeline
from vlmteacher.checkpoints.quantized import METHODS, dequantize, fill, is_quantized, use_exact_products
from vlmteacher.errors import InputError, MissingExtra
from vlmteacher.lora.adapter import add_lora, lora_parameters, remove_lora, target_layers
from vlmteacher.lora.float8 import saved_bytes as fp8_saved_bytes
from vlmteacher.lora.formats import merge_lora, read_lora
from vlmteacher.lora.fused_layer import LoRALinear
from vlmteacher.ops.linear import is_plain
from vlmteacher.optimization.engines import check_engine
from vlmteacher.planning import format_plan
from vlmteacher.planning.models import build_reasoner
from vlmteacher.planning.plan import nbytes
from vlmteacher.reasoners.loading import adopt_reasoner, load_reasoner
from vlmteacher.reasoners.quantization import made_bytes, reduce_precision, saved_bytes
from vlmteacher.state import _plain, fingerprint

CPU = torch.device("cpu")
CHOICES = {"4bit": "bitsandbytes", "8bit": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
# RMS of the rounding of normal weights, over their own
ROUNDING = {"4bit": (0.05, 0.12), "8bit": (1e-3, 0.01), "int8": (1e-3, 0.01), "fp8": (0.01, 0.03)}


def needs(package: str) -> Any:
    return pytest.mark.skipif(
        find_spec(package) is None, reason=f"{package} is not installed: pip install 'vlmteacher[quantized]'"
    )


choices = pytest.mark.parametrize("choice", [pytest.param(c, marks=needs(p)) for c, p in CHOICES.items()])
torchao_only = needs("torchao")


def quantised(path: Path, choice: Any, dtype: torch.dtype = torch.float32) -> Any:
    reasoner = load_reasoner(path, dtype)
    reduce_precision(reasoner.networks, False, choice, CPU)
    return reasoner


def twin_of(network: Any, plain: Any) -> Any:
    """`plain` with the dequantised weights of `network`."""
    twin = copy.deepcopy(plain)
    for name, layer in network.named_modules():
        if is_quantized(layer):
            other = twin.get_submodule(name)
            other.weight = nn.Parameter(dequantize(layer, other.weight.dtype), requires_grad=False)
    for parameter in (*network.parameters(), *twin.parameters()):
        if type(parameter) is nn.Parameter:  # out of the mapped file: a product's rounding depends on the alignment
            parameter.data = parameter.data.clone()
    return twin


def gradients(reasoner: Any, transformer: Any, fused: bool = True) -> tuple[Tensor, list[Tensor]]:
    """The one-step prediction with a random LoRA on `transformer`, and the gradient of a function of it to the LoRA."""
    condition = reasoner.encode("move the red ball", None, *SIZE)
    noise = reasoner.noise(condition, torch.Generator().manual_seed(0))
    add_lora(transformer, 2, seed=0, fused=fused)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora_parameters(transformer):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    latents = reasoner.predict_clean_at(condition, noise.z1, 1.0, transformer=transformer)
    grads = torch.autograd.grad(latents.square().sum(), lora_parameters(transformer))
    remove_lora(transformer)
    return latents.detach(), list(grads)


@choices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dequantised_weights(t2v: Path, choice: str, dtype: torch.dtype) -> None:
    """To the bit, by the LoRA operator; to rounding, by PEFT's layers."""
    reasoner, plain = quantised(t2v, choice, dtype), load_reasoner(t2v, dtype).transformer
    layers = {name for name, layer in reasoner.transformer.named_modules() if is_quantized(layer)}
    linear = {name for name, layer in plain.named_modules() if is_plain(layer)}
    assert layers == {name for name in linear if name.startswith("blocks.")} and len(layers) == 2 * 10
    twin, low, high = twin_of(reasoner.transformer, plain), *ROUNDING[choice]
    one, other = (network.get_parameter("blocks.0.attn1.to_q.weight").float() for network in (twin, plain))
    assert low < (one - other).norm() / other.norm() < high

    latents, grads = gradients(reasoner, reasoner.transformer)
    expected, expected_grads = gradients(reasoner, twin)
    assert torch.equal(latents, expected) and not torch.equal(latents, gradients(reasoner, plain)[0])
    assert all(torch.equal(one, other) and other.any() for one, other in zip(grads, expected_grads, strict=True))
    by_peft, grads = gradients(reasoner, reasoner.transformer, fused=False)
    rounding = torch.finfo(dtype).eps
    assert (by_peft - expected).norm() <= 4 * rounding * expected.norm()
    one, other = (torch.cat([grad.flatten() for grad in parts]) for parts in (grads, expected_grads))
    assert (one - other).norm() <= 16 * rounding * other.norm()


@choices
def test_no_weight_is_saved_for_the_backward(t2v: Path, choice: str) -> None:
    """Of a layer with a LoRA: its input, the LoRA's factors and the small product, as of a plain one but the weight."""
    transformer = quantised(t2v, choice).transformer
    add_lora(transformer, 2, seed=0)
    layer = transformer.blocks[0].attn1.to_q
    assert type(layer) is LoRALinear and is_quantized(layer.base_layer)
    x, saved = torch.randn(5, 32, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        y = layer(x)
    assert sorted(saved) == sorted([(5, 32), (5, 2), (2, 32), (32, 2)])
    assert y.dtype == torch.float32 and y.requires_grad


@choices
def test_activation_levels_change_no_bit(t2v: Path, choice: str) -> None:
    reasoner = quantised(t2v, choice)
    condition = reasoner.encode("move the red ball", None, *SIZE)
    check_kept_levels(reasoner, condition, reasoner.noise(condition, torch.Generator().manual_seed(0)))


@choices
def test_bytes_are_those_of_a_plan(t2v: Path, choice: str) -> None:
    def stored(network: nn.Module) -> int:
        return sum(tensor.nbytes for key, value in network.state_dict().items() for _, tensor in _plain(key, value))

    for dtype in (torch.float32, torch.bfloat16):
        plain = load_reasoner(t2v, dtype).transformer
        saved = stored(plain) - stored(quantised(t2v, choice, dtype).transformer)
        planned = saved_bytes(plain)[choice]
        tables = 20 * (16 * 4 + 256 * 4 + 200)  # of NF4 and of its scales, and a description, which a plan leaves out
        assert planned - (tables if choice == "4bit" else 20 * 8) <= saved <= planned


@torchao_only
@pytest.mark.parametrize("choice", [pytest.param("4bit", marks=needs("bitsandbytes")), "int8"])
def test_a_run_is_recorded_and_resumed(models: dict[str, str], tmp_path: Path, choice: str) -> None:
    """And refused with other weights."""
    fixed: dict[str, Any] = {"rank": 2, "teacher_frames": 4, "learning_rate": 0.03, "progress": False}
    fixed |= {"queries": QUERIES, "generator": torch.Generator().manual_seed(0)}
    pipe = TeacherPipeline.from_pretrained(**models, quantization_config=choice)
    out = pipe("move the ball", max_steps=3, run_dir=tmp_path / "whole", **fixed)
    assert out.updates == 3 and out.history[-1]["loss"] < out.history[0]["loss"]
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["models"]["quantization"].startswith(
        "transformer "
    )
    assert not any(isinstance(layer, LoRALinear) for layer in pipe.reasoner.transformer.modules())

    def stop(pipe: Any, step: int, row: dict[str, Any]) -> None:
        if step == 1:
            raise KeyboardInterrupt

    fixed["generator"] = torch.Generator().manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        pipe("move the ball", max_steps=3, run_dir=tmp_path / "part", callback_on_step_end=stop, **fixed)
    fixed["generator"] = torch.Generator().manual_seed(0)
    with pytest.raises(InputError, match="model"):
        TeacherPipeline.from_pretrained(**models, quantization_config="fp8")(
            "move the ball", max_steps=3, run_dir=tmp_path / "part", resume=True, **fixed
        )
    again = TeacherPipeline.from_pretrained(**models, quantization_config=choice)
    resumed = again("move the ball", max_steps=3, run_dir=tmp_path / "part", resume=True, **fixed)
    assert resumed.lora == out.lora and [row["loss"] for row in resumed.history] == [row["loss"] for row in out.history]
    with pytest.raises(InputError, match="which are quantised: load them without quantization_config"):
        pipe.fuse(out)
    pipe.load_lora(out)  # goes on from it
    fixed["generator"] = torch.Generator().manual_seed(0)
    assert pipe("move the ball", max_steps=1, **fixed).history[0]["loss"] != out.history[0]["loss"]
    with pytest.raises(InputError, match="memory cannot be planned for a quantised Reasoner"):
        pipe("move the ball", memory="8", **{**fixed, "rank": None})


@torchao_only
def test_both_experts_or_the_one_that_is_named(a14b: Path) -> None:
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    def reduced(given: Any) -> tuple[list[int], str]:
        reasoner = load_reasoner(a14b)
        note = reduce_precision(reasoner.networks, False, given, CPU)["quantization"]
        experts = reasoner.transformer, reasoner.transformer_2
        return [sum(map(is_quantized, expert.modules())) for expert in experts], note

    int8 = TorchAoConfig(Int8WeightOnlyConfig())
    both, one = "transformer torchao Int8WeightOnlyConfig", "transformer_2 torchao Int8WeightOnlyConfig"
    assert reduced("int8") == ([20, 20], f"{both}, {one}")
    outside = 4  # layers beside the blocks, which diffusers quantises too, but for those that it keeps in float32
    assert reduced(int8) == ([20 + outside, 20 + outside], f"{both}, {one}")
    assert reduced({"transformer_2": int8}) == ([0, 20 + outside], one)
    assert reduced(PipelineQuantizationConfig(quant_mapping={"transformer": int8})) == ([20 + outside, 0], both)
    if find_spec("bitsandbytes"):
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        given = PipelineQuantizationConfig("bitsandbytes_4bit", nf4, ["transformer"])
        assert reduced(given) == ([20 + outside, 0], "transformer bitsandbytes nf4")
        assert reduced({"transformer": BitsAndBytesConfig(load_in_8bit=True), "transformer_2": int8})[0][0] > 20


@torchao_only
def test_a_few_step_lora_is_merged_before(t2v: Path, tmp_path: Path) -> None:
    file = tmp_path / "few.safetensors"
    generator = torch.Generator().manual_seed(0)
    draw = {"lora_A": torch.randn(2, 32, generator=generator), "lora_B": torch.randn(32, 2, generator=generator)}
    save_file({f"transformer.blocks.0.attn1.to_q.{name}.weight": value for name, value in draw.items()}, file)
    given: dict[str, Any] = {"few_step_lora": str(file), "preset": "wan2.1-lightx2v-4step"}
    merged, plain = load_reasoner(t2v, **given).transformer, load_reasoner(t2v).transformer
    reasoner = load_reasoner(t2v, **given)
    reduce_precision(reasoner.networks, False, "int8", CPU)
    ours = dequantize(reasoner.transformer.blocks[0].attn1.to_q, torch.float32)
    wanted, before = (network.blocks[0].attn1.to_q.weight for network in (merged, plain))
    assert (ours - wanted).norm() < 0.01 * wanted.norm() and (wanted - before).norm() > wanted.norm() / 2
    with pytest.raises(InputError, match=r"cannot be merged: blocks.0.attn1.to_q is quantised"):
        merge_lora(reasoner.transformer, read_lora(str(file)))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_a_gguf_file_stays_as_it_is(t2v: Path, tmp_path: Path, kind: str) -> None:
    """In less memory, with the prediction of its dequantised weights."""
    file = str(tmp_path / "one.gguf")
    gguf_file(Path(file), original_names(weights(t2v / "transformer")), kind)
    plain = load_reasoner(t2v, transformer=file)
    kept = load_reasoner(t2v, transformer=file, keep_quantized=METHODS)
    assert reduce_precision(kept.networks, False, "keep", CPU) == {"quantization": "transformer gguf"}
    layers = [name for name, layer in kept.transformer.named_modules() if is_quantized(layer)]
    assert {name for name in layers if name.startswith("blocks.")} >= {f"blocks.{i}.ffn.net.2" for i in range(2)}
    twin = twin_of(kept.transformer, plain.transformer)
    for name in layers:
        ours, theirs = twin.get_submodule(name).weight, plain.transformer.get_submodule(name).weight
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    (latents, grads), (expected, expected_grads) = (gradients(kept, network) for network in (kept.transformer, twin))
    assert torch.equal(latents, expected) and all(map(torch.equal, grads, expected_grads))
    assert fingerprint(kept.networks) != fingerprint(plain.networks)
    with pytest.raises(InputError, match='engine "compile" does not take GGUF weights: take "eager"'):
        check_engine("compile", kept, cast(Any, None))


@needs("bitsandbytes")
def test_repacked_weights_are_refused(t2v: Path) -> None:
    transformer = quantised(t2v, "4bit").transformer
    transformer.blocks[1].ffn.net[2].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(InputError, match="repacked its weights: load it again"):
        use_exact_products(transformer)


@pytest.mark.slow
@choices
def test_compiled_blocks_compute_the_same(t2v: Path, choice: str) -> None:
    reasoner = quantised(t2v, choice)
    latents, grads = gradients(reasoner, reasoner.transformer)
    for block in reasoner.transformer.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    again, compiled = gradients(reasoner, reasoner.transformer)
    torch.testing.assert_close(again, latents, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled, grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("choice", ["gguf", *(pytest.param(c, marks=needs(CHOICES[c])) for c in ("4bit", "int8"))])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, choice: str) -> None:
    """Every layer that gets a LoRA is quantised; results and gradients are those of the dequantised weights."""
    plain, network = tiny_transformer(family), tiny_transformer(family)
    if choice == "gguf":
        keep_gguf(network)
    else:
        reduce_precision({"transformer": network}, False, choice, CPU)
    targets = target_layers(network)
    odd = {name for name, layer in targets.items() if not is_quantized(layer)}
    assert all(choice == "gguf" and targets[name].in_features % 32 for name in odd) and len(odd) < len(targets) / 2
    results = []
    for transformer in (network, twin_of(network, plain)):
        add_lora(transformer, 2, seed=0)
        generator = torch.Generator().manual_seed(1)
        for parameter in lora_parameters(transformer):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        y = call(transformer, grad=True)
        grads = torch.autograd.grad(y.square().sum(), lora_parameters(transformer), allow_unused=True)
        results.append([y.detach(), *(grad for grad in grads if grad is not None)])
    assert len(results[0]) == len(results[1]) > len(targets) and all(map(torch.equal, *results))


def keep_gguf(network: Any) -> None:
    """Keep the weights of the blocks' linear layers as a GGUF file in Q8_0 would, in groups of 32 columns."""
    import gguf
    from diffusers import GGUFQuantizationConfig
    from diffusers.quantizers.gguf.utils import GGUFParameter

    kind, state = gguf.GGMLQuantizationType.Q8_0, dict(network.state_dict())
    for name, layer in network.named_modules():
        if is_plain(layer) and "blocks" in name and layer.in_features % 32 == 0:
            packed = torch.from_numpy(gguf.quantize(layer.weight.numpy(), kind))
            state[f"{name}.weight"] = GGUFParameter(packed, quant_type=kind)
    fill(network, state, GGUFQuantizationConfig(compute_dtype=torch.float32), CPU)


@torchao_only
def test_a_checkpoint_that_was_saved_quantised(t2v: Path, tmp_path: Path) -> None:
    """With "keep" it stays so, else it is dequantised, as before."""
    reasoner = quantised(t2v, "int8")
    reasoner.transformer.save_pretrained(tmp_path / "saved")
    given = str(tmp_path / "saved")
    kept = load_reasoner(t2v, transformer=given, keep_quantized=METHODS)
    assert reduce_precision(kept.networks, False, "keep", CPU) == {"quantization": "transformer torchao"}
    for name, layer in kept.transformer.named_modules():
        if is_quantized(layer):
            other = reasoner.transformer.get_submodule(name)
            assert torch.equal(layer.weight.qdata, other.weight.qdata)
            assert torch.equal(layer.weight.scale, other.weight.scale)
    (one, grads), (other, expected) = (gradients(each, each.transformer) for each in (kept, reasoner))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(grads, expected)
    plain = load_reasoner(t2v, transformer=given).transformer
    assert not any(map(is_quantized, plain.modules()))
    layer = reasoner.transformer.blocks[0].ffn.net[2]
    assert torch.equal(plain.blocks[0].ffn.net[2].weight, dequantize(layer, torch.float32))


@torchao_only
def test_a_loaded_pipeline_that_is_quantised(t2v: Path) -> None:
    from diffusers import PipelineQuantizationConfig, TorchAoConfig, WanPipeline
    from torchao.quantization import Int8WeightOnlyConfig

    config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig())})
    stock = WanPipeline.from_pretrained(t2v, quantization_config=config, torch_dtype=torch.float32)
    before = {name: id(parameter) for name, parameter in stock.transformer.named_parameters()}
    adopted = adopt_reasoner(stock)
    assert {name: id(parameter) for name, parameter in stock.transformer.named_parameters()} == before
    ours = load_reasoner(t2v)
    reduce_precision(ours.networks, False, {"transformer": TorchAoConfig(Int8WeightOnlyConfig())}, CPU)
    (one, grads), (other, expected) = (gradients(each, each.transformer) for each in (adopted, ours))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(grads, expected)
    stock.transformer.is_quantized = True
    for layer in stock.transformer.modules():
        if is_quantized(layer):
            layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    with pytest.raises(InputError, match="is quantised by torchao, whose layers are not known here"):
        adopt_reasoner(stock)


def test_refused(models: dict[str, str], run: Run, solve: Solve, tmp_path: Path, monkeypatch: Any) -> None:
    from diffusers import GGUFQuantizationConfig, PipelineQuantizationConfig

    def refused(said: str, given: Any, **more: Any) -> None:
        with pytest.raises((InputError, MissingExtra), match=said) as raised:
            TeacherPipeline.from_pretrained(**models, quantization_config=given, **more)
        assert "\n" not in str(raised.value)

    refused("unknown quantization_config '2bit': choose 4bit, 8bit, int8, fp8, keep", "2bit")
    refused("quantization_config names text_encoder: only transformer and transformer_2", {"text_encoder": None})
    refused("quantization_config names none of transformer", {})
    refused("quantization_config 16: give diffusers' BitsAndBytesConfig or TorchAoConfig", 16)
    refused('give the file as transformer and "keep" here', GGUFQuantizationConfig())
    refused("keep: the transformer's files are not quantised", "keep")
    monkeypatch.setattr("vlmteacher.lora.float8.LEAST_CAPABILITY", (0, 0))
    monkeypatch.setattr("vlmteacher.reasoners.quantization.check_float8", lambda device, dtype: None)
    refused("fp8 and quantization_config exclude each other", "keep", fp8=True)
    if find_spec("bitsandbytes"):
        nf4 = {"load_in_4bit": True}
        named = PipelineQuantizationConfig("bitsandbytes_4bit", nf4, ["transformer", "vae"])
        refused("quantization_config names vae", named)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for choice, package in CHOICES.items():
        refused(rf"a Reasoner in {choice} needs {package}: pip install 'vlmteacher\[quantized\]'", choice)
    status, _, error = run(*solve(tmp_path / "run", "--quantize-reasoner", "4bit"))
    assert status == 2 and "a Reasoner in 4bit needs bitsandbytes" in error and not (tmp_path / "run").exists()


def test_planned(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    flags = ["--dtype", "float32", "--quantize-reasoner", "4bit", "--json", "-o", file]
    status, out, _ = run("plan", "--reasoner", "packaged", "--teacher", "packaged", *flags)
    plan, solve = json.loads(out), json.loads(file.read_text())["solve"]
    saves, weights = plan["quantization_saves_bytes"], plan["ours"]["weights"]
    assert saves["4bit"] > saves["8bit"] > saves["int8"] > 0 and status == 0
    transformer = build_reasoner("packaged", torch.float32)[0].transformer
    assert weights["reasoner"] == nbytes(transformer) - saves["4bit"]
    assert weights["dequantised weight"] == made_bytes(transformer) > 0
    assert min(stage["peak_bytes"] for stage in plan["ours"]["stages"].values()) >= sum(weights.values())
    assert solve["quantize_reasoner"] == "4bit" and "--quantize-reasoner` saves" in format_plan(plan)


def test_bytes_of_a_published_model() -> None:
    """Wan2.2-TI2V-5B: 2 bytes of each of 4.8 thousand million weights in blocks become about half a byte."""
    transformer = build_reasoner("wan2.2-ti2v-5b")[0].transformer
    weights = sum(p.numel() for n, p in transformer.named_parameters() if n.startswith("blocks.") and p.dim() == 2)
    saves = saved_bytes(transformer)
    assert weights * (1.5 - 1 / 60) < saves["4bit"] < weights * 1.5
    assert saves["fp8"] == fp8_saved_bytes(transformer) and made_bytes(transformer) == 6 * 3072 * 14336
