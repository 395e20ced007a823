"""Checkpoints are loaded whole or refused in one line: keys, shapes, values, files, precisions, configs."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmteacher.checkpoints.pretrained import load_network, load_processor, load_tokenizer
from vlmteacher.errors import InputError, Notice

KINDS = {
    "wan/transformer": "diffusers.WanTransformer3DModel",
    "wan/vae": "diffusers.AutoencoderKLWan",
    "wan/text_encoder": "transformers.UMT5EncoderModel",
    "wan/image_encoder": "transformers.CLIPVisionModel",
    "ltx/transformer": "diffusers.LTXVideoTransformer3DModel",
    "ltx/vae": "diffusers.AutoencoderKLLTXVideo",
    "ltx/text_encoder": "transformers.T5EncoderModel",
    "hunyuan/transformer": "diffusers.HunyuanVideo15Transformer3DModel",
    "hunyuan/vae": "diffusers.AutoencoderKLHunyuanVideo15",
    "hunyuan/text_encoder": "transformers.Qwen2_5_VLTextModel",
    "hunyuan/text_encoder_2": "transformers.T5EncoderModel",
    "hunyuan/image_encoder": "transformers.SiglipVisionModel",
    "qwen3_vl/": "transformers.Qwen3VLForConditionalGeneration",
    "qwen25_vl/": "transformers.Qwen2_5_VLForConditionalGeneration",
    "internvl/": "transformers.InternVLForConditionalGeneration",
}


def kind_of(part: str) -> Any:
    import diffusers
    import transformers

    library, name = KINDS[part].split(".")
    return getattr({"diffusers": diffusers, "transformers": transformers}[library], name)


def copied(families: dict[str, Path], part: str, to: Path) -> Path:
    family, _, subfolder = part.partition("/")
    return Path(shutil.copytree(families[family] / subfolder, to, dirs_exist_ok=True))


def weights_file(directory: Path) -> Path:
    return next(directory.glob("*.safetensors"))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = weights_file(directory)
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def configure(directory: Path, file: str = "config.json", **entries: Any) -> None:
    path = directory / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | entries))


def load(part: str, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_network(kind_of(part), str(directory), dtype=dtype)


def refused(part: str, directory: Path, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        load(part, directory)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


def sample(names: list[str], count: int = 5) -> list[str]:
    return names[:: max(1, len(names) // count)] + names[-1:]


# ---------------------------------------------------------------- keys and shapes


@pytest.mark.parametrize("part", KINDS)
def test_a_whole_network_is_what_its_library_loads(families, part):
    family, _, subfolder = part.partition("/")
    ours = load(part, families[family] / subfolder).state_dict()
    theirs = kind_of(part).from_pretrained(families[family] / subfolder).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


TIED = ("shared.weight", "language_model.embed_tokens.weight", "embed_tokens.weight")


def check_each(families, part, tmp_path, names):
    """A network with a missing, renamed or mismatched tensor is refused with the tensor's name."""
    directory = copied(families, part, tmp_path / "copy")
    whole = load_file(weights_file(directory))
    for name in names(sorted(whole)):
        rest = {key: value for key, value in whole.items() if key != name}
        last = ".".join(name.split(".")[-2:])  # transformers renames some of the older names
        lost = f"lm_head.weight|embed_tokens.weight|{last}" if last in TIED else last
        save_file(rest, weights_file(directory), metadata={"format": "pt"})
        refused(part, directory, rf"lacks \d+ weights \(.*({lost})")
        save_file(rest | {f"{name}_more": whole[name]}, weights_file(directory), metadata={"format": "pt"})
        refused(part, directory, rf"lacks \d+ weights \(.*({lost})")
        save_file(whole | {f"{name}_more": whole[name].clone()}, weights_file(directory), metadata={"format": "pt"})
        refused(part, directory, rf"has, unlike its class, 1 weights \(.*{last}_more\)")
        save_file(rest | {name: whole[name][None]}, weights_file(directory), metadata={"format": "pt"})
        refused(part, directory, rf"(other shapes in \d+ weights \(.*|Cannot load because ){name}|{last} \(1, ")


@pytest.mark.parametrize("part", KINDS)
def test_tensors_that_do_not_fit_are_refused(families, part, tmp_path):
    check_each(families, part, tmp_path, lambda names: sample(names, 2))


@pytest.mark.slow
@pytest.mark.parametrize("part", KINDS)
def test_more_tensors_that_do_not_fit_are_refused(families, part, tmp_path):
    check_each(families, part, tmp_path, lambda names: sample(names, 40))


# ---------------------------------------------------------------- values


def test_weights_that_are_no_floats_are_refused(families, tmp_path):
    """Float8 values without a quantization_config would be used without their scales."""
    for number, (part, dtype, said) in enumerate(
        (
            ("wan/text_encoder", torch.float8_e4m3fn, "holds F8_E4M3 values"),
            ("wan/transformer", torch.float8_e5m2, "holds F8_E5M2 values"),
            ("qwen3_vl/", torch.int8, "holds I8 values"),
            ("ltx/vae", torch.uint8, "holds U8 values"),
        )
    ):
        directory = copied(families, part, tmp_path / str(number))
        rewrite(directory, lambda state, dtype=dtype: state | {max(state): state[max(state)].to(dtype)})
        refused(part, directory, rf"{said} \(.*give weights that are not quantised")


@pytest.mark.parametrize("part", ["wan/vae", "wan/text_encoder", "hunyuan/image_encoder", "internvl/"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(families, part, value, tmp_path):
    directory = copied(families, part, tmp_path / "copy")

    def spoil(state):
        name = sorted(state)[len(state) // 2]
        state[name].view(-1)[-1] = value
        return state

    rewrite(directory, spoil)
    refused(part, directory, "holds NaN or infinity")


# ---------------------------------------------------------------- files


def shard(directory: Path, variant: str | None = None) -> Path:
    """Write the network's weights as its library does, in two files with an index; returns the index."""
    file = weights_file(directory)
    state, stem, dot = load_file(file), file.name.split(".")[0], f".{variant}" if variant else ""
    file.unlink()
    names = sorted(state)
    places = {name: f"{stem}{dot}-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for place in set(places.values()):
        part = {name: state[name] for name in names if places[name] == place}
        save_file(part, directory / place, metadata={"format": "pt"})
    index = directory / f"{stem}.safetensors.index{dot}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("part", ["wan/transformer", "wan/text_encoder", "qwen3_vl/"])
@pytest.mark.parametrize("variant", [None, "fp16", "bf16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_sharded_files_and_variants_are_found(families, part, variant, sharded, tmp_path):
    directory = copied(families, part, tmp_path / "copy")
    expected = load(part, directory).state_dict()
    if sharded:
        shard(directory, variant)
    elif variant:
        file = weights_file(directory)
        file.rename(file.with_suffix(f".{variant}.safetensors"))
    found = load(part, directory).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("part", ["wan/transformer", "qwen3_vl/"])
@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "{root}/outside.safetensors", "sub/../x.safetensors", "a.bin"]
)
def test_an_index_stays_in_its_directory(families, part, place, tmp_path):
    directory = copied(families, part, tmp_path / "copy")
    outside = shutil.copy(weights_file(directory), tmp_path / "outside.safetensors")
    assert os.path.exists(outside)
    index = shard(directory)
    content = json.loads(index.read_text())
    place = place.format(root=tmp_path)
    content["weight_map"] = dict.fromkeys(content["weight_map"], place)
    index.write_text(json.dumps(content))
    refused(part, directory, r"shards are \.safetensors files beside the index")


@pytest.mark.parametrize("part", ["wan/transformer", "qwen3_vl/"])
def test_an_index_agrees_with_its_shards(families, part, tmp_path):
    directory = copied(families, part, tmp_path / "copy")
    index = shard(directory)
    whole = json.loads(index.read_text())
    places = whole["weight_map"]
    first = min(places)

    def written(content: Any) -> None:
        index.write_text(json.dumps(content))

    written(whole | {"weight_map": {name: place for name, place in places.items() if name != first}})
    refused(part, directory, f"holds {first}, which .* does not place there")
    other = next(place for place in places.values() if place != places[first])
    written(whole | {"weight_map": places | {first: other}})
    refused(part, directory, f"holds {first}, which .* does not place there")
    written(whole | {"weight_map": places | {"more.weight": other}})
    refused(part, directory, r"lacks more\.weight, which")
    written(whole | {"weight_map": places | {"more.weight": "none.safetensors"}})
    refused(part, directory, r"has no none\.safetensors, which")
    for content in ([], {}, whole | {"weight_map": 3}, whole | {"weight_map": {"a": 3}}, whole | {"metadata": None}):
        written(content)
        refused(part, directory, "is the copy complete")
    index.write_text('{"weight_map": ' + "[" * 100_000)
    refused(part, directory, "nested too deep|is not JSON")


def test_links_of_the_hub_cache_are_followed(families, tmp_path):
    """Snapshots of the cache are directories of links to its blobs."""
    directory = copied(families, "wan/text_encoder", tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in directory.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(os.path.relpath(file, tmp_path / "snapshot"))
    assert load("wan/text_encoder", tmp_path / "snapshot")


def test_damaged_files_are_refused(families, tmp_path):
    for part in ("wan/vae", "qwen3_vl/"):
        directory = copied(families, part, tmp_path / part)
        data = weights_file(directory).read_bytes()
        for spoilt in (b"", data[:7], data[: len(data) // 2], b"\xff" * 8 + data[8:], b"\x00" * 64, data + b"more"):
            weights_file(directory).write_bytes(spoilt)
            refused(part, directory, "is the copy complete")
        weights_file(directory).unlink()
        refused(part, directory, "cannot be loaded .it has no")
        (directory / "config.json").unlink()
        refused(part, directory, r"has no config\.json")


# ---------------------------------------------------------------- nothing of a checkpoint is run


class Ran:
    """An object whose pickle writes a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


CODE = (
    "open({marker!r}, 'w').close()\nclass Own:\n    @classmethod\n    def from_pretrained(cls, *a, **k): return cls()\n"
)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that exists once code of the checkpoint has run, or a question was asked at the terminal."""
    file = tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda *_: file.touch() or "y")
    yield file
    assert not file.exists()


def with_code(directory: Path, marker: Path) -> None:
    for name in ("own.py", "custom_generate/generate.py", "__init__.py", "pipeline.py", "setup.py"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(CODE.format(marker=str(marker)))
    names = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoVideoProcessor")
    own = {"auto_map": {name: ["own.Own", "own.Own"] if "Tok" in name else "own.Own" for name in names}}
    own |= {"custom_pipeline": "pipeline", "trust_remote_code": True}
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
        if (directory / file).exists():
            configure(directory, file, **own)


@pytest.mark.parametrize("part", ["wan/transformer", "wan/text_encoder", "qwen3_vl/", "internvl/"])
def test_code_beside_a_network_is_left_alone(families, part, tmp_path, marker):
    directory = copied(families, part, tmp_path / "copy")
    with_code(directory, marker)
    assert load(part, directory)


def test_code_beside_tokenizers_and_processors_is_left_alone(families, tmp_path, marker):
    from transformers import CLIPImageProcessor

    for part in ("wan/tokenizer", "qwen3_vl/"):
        directory = copied(families, part, tmp_path / part)
        with_code(directory, marker)
        assert load_tokenizer(directory)("a box").input_ids
        configure(directory, "tokenizer_config.json", tokenizer_class="own.Own")
        if part == "qwen3_vl/":  # its config.json says which tokenizer it is
            assert load_tokenizer(directory)("a box").input_ids
        else:
            with pytest.raises(InputError, match="contains custom code"):
                load_tokenizer(directory)
    directory = copied(families, "wan/image_processor", tmp_path / "processor")
    with_code(directory, marker)
    assert load_processor(CLIPImageProcessor, str(directory))


@pytest.mark.parametrize("part", ["wan/transformer", "wan/text_encoder", "qwen3_vl/"])
def test_pickles_are_not_read(families, part, tmp_path, marker):
    directory = copied(families, part, tmp_path / "copy")
    file = weights_file(directory)
    file.unlink()
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt"):
        torch.save({"weight": Ran(marker)}, directory / name)
    refused(part, directory, "has its weights in .*, which can run code: convert them to safetensors")


@pytest.mark.parametrize(
    "entries, said",
    [
        (
            {"attn_implementation": "kernels-community/flash-attn"},
            "'kernels-community/flash-attn', which could run code",
        ),
        ({"_attn_implementation": "someone/else:main"}, "'someone/else:main', which could run code"),
        ({"text_config": {"attn_implementation": "a/b@v1"}}, "'a/b@v1', which could run code"),
        ({"_attn_implementation_internal": {"": "sdpa", "vision_config": "a/b"}}, "'a/b', which could run code"),
        ({"attn_implementation": ["sdpa"]}, r"\['sdpa'\], which could run code"),
        ({"attn_implementation": "flash_attention_2"}, "flash_attention_2, which is not installed"),
        ({"transformers_weights": "../other.safetensors"}, "names weights in '../other.safetensors'"),
        ({"transformers_weights": "adapter_model.bin"}, r"names weights in 'adapter_model\.bin'"),
        ({"num_hidden_layers": 10**9}, "says num_hidden_layers 1000000000, its files hold"),
        ({"vision_config": {"depth": 10**9}}, "says depth 1000000000, its files hold"),
        ({"num_hidden_layers": -1}, "says num_hidden_layers -1"),
    ],
)
def test_what_a_config_must_not_name(families, tmp_path, entries, said):
    directory = copied(families, "qwen3_vl/", tmp_path / "copy")
    configure(directory, **entries)
    refused("qwen3_vl/", directory, said)


def test_other_weights_beside_a_network_are_refused(families, tmp_path):
    directory = copied(families, "qwen3_vl/", tmp_path / "copy")
    configure(directory, "adapter_config.json", base_model_name_or_path="someone/else", peft_type="LORA")
    refused("qwen3_vl/", directory, r"holds adapter_config\.json too")
    (directory / "adapter_config.json").unlink()
    shutil.copy(weights_file(directory), directory / "shard-00001-model-00001-of-00001.safetensors")
    refused("qwen3_vl/", directory, "holds shard-00001-model-00001-of-00001.safetensors too")


def test_another_class_is_refused(families, tmp_path):
    directory = copied(families, "wan/transformer", tmp_path / "copy")
    configure(directory, _class_name="WanVACETransformer3DModel")
    refused("wan/transformer", directory, "is a WanVACETransformer3DModel: a WanTransformer3DModel is needed")


@pytest.mark.parametrize("part", ["wan/transformer", "ltx/transformer", "hunyuan/transformer"])
def test_entries_that_the_class_does_not_know(families, part, tmp_path):
    """A guidance scale as an input cannot be given; of others a Notice says that they are ignored."""
    directory = copied(families, part, tmp_path / "copy")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        configure(directory, guidance_embeds=False, _note="x", clip_output=False)
        load(part, directory)
    configure(directory, window_size=[4, 4])
    with pytest.warns(Notice, match=r"knows nothing of window_size = \[4, 4\] in its config: ignored"):
        load(part, directory)
    configure(directory, guidance_embeds=True)
    refused(part, directory, "its config says guidance_embeds: the guidance scale is an input")


@pytest.mark.parametrize("part", ["wan/transformer", "wan/vae", "wan/text_encoder", "qwen3_vl/"])
@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"a": NaN}', '{"a": 1' + "0" * 400 + "}", "[" * 100_000, "\x00"])
def test_configs_that_are_no_objects(families, part, text, tmp_path):
    directory = copied(families, part, tmp_path / "copy")
    (directory / "config.json").write_text(text)
    refused(part, directory, "config.json")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["wan/transformer", "wan/vae", "wan/text_encoder", "qwen3_vl/", "hunyuan/vae"])
@pytest.mark.parametrize("value", ["3", True, [], {}, None, -1, 0, 0.5, 10**9, 2**63])
def test_entries_of_another_kind_end_in_one_line(families, part, value, tmp_path):
    """A wrong entry gives the same network or one line, whatever the library does with it."""
    directory = copied(families, part, tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    for key in sample([key for key in sorted(config) if not key.startswith("_")], 6):
        (directory / "config.json").write_text(json.dumps(config | {key: value}))
        try:
            load(part, directory)
        except InputError as error:
            assert "\n" not in str(error)


# ---------------------------------------------------------------- quantised checkpoints


@pytest.mark.parametrize(
    "method, package",
    [
        ("awq", "gptqmodel"),
        ("gptq", "optimum"),
        ("compressed-tensors", "compressed-tensors"),
        ("bitsandbytes", "bitsandbytes"),
        ("torchao", "torchao"),
        ("quanto", "optimum-quanto"),
        ("hqq", "hqq"),
        ("auto-round", "auto-round"),
    ],
)
@pytest.mark.parametrize("part", ["qwen3_vl/", "wan/transformer", "wan/text_encoder"])
def test_a_quantised_checkpoint_names_its_package(families, part, method, package, tmp_path):
    from importlib.util import find_spec

    if package in ("bitsandbytes", "torchao") and find_spec(package):
        pytest.skip(f"{package} is installed")
    directory = copied(families, part, tmp_path / "copy")
    configure(directory, quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    refused(part, directory, rf"is quantised by {method}, which needs the package {package}: pip install {package}")


@pytest.mark.parametrize("part", ["qwen3_vl/", "wan/transformer", "wan/text_encoder"])
@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "fp8"},
        {"quant_method": "mxfp4"},
        {"quant_method": "of its own"},
        {"bits": 4},
        ["awq"],
        "awq",
        {"quant_method": ["awq"]},
        {"quant_method": "fbgemm_fp8"},
        {"quant_method": "bitnet"},
    ],
)
def test_a_quantised_checkpoint_that_cannot_be_read_is_one_line(families, part, config, tmp_path):
    directory = copied(families, part, tmp_path / "copy")
    configure(directory, quantization_config=config)
    refused(part, directory, "")
