"""Qwen3.5 and models with experts: what a question continues from, what is kept, what is refused."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from benchmarks.memory import saved_bytes
from tests.tiny_teacher import tiny_qwen3_5, tiny_qwen3_5_moe, tiny_qwen3_vl, tiny_qwen3_vl_moe
from vlmteacher.cli import main
from vlmteacher.errors import InputError
from vlmteacher.ops.attention import is_native
from vlmteacher.queries import QuerySet
from vlmteacher.teachers import load_teacher
from vlmteacher.teachers.base import adopt_teacher
from vlmteacher.teachers.prompt import Chat
from vlmteacher.teachers.shared_prefix import Keep, answer_losses, kept_bytes

MAKERS: dict[str, Callable[..., Path]] = {
    "qwen3_5": tiny_qwen3_5,
    "qwen3_5_moe": tiny_qwen3_5_moe,
    "qwen3_vl_moe": tiny_qwen3_vl_moe,
}
QUERIES = QuerySet("Is the red ball on the square?", ("Is it?", "Does the ball move slowly?"))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


def frames_of(count: int, height: int = 32, width: int = 48) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prefix", [1, 2, 3, 70])
@pytest.mark.parametrize("own", [(1,), (1, 5), (3, 66, 2)])
def test_a_question_continues_from_any_prefix(paths: dict[str, Path], prefix: int, own: tuple[int, ...]) -> None:
    """Shorter than the convolution, longer than a chunk of the delta rule; questions of one token and of many."""
    teacher: Any = load_teacher(paths["qwen3_5"])
    rng = torch.Generator().manual_seed(prefix)
    shared = torch.randint(10, 200, (prefix,), generator=rng).tolist()
    chats = [
        Chat([*shared, 20 + i, *torch.randint(10, 200, (length,), generator=rng).tolist()], [7])
        for i, length in enumerate(own)
    ]
    clip = teacher.clip(range(2), 8.0, 32, 32)
    layout = teacher.pack(clip, chats)
    assert layout.prefix == (prefix if len(own) > 1 else layout.tokens)
    none = teacher.language.embed_tokens(layout.video)  # no video
    with torch.no_grad():
        head = teacher.model.get_output_embeddings()
        ours = answer_losses(teacher.language, head, layout, none, decoder=teacher.decoder)
        stock = [teacher.model(input_ids=torch.tensor([chat.prompt])).logits[0, -1] for chat in chats]
    torch.testing.assert_close(ours, -torch.stack(stock).log_softmax(-1)[:, 7], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", MAKERS)
def test_layers_keep_what_the_budget_counts(paths: dict[str, Path], family: str) -> None:
    teacher: Any = load_teacher(paths[family])
    if not is_native(torch.empty(1, 1, 1, 2)):
        pytest.skip("torch's own attention keeps more than output and softmax statistics")
    clip = teacher.clip(range(8), 8.0, 64, 96)
    layout, head = teacher.layout(clip, QUERIES), teacher.model.get_output_embeddings()
    with torch.no_grad():
        features = teacher.encode(frames_of(8, 64, 96), clip.size)
    leaves = [feature.detach().requires_grad_() for feature in features]
    layers = teacher.language.layers
    counted = kept_bytes(layers, layout.tokens, teacher.decoder)
    without_last = kept_bytes(layers[:-1], layout.tokens, teacher.decoder)  # which computes the answers only
    parts = teacher.language, head, layout, leaves[0], leaves[1:]

    def size(keep: Keep) -> int:
        run = functools.partial(answer_losses, *parts, keep, decoder=teacher.decoder)
        return saved_bytes(run, list(teacher.model.parameters()))[0]

    least = size(Keep.INPUT)  # with what is kept outside of the layers
    for keep in (Keep.ALL, Keep.ATTENTION):
        low, high = (bound[keep] - bound[Keep.INPUT] for bound in (without_last, counted))
        assert 0.98 * low <= size(keep) - least <= 1.02 * high


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_the_routers_weights_have_a_gradient(paths: dict[str, Path], family: str) -> None:
    """Against finite differences, in a direction of the frames in which the router's part is not small."""
    teacher: Any = load_teacher(paths[family])
    frames = frames_of(4).requires_grad_()

    def value(x: Tensor) -> Tensor:
        return teacher.losses(x, range(4), 8.0, QUERIES).sum()

    (gradient,) = torch.autograd.grad(value(frames), frames)
    gates = [module for name, module in teacher.model.named_modules() if name.endswith("mlp.gate")]
    handles = [
        gate.register_forward_hook(lambda module, inputs, output: (output[0], output[1].detach(), output[2]))
        for gate in gates
    ]
    (without,) = torch.autograd.grad(value(frames), frames)
    for handle in handles:
        handle.remove()
    part = gradient - without
    assert len(gates) >= 2 and part.norm() > 0.05 * gradient.norm()
    direction, step = part / part.norm(), 2e-3
    with torch.no_grad():
        slope = (value(frames + step * direction) - value(frames - step * direction)) / (2 * step)
    expected, blind = ((x * direction).sum().item() for x in (gradient, without))
    assert slope.item() == pytest.approx(expected, abs=0.1 * abs(expected - blind))


def test_their_processors_are_those_of_qwen3_vl() -> None:
    """So its prompts and pixels are compared for all of them (`test_preprocessing.py`, `test_families.py`)."""
    for names in (PROCESSOR_MAPPING_NAMES, VIDEO_PROCESSOR_MAPPING_NAMES):
        assert all(names[family] == names["qwen3_vl"] for family in MAKERS)


def test_the_answer_follows_a_thought_of_nothing(paths: dict[str, Path]) -> None:
    teacher: Any = load_teacher(paths["qwen3_5"])
    prompt, answer = teacher._question_chat("Is it?", "")
    assert teacher.tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert teacher.tokenizer.decode(answer) == "Yes"


def test_weights_for_predicting_further_tokens_are_ignored(paths: dict[str, Path], tmp_path: Path) -> None:
    """Published checkpoints of Qwen3.5 hold them, and no class of transformers."""
    path = shutil.copytree(paths["qwen3_5"], tmp_path / "copy")
    weights = load_file(path / "model.safetensors")
    save_file(weights | {"mtp.fc.weight": torch.zeros(32, 64)}, path / "model.safetensors", {"format": "pt"})
    ours, plain = (load_teacher(each).losses(frames_of(2), range(2), 8.0, QUERIES) for each in (path, paths["qwen3_5"]))
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_experts_as_published(paths: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Qwen3-VL's are stored as (experts, in, out), Qwen3.5's as transformers has them."""
    path = shutil.copytree(paths[family], tmp_path / "copy")
    teacher: Any = load_teacher(path)
    state = {name: x for name, x in load_file(path / "model.safetensors").items() if ".experts." not in name}
    for name, x in teacher.model.state_dict().items():
        if ".experts." in name:
            state[name] = x.mT.contiguous() if family == "qwen3_vl_moe" else x
    save_file(state, path / "model.safetensors", {"format": "pt"})
    again: Any = load_teacher(path)
    assert all(torch.equal(x, again.model.state_dict()[name]) for name, x in teacher.model.state_dict().items())


def test_float8_weights_are_dequantised_experts_too(paths: dict[str, Path], tmp_path: Path) -> None:
    """In DeepSeek's blocks, an expert a matrix; the gradient to the pixels is that of the plain model."""
    path = shutil.copytree(paths["qwen3_5_moe"], tmp_path / "float8")
    plain = shutil.copytree(paths["qwen3_5_moe"], tmp_path / "plain")
    state, expected = load_file(path / "model.safetensors"), {}
    for name, x in list(state.items()):
        expected[name] = x
        if ".experts." in name or name.endswith("self_attn.q_proj.weight"):
            scale = x.abs().amax().view(1, 1) / 448
            state[name] = (x / scale).to(torch.float8_e4m3fn)
            state[f"{name}_scale_inv"] = scale
            expected[name] = state[name].float() * scale
    save_file(state, path / "model.safetensors", {"format": "pt"})
    save_file(expected, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    method = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    results = []
    for each in (path, plain):
        frames = frames_of(3).requires_grad_()
        losses = load_teacher(each).losses(frames, range(3), 8.0, QUERIES)
        results.append((losses.detach(), torch.autograd.grad(losses.sum(), frames)[0]))
    assert len(state) > len(expected) and all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_text_models_are_refused(paths: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((paths["qwen3_5"] / "config.json").read_text())
    text = shutil.copytree(paths["qwen3_5"], tmp_path / "text")
    (text / "config.json").write_text(json.dumps(config["text_config"]))
    assert main(["queries", "--teacher", str(text), "--prompt", "Move it."]) == 2
    said = capsys.readouterr().err
    assert "is of the model type 'qwen3_5_text'; known types: qwen3_vl, " in said and said.count("\n") == 1
    assert said.endswith("take a VLM that sees videos\n")
    with pytest.raises(InputError, match=r"'qwen3'; known types: .*qwen3_5, .*: take a VLM that sees videos"):
        adopt_teacher(transformers.Qwen3ForCausalLM(small_qwen3()), None)
    language = {
        name: x for name, x in load_file(paths["qwen3_5"] / "model.safetensors").items() if "visual" not in name
    }
    blind = shutil.copytree(paths["qwen3_5"], tmp_path / "blind")
    save_file(language, blind / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks \d+ weights \(model\.visual\."):
        load_teacher(blind)


def small_qwen3() -> Any:
    return transformers.Qwen3Config(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )


def test_experts_are_not_quantised(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # with bitsandbytes, or without
    for family in ("qwen3_vl_moe", "qwen3_5_moe"):
        with pytest.raises(InputError, match=r"has experts, .* leave quantize \(4bit\) out"):
            load_teacher(paths[family], quantize="4bit")


def test_other_language_models_are_refused(tmp_path: Path) -> None:
    """A decoder is asked for layers that it does not know."""
    hybrid: Any = load_teacher(tiny_qwen3_5(tmp_path / "hybrid"))
    dense: Any = load_teacher(tiny_qwen3_vl(tmp_path / "dense"))
    with pytest.raises(InputError, match=r"'a': its language model has no input_layernorm\.variance_epsilon"):
        dense.decoder.check(hybrid.language, "a")
    with pytest.raises(InputError, match=r"'b': its language model has no input_layernorm\.eps"):
        hybrid.decoder.check(dense.language, "b")
