"""Checkpoints as users have them: revisions, single files of other tools, float8, GGUF, quantised."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import TINY_SETTINGS
from vlmteacher import chat_templates
from vlmteacher.checkpoints.pretrained import load_network
from vlmteacher.errors import InputError
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.reasoners.sampling import SamplerSettings
from vlmteacher.teachers import load_teacher


@pytest.fixture(scope="module")
def weights(t2v: Path) -> dict[str, torch.Tensor]:
    """The weights of a pipeline's transformer."""
    return load_file(next((t2v / "transformer").glob("*.safetensors")))


def is_product(name: str, value: torch.Tensor) -> bool:
    return value.dim() == 2 and name.startswith("blocks.") and name.endswith(".weight")


def others(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a transformer of another seed."""
    draw = torch.Generator().manual_seed(5)
    return {name: value + 0.1 * torch.randn(value.shape, generator=draw) for name, value in weights.items()}


def check_transformer(t2v: Path, file: Path, expected: dict[str, torch.Tensor]) -> None:
    """Check that the transformer from a file has exactly these weights, to the bit."""
    state = load_reasoner(t2v, transformer=str(file)).transformer.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


def refused(call, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- revisions


def test_a_revision_of_a_hub_id(t2v, weights, tmp_path, monkeypatch):
    """A hub cache with two commits: main and a tagged one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached, second = tmp_path / "models--me--model", others(weights)
    (cached / "refs").mkdir(parents=True)
    for ref, commit in (("main", "0" * 40), ("v2", "1" * 40)):
        shutil.copytree(t2v, cached / "snapshots" / commit)
        (cached / "refs" / ref).write_text(commit)
    save_file(second, next((cached / "snapshots" / ("1" * 40) / "transformer").glob("*.safetensors")))

    def held(name: str, **options: str) -> torch.Tensor:
        return load_reasoner(name, local_files_only=True, **options).transformer.state_dict()["proj_out.weight"]

    for name, expected in (
        ("me/model", weights),
        ("me/model@main", weights),
        ("me/model@v2", second),
        (f"me/model@{'1' * 40}", second),
    ):
        assert torch.equal(held(name), expected["proj_out.weight"])
        assert torch.equal(held(str(t2v), transformer=name), expected["proj_out.weight"])
    refused(lambda: held("me/model@v3"), "me/model@v3 is neither a directory nor .*the revision after @")
    refused(lambda: held("me/model@"), "names no revision")
    refused(lambda: held(str(t2v), transformer="me/model@v3"), "me/model@v3")


# ---------------------------------------------------------------- single files


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model."])
def test_a_single_file_with_other_networks_beside_it(t2v, weights, prefix, tmp_path):
    second = others(weights)
    state = {prefix + name: value for name, value in second.items()} | {"vae.conv.weight": torch.zeros(2)}
    save_file(state, file := tmp_path / "one.safetensors")
    check_transformer(t2v, file, second)
    save_file({name: value for name, value in state.items() if "to_q.bias" not in name}, file)
    refused(lambda: load_reasoner(t2v, transformer=str(file)), r"lacks 4 weights \(blocks\.0\.attn1\.to_q\.bias")


@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("rows", [False, True])
def test_float8_weights_are_multiplied_by_their_scales(t2v, weights, scale_name, rows, tmp_path):
    """Float8 files as ComfyUI and LightX2V write them, with marks and the scales of inputs, which are ignored."""
    state, expected = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
    for name, value in weights.items():
        if not is_product(name, value):
            state[name] = expected[name] = value
            continue
        scale = value.abs().amax(1, keepdim=True) / 448 if rows else value.abs().amax() / 448
        state[name] = (value / scale).to(torch.float8_e4m3fn)
        layer = name.removesuffix("weight")
        state[layer + scale_name] = scale
        state[layer + ("scale_input" if scale_name == "scale_weight" else "input_scale")] = torch.ones(())
        expected[name] = state[name].float() * scale
    save_file(state, file := tmp_path / "one.safetensors")
    check_transformer(t2v, file, expected)

    layer = "blocks.0.attn1.to_q."
    load = lambda: load_reasoner(t2v, transformer=str(file))  # noqa: E731
    for wrong, said in (
        ({layer + scale_name: torch.ones(3)}, r"\(3,\) for a weight \(32, 32\): it must be one number"),
        ({layer + scale_name: torch.ones((), dtype=torch.int32)}, "it must be one number, or one per row"),
        ({layer + scale_name: torch.tensor(float("nan"))}, "holds NaN or infinity"),
    ):
        save_file(state | wrong, file)
        refused(load, said)
    save_file({name: value for name, value in state.items() if name != layer + scale_name}, file)
    refused(load, rf"F8_E4M3 values without a scale \({layer}weight\)")


def gguf_file(path: Path, weights: dict[str, torch.Tensor], kind: str = "Q8_0") -> dict[str, torch.Tensor]:
    """Write a GGUF file of a transformer as ComfyUI-GGUF does; returns its dequantised weights.

    Products are quantised, the convolution has its true shape in the metadata because GGML takes four sides.
    """
    gguf = pytest.importorskip("gguf")
    quant = gguf.GGMLQuantizationType[kind]
    writer, expected = gguf.GGUFWriter(path, "wan"), {}
    for name, value in weights.items():
        array = value.numpy()
        if is_product(name, value):
            data = gguf.quantize(array, quant)
            writer.add_tensor(name, data, raw_dtype=quant)
            expected[name] = torch.from_numpy(gguf.dequantize(data, quant).copy())
            continue
        if value.dim() > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(value.shape))
            array = array.reshape(value.shape[0], -1)
        writer.add_tensor(name, array)
        expected[name] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_a_gguf_transformer(t2v, weights, kind, tmp_path):
    file = tmp_path / "one.gguf"
    expected = gguf_file(file, others(weights), kind)
    assert any(not torch.equal(expected[name], value) for name, value in others(weights).items())
    check_transformer(t2v, file, expected)
    half = load_reasoner(t2v, torch.bfloat16, transformer=str(file)).transformer
    stock = load_reasoner(t2v, torch.bfloat16).transformer
    assert {n: p.dtype for n, p in half.named_parameters()} == {n: p.dtype for n, p in stock.named_parameters()}


def test_gguf_files_that_cannot_be_read(t2v, weights, tmp_path, monkeypatch):
    file = tmp_path / "one.gguf"
    load = lambda: load_reasoner(t2v, transformer=str(file))  # noqa: E731
    gguf_file(file, {name: value for name, value in weights.items() if name != "proj_out.bias"})
    refused(load, r"lacks 1 weights \(proj_out\.bias\)")
    whole = file.read_bytes()
    for spoilt in (b"", b"GGUF", whole[: len(whole) // 2], b"x" * 100, whole[:8] + b"\xff" * 16 + whole[24:]):
        file.write_bytes(spoilt)
        refused(load, r"one\.gguf cannot be loaded \(.*is the copy complete")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    file.write_bytes(whole)
    with pytest.raises(Exception, match=r"needs the package gguf: pip install 'vlmteacher\[gguf\]'"):
        load()


# ---------------------------------------------------------------- quantised networks


def test_a_text_encoder_in_float8_is_made_plain(t2v, tmp_path):
    """DeepSeek's blocks of float8, which transformers dequantises itself without a GPU."""
    from transformers import UMT5EncoderModel

    directory = Path(shutil.copytree(t2v / "text_encoder", tmp_path / "text_encoder"))
    file = next(directory.glob("*.safetensors"))
    state, expected = load_file(file), {}
    for name, value in list(state.items()):
        expected[name] = value
        if name.startswith("encoder.block.") and value.dim() == 2 and "relative" not in name:
            scale = value.abs().amax() / 448
            state[name] = (value / scale).to(torch.float8_e4m3fn)
            state[f"{name}_scale_inv"] = scale.view(1, 1)
            expected[name] = state[name].float() * scale
    save_file(state, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (directory / "config.json").write_text(json.dumps(config))
    network = load_network(UMT5EncoderModel, directory, dtype=torch.float32)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, expected["shared.weight" if "embed_tokens" in name else name])
    assert network(torch.tensor([[3, 4, 1]])).last_hidden_state.isfinite().all()


# ---------------------------------------------------------------- entries of other types

WRONG = ["3", True, float("nan"), 10**400, 10**30, -1, [], {}, [3]]


@pytest.mark.parametrize("entry", [*TINY_SETTINGS, "sampler", "guidance_scale", "guidance_scale_2", "negative_prompt"])
def test_reasoner_json_of_other_types(entry, tmp_path):
    """Values that no entry can have, except that a prompt may be any text."""
    file = tmp_path / "reasoner.json"
    SamplerSettings.load(written(file, TINY_SETTINGS))
    for value in WRONG:
        if (entry, value) != ("negative_prompt", "3"):
            written(file, TINY_SETTINGS | {entry: value})
            refused(lambda: SamplerSettings.load(file), str(file))


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def changed(directory: Path, to: Path, file: str, **entries: object) -> Path:
    """Copy a model and replace entries in one of its JSON files."""
    shutil.copytree(directory, to)
    path = to / file
    written(path, (json.loads(path.read_text()) if path.exists() else {}) | entries)
    return to


@pytest.mark.parametrize(
    "entry", ["_class_name", "transformer", "vae", "text_encoder", "tokenizer", "scheduler", "boundary_ratio"]
)
def test_model_index_of_other_types(t2v, entry, tmp_path):
    directory = changed(t2v, tmp_path / "copy", "model_index.json")
    index = json.loads((directory / "model_index.json").read_text())
    for value in [*WRONG, ["diffusers", 3], [["diffusers"], "WanPipeline"], ["diffusers"]]:
        written(directory / "model_index.json", index | {entry: value})
        refused(lambda: load_reasoner(directory), str(directory))


@pytest.mark.parametrize(
    "entries",
    [
        {"latents_std": [1.0] * 7 + [0]},
        {"latents_std": [1.0] * 7 + [-1.0]},
        {"latents_std": [1.0] * 7 + [float("nan")]},
        {"latents_std": [1.0] * 7 + ["1"]},
        {"latents_std": [1.0] * 7 + [True]},
        {"latents_std": [1.0] * 7 + [1e300]},
        {"latents_std": [[1.0]] * 8},
        {"latents_std": "11111111"},
        {"latents_std": 1.0},
        {"latents_mean": [0.0] * 7 + [10**400]},
        {"latents_mean": [0.0] * 7 + [10**30]},
        {"latents_mean": [0.0] * 7 + [None]},
        {"latents_mean": {"0": 0.0}},
        {"z_dim": "8"},
        {"z_dim": True},
    ],
    ids=str,
)
def test_statistics_of_a_vae(families, entries, tmp_path):
    directory = changed(families["wan"], tmp_path / "copy", "vae/config.json", **entries)
    refused(lambda: load_reasoner(directory), str(directory))


@pytest.mark.parametrize("value", ["1", True, float("nan"), 10**400, 0, -1, [1.0], 1e300])
def test_the_scaling_factor_of_a_vae(families, value, tmp_path):
    directory = changed(families["hunyuan"], tmp_path / "copy", "vae/config.json", scaling_factor=value)
    refused(lambda: load_reasoner(directory), str(directory))


PROCESSOR = [
    {"image_mean": "0.5"},
    {"image_mean": [0.5, 0.5]},
    {"image_mean": [0.5, 0.5, "0.5"]},
    {"image_mean": [0.5, 0.5, float("nan")]},
    {"image_mean": 0.5},
    {"image_std": [0.5, 0.5, 0]},
    {"image_std": [0.5, 0.5, -0.5]},
    {"image_std": [0.5, 0.5, True]},
    {"image_std": [0.5, 0.5, 10**400]},
    {"size": "28"},
    {"size": [28, 28]},
    {"size": {"height": "28", "width": 28}},
    {"size": {"height": True, "width": 28}},
    {"size": {"shortest_edge": -1, "longest_edge": 10**6}},
    {"size": {"shortest_edge": 28.5, "longest_edge": 10**6}},
    {"do_normalize": "no"},
]


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen25_vl", "internvl", "smolvlm", "glm4v"])
@pytest.mark.parametrize("entries", PROCESSOR, ids=str)
def test_processors_of_teachers(families, family, entries, tmp_path):
    file = "preprocessor_config.json"
    if family == "qwen3_vl" and (families[family] / "video_preprocessor_config.json").exists():
        file = "video_preprocessor_config.json"
    directory = changed(families[family], tmp_path / "copy", file, **entries)
    refused(lambda: load_teacher(directory), str(directory))


@pytest.mark.parametrize("entries", PROCESSOR, ids=str)
def test_processors_of_reasoners(families, entries, tmp_path):
    directory = changed(families["wan"], tmp_path / "copy", "image_processor/preprocessor_config.json", **entries)
    refused(lambda: load_reasoner(directory), str(directory))


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template, said",
    [
        ("{{ 1 / 0 }}", "cannot be used"),
        ("{% for %}", "cannot be used"),
        ("{{ raise_exception('no video') }}", r"cannot be used \(no video\)"),
        ("{% for i in range(10**12) %}a{% endfor %}", "cannot be used"),  # Jinja's sandbox limits one range
        (LOOPS, "needs more than 1 s"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "needs more than"),
        ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}", "needs more"),
        ("{{ 'a'|center(10**10) }}", "needs more than"),
        ("{{ 'a' * 10**7 }}", "needs more than"),
    ],
)
def test_a_chat_template_that_cannot_be_rendered(families, template, said, tmp_path, monkeypatch):
    """It is a program of the model's directory, and may be without an end."""
    monkeypatch.setattr(chat_templates, "SECONDS", 1)
    directory = Path(shutil.copytree(families["qwen3_vl"], tmp_path / "copy"))
    (directory / "chat_template.jinja").write_text(template)
    refused(lambda: load_teacher(directory), f"the teacher's chat template {said}")


def test_a_chat_template_that_hangs_elsewhere_is_given_up(families, tmp_path, monkeypatch):
    """The wall time is limited too, and no process is left behind."""
    fork, children = os.fork, []
    monkeypatch.setattr(os, "fork", lambda: children.append(fork()) or children[-1])
    monkeypatch.setattr(chat_templates, "MOST_SECONDS", 0.2)
    directory = Path(shutil.copytree(families["qwen3_vl"], tmp_path / "copy"))
    (directory / "chat_template.jinja").write_text(LOOPS)
    refused(lambda: load_teacher(directory), "the teacher's chat template needs more than")
    for child in children:  # other tests' processes are children too
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)
    assert children
