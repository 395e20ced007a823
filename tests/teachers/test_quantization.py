"""Teachers in 4 and 8 bits; without bitsandbytes most are skipped: pip install 'vlmteacher[quantized]'."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from tests.tiny_models import tiny_wan_pipeline
from tests.tiny_teacher import tiny_glm4v, tiny_internvl, tiny_qwen3_vl, tiny_qwen25_vl, tiny_smolvlm
from vlmteacher import TeacherPipeline
from vlmteacher.checkpoints.quantized import dequantize
from vlmteacher.errors import InputError, MissingExtra
from vlmteacher.queries import QuerySet
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.teachers import load_teacher
from vlmteacher.teachers.quantization import UNTOUCHED
from vlmteacher.teachers.qwen_vl import QwenVLTeacher

QUERIES = QuerySet("Is the red ball on the square?", ("Is it?", "Does the ball go around all of the blocked cells?"))
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install 'vlmteacher[quantized]'"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3_vl(tmp_path_factory.mktemp("teacher"))


def judged(teacher: Any) -> tuple[Tensor, Tensor]:
    """The losses of five frames, and the gradient of a mixture of them to the pixels."""
    frames = torch.rand(5, 3, 32, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses = teacher.losses(frames, range(5), 8.0, QUERIES)
    (gradient,) = torch.autograd.grad(losses @ torch.tensor([1.0, 2.0, 3.0]), frames)
    return losses.detach(), gradient


def quantised_layers(model: Any) -> Iterator[tuple[str, Any]]:
    return ((n, m) for n, m in model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt"))


def dequantised(path: Path, teacher: QwenVLTeacher, dtype: torch.dtype) -> QwenVLTeacher:
    """The stock model with plain linear layers, whose weights are the dequantised ones."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(path, dtype=dtype)
    plain = dict(model.named_modules())
    for name, layer in quantised_layers(teacher.model):
        plain[name].weight.data.copy_(dequantize(layer, torch.float32))
    return QwenVLTeacher(model, teacher.tokenizer, teacher.video, teacher.image)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_losses_and_pixel_gradients_are_those_of_the_dequantised_model(path: Path, quantize: Any, dtype: Any) -> None:
    teacher: Any = load_teacher(path, dtype, quantize=quantize)
    names = [name for name, _ in quantised_layers(teacher.model)]
    assert teacher.quantized and len(names) == 3 * 7 and not any("visual" in name for name in names)
    twin = dequantised(path, teacher, dtype)
    losses, gradient = judged(teacher)
    expected, expected_gradient = judged(twin)
    assert torch.equal(losses, expected)
    assert (gradient - expected_gradient).norm() <= 1e-6 * expected_gradient.norm() > 0
    full, _ = judged(load_teacher(path, dtype))
    assert not torch.equal(losses, full)

    # after this bitsandbytes' own 4-bit layer would have no gradient any more
    with torch.no_grad():
        teacher.losses(torch.rand(2, 3, 32, 48), range(2), 8.0, QUERIES)
    teacher._generate(teacher._query_inputs("Move it.", Image.new("RGB", (32, 32))), sample=False)
    again, again_gradient = judged(teacher)
    assert torch.equal(again, losses) and torch.equal(again_gradient, gradient)


@needs_bitsandbytes
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_a_checkpoint_that_was_saved_quantised(path: Path, quantize: Any, tmp_path: Path) -> None:
    """It is used as it is, in any dtype of the rest; quantised a second time it would stay as it is without a word."""
    teacher: Any = load_teacher(path, quantize=quantize)
    saved = shutil.copytree(path, tmp_path / "saved", ignore=shutil.ignore_patterns("*.safetensors"))
    teacher.model.save_pretrained(saved)
    losses, gradient = judged(teacher)
    again, again_gradient = judged(load_teacher(saved))
    assert torch.equal(again, losses) and torch.equal(again_gradient, gradient)
    narrow: Any = load_teacher(saved, torch.bfloat16)
    assert {p.dtype for p in narrow.model.parameters() if p.is_floating_point()} == {torch.bfloat16}
    torch.testing.assert_close(judged(narrow)[0], losses, rtol=0.05, atol=0.05)
    with pytest.raises(InputError, match=r"is quantised by bitsandbytes already: leave quantize \(4bit\) out"):
        load_teacher(saved, quantize="4bit")


@needs_bitsandbytes
@pytest.mark.parametrize("entries", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}])
def test_a_text_encoder_of_bitsandbytes_is_dequantised(entries: dict[str, Any], tmp_path: Path) -> None:
    """Only Teachers keep such weights: the Reasoner's are multiplied as they are."""
    from transformers import BitsAndBytesConfig, UMT5EncoderModel

    pipeline = tiny_wan_pipeline(tmp_path / "pipeline")
    plain = load_reasoner(pipeline).text_encoder
    small = {"quantization_config": BitsAndBytesConfig(**entries), "device_map": {"": "cpu"}}
    UMT5EncoderModel.from_pretrained(pipeline / "text_encoder", **small).save_pretrained(pipeline / "text_encoder")
    loaded = load_reasoner(pipeline).text_encoder
    assert not list(quantised_layers(loaded)) and loaded.dtype == torch.float32
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    off = (loaded.get_parameter(name) - plain.get_parameter(name)).norm() / plain.get_parameter(name).norm()
    assert 1e-4 < off < 0.2


@needs_bitsandbytes
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_nothing_is_saved_for_backward_but_what_the_rest_saves(path: Path, quantize: Any) -> None:
    teacher: Any = load_teacher(path, quantize=quantize)
    layer = next(layer for _, layer in quantised_layers(teacher.model))
    saved = []
    x = torch.randn(4, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    weight = dequantize(layer, torch.float32)
    assert saved == [] and weight.shape == (layer.out_features, layer.in_features)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * (x @ weight.T) @ weight)


@needs_bitsandbytes
def test_a_quantised_teacher_stays_where_it_is(models: dict[str, str]) -> None:
    pipe = TeacherPipeline.from_pretrained(**models, quantize="4bit", offload=True)
    teacher = pipe.teacher
    assert teacher.quantized and teacher.to("cpu") is teacher and teacher.to(dtype=torch.float32) is teacher
    with pytest.raises(InputError, match=r"cannot be sent to meta: .*device_map"):
        teacher.to("meta")
    with pytest.raises(InputError, match="cannot be sent to bfloat16"):
        teacher.to(dtype=torch.bfloat16)
    fixed: dict[str, Any] = {"rank": 2, "teacher_frames": 4, "learning_rate": 0.03, "max_steps": 2, "progress": False}
    out = pipe("move the ball", queries=QUERIES, generator=torch.Generator().manual_seed(0), **fixed)
    assert out.updates == 2 and out.history[0]["grad_norm"] > 0


@needs_bitsandbytes
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_the_packaged_teacher_writes_the_same_queries(tmp_path: Path, quantize: str) -> None:
    command = [sys.executable, "-m", "vlmteacher", "queries", "--prompt", "Move the yellow ball into the purple box."]
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    plain, ours = (
        subprocess.run([*command, *flags], capture_output=True, text=True, check=True, cwd=tmp_path, env=env)
        for flags in ([], ["--quantize", quantize])
    )
    assert ours.stdout == plain.stdout and "yellow ball" in ours.stdout and ours.stderr == ""


def test_bad_values(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="unknown quantize '2bit': choose '8bit' or '4bit'"):
        load_teacher(path, quantize="2bit")  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingExtra, match=r"a Teacher in 4bit needs bitsandbytes: pip install 'vlmteacher\[quantized\]'"
    ):
        load_teacher(path, quantize="4bit")


@pytest.mark.parametrize("make", [tiny_qwen3_vl, tiny_qwen25_vl, tiny_internvl, tiny_smolvlm, tiny_glm4v])
def test_every_vision_tower_is_left_out(make: Any, tmp_path: Path) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    teacher: Any = load_teacher(make(tmp_path))
    linear = {module: name for name, module in teacher.model.named_modules() if isinstance(module, torch.nn.Linear)}
    quantised = {name for name in linear.values() if should_convert_module(name, UNTOUCHED)}
    assert quantised == {linear[module] for module in teacher.language.modules() if module in linear}
