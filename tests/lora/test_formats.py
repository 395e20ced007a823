"""LoRA files of other tools: all of a file is added to the weights, or the file is refused with the tensor's name.

The oracles are diffusers' converters and loaders, and PEFT itself.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import LTXPipeline, WanPipeline
from diffusers.loaders.single_file_utils import (
    convert_ltx_transformer_checkpoint_to_diffusers,
    convert_wan_transformer_to_diffusers,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.tiny_transformers import tiny_transformer
from vlmteacher.cli import main
from vlmteacher.errors import InputError, Notice
from vlmteacher.lora.adapter import add_lora, export_lora, lora_parameters
from vlmteacher.lora.formats import STYLES, merge_lora, read_experts, read_lora
from vlmteacher.lora.formats.names import BLOCK, theirs
from vlmteacher.reasoners.ltx import LTX
from vlmteacher.reasoners.wan.family import WAN

RANK, ALPHA = 3, 6.0
LAYERS = {  # diffusers' name -> the authors'
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.1.attn2.to_out.0": "blocks.1.cross_attn.o",
    "blocks.1.ffn.net.2": "blocks.1.ffn.2",
}


def factors(layers: Any = LAYERS, seed: int = 0, family: str = "wan") -> dict[str, tuple[Tensor, Tensor]]:
    """Random A (3, in) and B (out, 3) for layers of a tiny transformer."""
    generator, transformer = torch.Generator().manual_seed(seed), tiny_transformer(family)
    found = {}
    for name in layers:
        out, width = transformer.get_submodule(name).weight.shape
        found[name] = tuple(0.1 * torch.randn(shape, generator=generator) for shape in ((RANK, width), (out, RANK)))
    return found


def merged(path: Path | str, family: str = "wan", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The changes of the parameters by the LoRA in `path`, of those that it changes."""
    before, transformer = tiny_transformer(family).to(dtype).state_dict(), tiny_transformer(family).to(dtype)
    merge_lora(transformer, read_lora(path))
    changes = {name: value - before[name] for name, value in transformer.state_dict().items()}
    return {name: change for name, change in changes.items() if change.any()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value.float(), atol=tolerance, rtol=tolerance)


def diffusers_keys(a: str = "lora_A", b: str = "lora_B", end: str = ".weight", prefix: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}{name}.{part}{end}": value
        for name, pair in factors().items()
        for part, value in zip((a, b), pair, strict=True)
    }


def authors_keys(
    a: str = "lora_A",
    b: str = "lora_B",
    end: str = ".weight",
    prefix: str = "",
    joined: bool = False,
    alpha: bool = False,
) -> dict[str, Tensor]:
    found = {}
    for name, pair in factors().items():
        layer = prefix + (LAYERS[name].replace(".", "_") if joined else LAYERS[name])
        found |= {f"{layer}.{part}{end}": value for part, value in zip((a, b), pair, strict=True)}
        if alpha:
            found[f"{layer}.alpha"] = torch.tensor(ALPHA)
    return found


PEFT = {"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA"}
KOHYA = {"ss_network_alpha": str(ALPHA), "ss_network_dim": str(RANK), "ss_network_module": "networks.lora_wan"}
DOWN_UP = {"a": "lora_down", "b": "lora_up"}
# tool -> tensors, metadata, what alpha / rank is, where that stands
FORMATS: dict[str, tuple[dict[str, Tensor], dict[str, str], float, str]] = {
    "diffusers": (
        diffusers_keys(prefix="transformer."),
        {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in PEFT.items()})},
        2.0,
        "metadata lora_adapter_metadata",
    ),
    "save_lora_adapter": (
        diffusers_keys(),
        {"lora_adapter_metadata": json.dumps(PEFT)},
        2.0,
        "metadata lora_adapter_metadata",
    ),
    "finetrainers": (
        diffusers_keys(prefix="transformer."),
        {"lora_config": json.dumps({"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": True})},
        2.0,
        "metadata lora_config",
    ),
    "PEFT": (diffusers_keys(prefix="base_model.model."), {}, 1.0, "assumed: alpha = rank"),
    "DiffSynth": (authors_keys(end=".default.weight"), {}, 1.0, "assumed: alpha = rank"),
    "DiffSynth pipeline": (authors_keys(end=".default.weight", prefix="pipe.dit."), {}, 1.0, "assumed: alpha = rank"),
    "comfyui": (authors_keys(prefix="diffusion_model."), {}, 1.0, "assumed: alpha = rank"),
    "comfyui, alphas": (authors_keys(prefix="diffusion_model.", alpha=True), {}, 2.0, "alpha tensors"),
    "checkpoint names": (authors_keys(prefix="model.diffusion_model.", alpha=True), {}, 2.0, "alpha tensors"),
    "lightx2v": (authors_keys(**DOWN_UP, prefix="diffusion_model.", alpha=True), {}, 2.0, "alpha tensors"),
    "no weight at the end": (authors_keys(end="", prefix="diffusion_model."), {}, 1.0, "assumed: alpha = rank"),
    "musubi": (authors_keys(**DOWN_UP, prefix="lora_unet_", joined=True, alpha=True), KOHYA, 2.0, "alpha tensors"),
    "musubi without alphas": (
        authors_keys(**DOWN_UP, prefix="lora_unet_", joined=True),
        KOHYA,
        2.0,
        "metadata ss_network_alpha",
    ),
    "musubi, converted by itself": (  # to other names: alpha multiplied into the factors, the metadata left there
        authors_keys(prefix="diffusion_model."),
        KOHYA,
        1.0,
        "multiplied in by musubi-tuner's convert_lora",
    ),
    "VideoX-Fun": (authors_keys(**DOWN_UP, prefix="lora_unet__", joined=True, alpha=True), {}, 2.0, "alpha tensors"),
    "a flat alpha": (
        diffusers_keys(prefix="transformer."),
        {"lora_alpha": "6", "rank": "3"},
        2.0,
        "metadata lora_alpha",
    ),
    "another flat alpha": (diffusers_keys(prefix="transformer."), {"alpha": "1.5"}, 0.5, "metadata alpha"),
}


@pytest.mark.parametrize("tool", FORMATS)
def test_a_file_of_each_tool_is_scale_b_a(tool, tmp_path):
    tensors, metadata, scale, source = FORMATS[tool]
    save_file(tensors, path := tmp_path / "lora.safetensors", metadata)
    assert read_lora(path).scale_source == source
    assert_same(merged(path), {f"{name}.weight": scale * b @ a for name, (a, b) in factors().items()})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        read_lora(path).tell()
    told = [str(each.message) for each in said]
    assert len(told) == (source.startswith(("assumed", "multiplied"))) and all(source in text for text in told)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_of_small_dtypes_are_taken_as_they_are(dtype, tmp_path):
    small = {key: value.to(dtype) for key, value in FORMATS["diffusers"][0].items()}
    save_file(small, tmp_path / "lora.safetensors", FORMATS["diffusers"][1])
    expected = {f"{name}.weight": 2 * b.to(dtype).float() @ a.to(dtype).float() for name, (a, b) in factors().items()}
    assert_same(merged(tmp_path / "lora.safetensors"), expected)


# ---------------------------------------------------------------- against diffusers and PEFT


def of_their_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The updates by diffusers' converters of a file without metadata, by parameter: B A and B's bias."""
    changes = {}
    for key, b in state.items():
        name = key.removeprefix("transformer.")
        if name.endswith(".lora_B.weight"):
            a = state[key.replace("lora_B", "lora_A")]
            changes[name.replace(".lora_B", "")] = b.float() @ a.float()
        elif name.endswith(".lora_B.bias"):
            changes[name.replace(".lora_B", "")] = b
    return changes


def whole(family: str, joined: bool = False, extras: bool = True, seed: int = 3) -> dict[str, Tensor]:
    """A LoRA on every linear layer with a known authors' name, under those, of rank 3 and alpha 6."""
    names, generator = (WAN if family.startswith("wan") else LTX).layers, torch.Generator().manual_seed(seed)
    found = {}
    for name, module in tiny_transformer(family).named_modules():
        match = BLOCK.fullmatch(name)
        if not isinstance(module, nn.Linear) or not (match or extras):
            continue
        if (match[2] not in names.inner) if match else (name not in names.outer):
            continue
        layer = theirs(name, names, "") if names is WAN.layers else name
        key = f"lora_unet_{layer.replace('.', '_')}" if joined else f"diffusion_model.{layer}"
        out, width = module.weight.shape
        a, b = ("lora_down", "lora_up") if joined else ("lora_A", "lora_B")
        found[f"{key}.{a}.weight"] = 0.1 * torch.randn(RANK, width, generator=generator)
        found[f"{key}.{b}.weight"] = 0.1 * torch.randn(out, RANK, generator=generator)
        if match and names is WAN.layers:  # diffusers takes alphas of the blocks only
            found[f"{key}.alpha"] = torch.tensor(ALPHA)
        if not joined and names is WAN.layers:
            found[f"{key}.diff_b"] = 0.1 * torch.randn(out, generator=generator)
    return found


@pytest.mark.parametrize(
    ("family", "joined"), [("wan", False), ("wan_i2v", False), ("wan", True), ("wan_i2v", True), ("ltx", False)]
)
def test_the_updates_are_those_of_diffusers_converters(family, joined, tmp_path):
    tensors = whole(family, joined, extras=not joined and family != "ltx")
    save_file(tensors, path := tmp_path / "lora.safetensors")
    pipeline = LTXPipeline if family == "ltx" else WanPipeline
    expected = of_their_state(pipeline.lora_state_dict(str(path)))
    if family == "wan_i2v" and not joined:  # which it drops where a LoRA of time_projection has them
        assert len(expected) > 40
    assert_same(merged(path, family), expected)


def test_a_file_of_save_lora_adapter_is_what_diffusers_makes_of_it(tmp_path):
    transformer = tiny_transformer("wan")
    transformer.add_adapter(
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False)
    )
    transformer.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    assert next(iter(load_file(tmp_path / "lora.safetensors"))).startswith("blocks.0.")
    before = tiny_transformer("wan").state_dict()
    transformer.fuse_lora()
    transformer.unload_lora()
    changes = {name: value - before[name] for name, value in transformer.state_dict().items()}
    assert_same(merged(tmp_path / "lora.safetensors"), {name: each for name, each in changes.items() if each.any()})


PATTERNS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "a whole name": {"alpha_pattern": {"blocks.0.attn1.to_q": 12}, "rank_pattern": {"blocks.1.ffn.net.2": 2}},
    "the end of a name": {"alpha_pattern": {"to_q": 12, "attn1.to_q": 3}, "rank_pattern": {"net.2": 2}},
    "an expression": {"alpha_pattern": {r"blocks\.\d+\.attn[12]\.to_q": 1}, "rank_pattern": {r".*0\.ffn.*": 5}},
    "an anchor": {"alpha_pattern": {"^blocks.0.attn1.to_q": 12}},
    "both": {"alpha_pattern": {"to_q": 12}, "rank_pattern": {"to_q": 2}, "use_rslora": True},
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_folder_of_peft_is_what_peft_merges(pattern, given, tmp_path):
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["to_q", "net.2"], init_lora_weights=False, **PATTERNS[pattern]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_transformer("wan"), config)
    model.save_pretrained(tmp_path)
    before = tiny_transformer("wan").state_dict()
    again = peft.PeftModel.from_pretrained(tiny_transformer("wan"), tmp_path)  # its file sorts the patterns
    changes = {name: value - before[name] for name, value in again.merge_and_unload().state_dict().items()}
    path = tmp_path if given == "folder" else tmp_path / "adapter_model.safetensors"
    found = merged(path)
    assert read_lora(path).scale_source == "adapter_config.json"
    assert_same(found, {name: each for name, each in changes.items() if each.any()})
    converted = tmp_path / "converted.safetensors"
    converted.write_bytes(read_lora(path).to_bytes("comfyui"))  # PEFT's configuration is not for this file
    assert_same(merged(converted), found)


def test_a_lora_bias_is_scaled_as_peft_scales_it(tmp_path):
    transformer = tiny_transformer("wan")
    transformer.add_adapter(
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q"], lora_bias=True, init_lora_weights=False)
    )
    transformer.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    before = tiny_transformer("wan").state_dict()
    transformer.fuse_lora()
    transformer.unload_lora()
    changes = {name: value - before[name] for name, value in transformer.state_dict().items()}
    found = merged(tmp_path / "lora.safetensors")
    assert_same(found, {name: each for name, each in changes.items() if each.any()})
    assert any(name.endswith("to_q.bias") for name in found)


@pytest.mark.parametrize("family", ["wan", "wan_i2v", "ltx"])
def test_differences_of_every_parameter_reach_it(family, tmp_path):
    """The authors' names of all parameters agree with diffusers' converter of whole checkpoints."""
    names, parameters = (LTX if family == "ltx" else WAN).layers, tiny_transformer(family).state_dict()
    generator, given, expected = torch.Generator().manual_seed(0), {}, {}
    for parameter, value in parameters.items():
        name, _, end = parameter.rpartition(".")
        change = 0.1 * torch.randn(value.shape, generator=generator)
        if end == "scale_shift_table":
            layer = theirs(parameter, names, "") if parameter in names.all_outer or name else parameter
            key, whole_name = f"{layer}.diff", layer
            if family != "ltx":  # as LightX2V writes it
                key = key.replace(".modulation.diff", ".diff_m")
        else:
            layer = "proj_out" if (family, name) == ("ltx", "proj_out") else theirs(name, names, "")
            key, whole_name = f"{layer}.{'diff_b' if end == 'bias' else 'diff'}", f"{layer}.{end}"
        given[f"diffusion_model.{key}"] = change
        expected[whole_name] = value + change
    convert = (
        convert_ltx_transformer_checkpoint_to_diffusers if family == "ltx" else convert_wan_transformer_to_diffusers
    )
    expected = convert(expected)
    save_file(given, path := tmp_path / "differences.safetensors")
    transformer = tiny_transformer(family)
    merge_lora(transformer, read_lora(path))
    found = transformer.state_dict()
    assert found.keys() == expected.keys() == parameters.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    if family != "ltx":
        lora = read_lora(path)
        with pytest.raises(InputError, match="is for a model of no known family"):
            lora.to_bytes("comfyui")  # without a layer it is of no model that is known
    with pytest.raises(
        InputError, match=r"holds a weight difference of \S+ \(diffusion_model\.\S+\), which can be merged and not"
    ):
        add_lora(tiny_transformer(family), start=read_lora(path))


def test_a_lora_with_differences_is_converted_with_them(tmp_path):
    tensors = FORMATS["lightx2v"][0] | {
        "diffusion_model.blocks.0.norm3.diff": torch.ones(32),
        "diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(32),
        "diffusion_model.blocks.1.diff_m": torch.ones(1, 6, 32),
        "diffusion_model.patch_embedding.diff": torch.ones(32, 8, 1, 2, 2),
    }
    save_file(tensors, path := tmp_path / "lora.safetensors")
    found = merged(path)
    assert {"blocks.0.norm2.weight", "blocks.0.attn1.to_q.bias", "blocks.1.scale_shift_table"} < found.keys()
    (tmp_path / "again.safetensors").write_bytes(read_lora(path).to_bytes("comfyui"))
    assert_same(merged(tmp_path / "again.safetensors"), found)
    for style in ("diffusers", "musubi"):
        with pytest.raises(InputError, match=rf"blocks\.0\.norm3\.diff\), which files of {style} have no place for"):
            read_lora(path).to_bytes(style)


def test_a_lora_of_the_patch_embedding(tmp_path):
    """Factors of a convolution: A with its kernel's axes, or flattened."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 8, 1, 2, 2, generator=generator), torch.randn(32, 3, generator=generator)
    for given in ((a, b.view(32, 3, 1, 1, 1)), (a.flatten(1), b)):
        save_file(
            {f"diffusion_model.patch_embedding.lora_{x}.weight": y for x, y in zip("AB", given, strict=True)},
            path := tmp_path / "lora.safetensors",
        )
        expected = {"patch_embedding.weight": (b @ a.flatten(1)).view(32, 8, 1, 2, 2)}
        assert_same(merged(path), expected, 1e-4)


# ---------------------------------------------------------------- both experts, parts, refusals


EXPERTS = [
    ("transformer.", "transformer_2."),
    ("high_noise.", "low_noise."),
    ("high_noise_model.", "low_noise_model."),
    ("diffusion_model.transformer_1.", "diffusion_model.transformer_2."),
]


def both(prefixes: tuple[str, str], path: Path) -> Path:
    tensors = diffusers_keys(prefix=prefixes[0])
    tensors |= {key: 2 * value for key, value in diffusers_keys(prefix=prefixes[1]).items()}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("prefixes", EXPERTS)
def test_both_experts_in_one_file(prefixes, tmp_path, capfd):
    path = both(prefixes, tmp_path / "both.safetensors")
    found = read_experts(path)
    assert list(found) == ["transformer", "transformer_2"]
    for (a, b), name in ((factors()[name], name) for name in LAYERS):
        torch.testing.assert_close(found["transformer"].layers[name].update(), b @ a)
        torch.testing.assert_close(found["transformer_2"].layers[name].update(), 4 * b @ a)
    with pytest.raises(InputError, match=re.escape(f"two experts ({prefixes[1]}blocks.0.attn1.to_q.lora_")):
        read_lora(path)
    high = read_lora(path, partial=True)
    assert len(high.unused) == 6 and torch.equal(
        high.layers["blocks.1.ffn.net.2"].a, factors()["blocks.1.ffn.net.2"][0]
    )
    for style in STYLES:
        with pytest.warns(Notice, match="alpha = rank is assumed"):
            assert (
                main(["lora", "convert", str(path), "--to", style, "-o", str(tmp_path / f"{style}.safetensors")]) == 0
            )
        for noise, factor in (("high", 1), ("low", 4)):
            one = read_lora(tmp_path / f"{style}_{noise}_noise.safetensors")
            a, b = factors()["blocks.1.ffn.net.2"]
            torch.testing.assert_close(one.layers["blocks.1.ffn.net.2"].update(), factor * b @ a)
    said = f"3 layers, rank 3, alpha 3, as musubi names them: {tmp_path / 'musubi_low_noise.safetensors'}"
    assert said in capfd.readouterr().out


def test_each_expert_has_its_own_configuration(tmp_path):
    """diffusers packs the metadata of several networks into one file."""
    configs = {"transformer": {"r": 3, "lora_alpha": 6}, "transformer_2": {"r": 3, "lora_alpha": 1.5}}
    packed = {f"{name}.{key}": value for name, config in configs.items() for key, value in config.items()}
    tensors = diffusers_keys(prefix="transformer.") | diffusers_keys(prefix="transformer_2.")
    save_file(tensors, path := tmp_path / "both.safetensors", {"lora_adapter_metadata": json.dumps(packed)})
    assert {name: lora.alpha for name, lora in read_experts(path).items()} == {"transformer": 6, "transformer_2": 1.5}
    save_file(diffusers_keys(prefix="transformer_2."), path, {"lora_adapter_metadata": json.dumps(packed)})
    assert read_experts(path)["transformer_2"].alpha == 1.5


def test_a_part_is_converted_where_asked_for(tmp_path, capfd):
    extra = {"diffusion_model.blocks.0.norm3.diff": torch.ones(32), "lora_te_x.lora_up.weight": torch.ones(3, 3)}
    save_file(FORMATS["comfyui, alphas"][0] | extra, path := tmp_path / "lora.safetensors")
    line = ["lora", "convert", str(path), "--to", "diffusers", "-o", str(tmp_path / "new.safetensors")]
    assert main(line) == 2 and "lora_te_x.lora_up.weight, which is of a text encoder" in capfd.readouterr().err
    assert not (tmp_path / "new.safetensors").exists()
    with pytest.warns(Notice, match=r"2 of 11 tensors stay unused: lora_te_x\.\S+, diffusion_model\.blocks\.\*\.norm3"):
        assert main([*line, "--lora-partial"]) == 0
    assert_same(
        merged(tmp_path / "new.safetensors"), {f"{name}.weight": 2 * b @ a for name, (a, b) in factors().items()}
    )


def test_an_expert_that_nobody_names(tmp_path):
    save_file(
        diffusers_keys(prefix="high_noise.") | diffusers_keys(prefix="low_noise.") | diffusers_keys(),
        tmp_path / "odd.safetensors",
    )
    with pytest.raises(InputError, match=r"two experts, and blocks\.0.*, which names neither"):
        read_lora(tmp_path / "odd.safetensors")
    save_file(diffusers_keys(prefix="transformer_2."), tmp_path / "low.safetensors")
    with pytest.raises(InputError, match="is for the low-noise expert"):
        read_lora(tmp_path / "low.safetensors")


def test_an_image_models_lora_on_a_model_without_image_layers(tmp_path, recwarn):
    tensors = whole("wan_i2v") | {"diffusion_model.img_emb.proj.0.diff": torch.ones(12)}
    save_file(tensors, path := tmp_path / "i2v.safetensors")
    text = tiny_transformer("wan")
    lora = read_lora(path)
    with pytest.raises(InputError, match=r"no linear layer blocks\.0\.attn2\.add_k_proj \(\S+k_img.* --lora-partial"):
        merge_lora(text, lora)
    fitted = lora.fitted(text, partial=True)
    image = {key for key in tensors if "_img." in key or "img_emb" in key}
    assert set(fitted.unused) == image and set(fitted.tensors()) == set(tensors) - image
    fitted.tell()
    told = " ".join(str(each.message) for each in recwarn if each.category is Notice)
    assert f"{len(image)} of {len(tensors)} tensors stay unused" in told
    assert "diffusion_model.blocks.*.cross_attn.k_img.lora_A.weight" in told
    merge_lora(text, fitted)
    expected = merged(path, "wan_i2v")
    before = tiny_transformer("wan").state_dict()
    changes = {name: value - before[name] for name, value in text.state_dict().items()}
    assert_same(changes | {}, {name: expected.get(name, torch.zeros_like(value)) for name, value in changes.items()})


def test_what_partial_does_not_do(tmp_path):
    """A LoRA for another model is refused with `partial` too."""
    ltx = tiny_transformer("ltx")
    add_lora(ltx, 2, seed=0)
    other = read_lora(export_lora(ltx))
    with pytest.raises(InputError, match="this WanTransformer3DModel has none of its layers"):
        other.fitted(tiny_transformer("wan"), partial=True)
    tensors = diffusers_keys(prefix="transformer.")
    key = "transformer.blocks.0.attn1.to_q.lora_B.weight"
    save_file(tensors | {key: torch.ones(48, RANK)}, path := tmp_path / "wide.safetensors")
    with pytest.raises(InputError, match=r"its blocks\.0\.attn1\.to_q .* is 32 -> 48, that of this"):
        read_lora(path).fitted(tiny_transformer("wan"), partial=True)


@pytest.mark.parametrize(
    "key",
    [
        "text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "diffusion_model.joint_blocks.0.linear1.lora_A.weight",
        "lora_unet_double_x.lora_up.weight",
    ],
)
def test_tensors_of_other_networks_are_named_or_left_out(key, tmp_path):
    tensors = FORMATS["comfyui, alphas"][0] | {key: torch.ones(3, 3)}
    save_file(tensors, path := tmp_path / "more.safetensors")
    with pytest.raises(InputError, match=rf"holds {re.escape(key)}, which is of .* --lora-partial"):
        read_lora(path)
    assert read_lora(path, partial=True).unused == (key,)
    with pytest.raises(InputError, match="nothing for a video model"):
        save_file({key: torch.ones(3, 3)}, path)
        read_lora(path, partial=True)


KEY = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{KEY}.dora_scale": torch.ones(32, 1)}, rf"holds {KEY}\.dora_scale \(32, 1\): only plain"),
        ({f"{KEY}.lora_magnitude_vector": torch.ones(32)}, "lora_magnitude_vector"),
        ({f"{KEY}.hada_w1_a": torch.ones(32, 3)}, "hada_w1_a"),
        ({f"{KEY}.lokr_w1": torch.ones(4, 4)}, "lokr_w1"),
        ({f"{KEY}.lora_mid.weight": torch.ones(3, 3)}, "lora_mid"),
        ({f"{KEY}.lora_A.weight_scale": torch.ones(1)}, "weight_scale"),
        ({f"{KEY}.set_weight": torch.ones(32, 32)}, "set_weight"),
        ({f"{KEY}.reshape_weight": torch.ones(2)}, "reshape_weight"),
        ({"blocks.0.self_attn.q.lora_A.default.weight": torch.ones(3, 32)}, "twice, under two names"),
        ({"transformer.blocks.0.attn1.to_q.lora_down.weight": torch.ones(3, 32)}, "twice, under two names"),
        ({f"{KEY}.lora_A.second.weight": torch.ones(3, 32)}, "twice, under two names"),
        ({f"{KEY}.alpha": torch.tensor(0.0)}, r"alpha of blocks\.0\.attn1\.to_q is 0"),
        ({f"{KEY}.alpha": torch.tensor(float("nan"))}, "no finite numbers"),
        ({f"{KEY}.alpha": torch.ones(2)}, r"q\.alpha \(2,\)"),
        ({f"{KEY}.lora_A.weight": torch.ones(3, 32, dtype=torch.int8)}, "in torch.int8: only"),
        ({f"{KEY}.lora_A.weight": torch.ones(2, 32)}, "of rank 2 and 3"),
        ({f"{KEY}.lora_A.weight": torch.ones(3, 32, 1, 1)}, "of a convolution"),
    ],
)
@pytest.mark.parametrize("partial", [False, True])
def test_what_would_change_the_update_is_refused_by_name(change, message, partial, tmp_path):
    save_file(FORMATS["comfyui, alphas"][0] | change, path := tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        read_lora(path, partial=partial)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, r"trained with use_dora \(adapter_config\.json\)"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"peft_type": "LOHA"}, "is a 'LOHA'"),
        ({"init_lora_weights": "pissa"}, "'pissa'.*changes the base weights too"),
        ({"r": 8}, r"gives rank 8 for blocks\.0\.attn1\.to_q, whose factors are of rank 3"),
        ({"lora_alpha": "many"}, "gives alpha as 'many': a number"),
        ({"lora_alpha": True}, "gives alpha as True: a number"),
        ({"alpha_pattern": {"(": 3}}, "is no regular expression"),
        ({"alpha_pattern": {"to_q{99999999999}": 3}}, "is no regular expression"),
        ({"alpha_pattern": {"(.+)+x": 3}}, "could take forever"),
        ({"rank_pattern": {".*.*.*.*.*.*x": 3}}, "could take forever"),
        ({"lora_alpha": 2**70}, "more than 64 bits"),
        ({"alpha_pattern": {"to_q": [3]}}, r"gives alpha as \[3\]: a number"),
        ([], "is no JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_a_configuration_that_is_no_plain_loras(config, message, tmp_path):
    save_file(FORMATS["PEFT"][0], tmp_path / "adapter_model.safetensors")
    text = json.dumps(PEFT | config) if isinstance(config, dict) else config if isinstance(config, str) else "[]"
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_lora(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path):
    with pytest.raises(InputError, match=r"a directory with 0 [.]safetensors files"):
        read_lora(tmp_path)
    with pytest.raises(InputError, match="is no file"):
        read_lora("/dev/zero")


def test_a_merge_that_does_not_arrive_is_refused(tmp_path):
    """Weights that are computed from other parameters, that overflow, or that are quantised."""
    save_file(*FORMATS["diffusers"][:1], tmp_path / "lora.safetensors")
    lora = read_lora(tmp_path / "lora.safetensors")
    computed = tiny_transformer("wan")
    nn.utils.parametrizations.weight_norm(computed.blocks[1].ffn.net[2])
    with pytest.raises(InputError, match=r"blocks\.1\.ffn\.net\.2 changed by 0 instead of \d"):
        merge_lora(computed, lora)
    large = {key: 300 * value for key, value in load_file(tmp_path / "lora.safetensors").items()}
    save_file({key: 300 * value for key, value in large.items()}, tmp_path / "large.safetensors")
    with pytest.raises(InputError, match=r"with its update is not finite in torch.float16"):
        merge_lora(tiny_transformer("wan").half(), read_lora(tmp_path / "large.safetensors"))
    with pytest.raises(InputError, match=r"blocks\.0\.attn1\.to_q is quantised \(torch.float8_e4m3fn\)"):
        merge_lora(tiny_transformer("wan").to(torch.float8_e4m3fn), lora)
    assert merge_lora(tiny_transformer("wan").bfloat16(), lora) < 0.1


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 31, 97])
def test_joint_layers_of_a_size_that_is_not_three_layers(rows, tmp_path):
    """ComfyUI's HunyuanVideo-1.5 has query, key and value in one layer."""
    layer = "diffusion_model.double_blocks.0.img_attn.qkv"
    factors = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(rows, 2)}
    save_file(factors | {f"{layer}.diff_b": torch.ones(rows)}, path := tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match="is a LoRA for another model"):
        merge_lora(tiny_transformer("hunyuan_video15"), read_lora(path))


def test_a_joint_layer_is_three_with_its_differences(tmp_path):
    layer = "diffusion_model.double_blocks.0.img_attn.qkv"
    generator = torch.Generator().manual_seed(0)
    a, b, bias = (torch.randn(shape, generator=generator) for shape in ((2, 32), (96, 2), (96,)))
    tensors = {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b, f"{layer}.diff_b": bias}
    save_file(tensors, path := tmp_path / "lora.safetensors")
    expected = {}
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        rows = slice(32 * i, 32 * i + 32)
        expected[f"transformer_blocks.0.attn.{name}.weight"] = b[rows] @ a
        expected[f"transformer_blocks.0.attn.{name}.bias"] = bias[rows]
    assert_same(merged(path, "hunyuan_video15"), expected)
    factors = replace(read_lora(path), differences={})
    for style in STYLES:  # the three share their A, which no file can say
        again = read_lora(factors.to_bytes(style))
        for name, layer in factors.layers.items():
            torch.testing.assert_close(again.layers[name].update(), layer.update())


@pytest.mark.parametrize("tool", ["DiffSynth", "VideoX-Fun", "finetrainers", "lightx2v", "save_lora_adapter"])
def test_an_adapter_goes_on_from_a_file_of_each_tool(tool, tmp_path):
    tensors, metadata, scale, _ = FORMATS[tool]
    save_file(tensors, path := tmp_path / "lora.safetensors", metadata)
    transformer = tiny_transformer("wan")
    add_lora(transformer, start=read_lora(path))
    again = read_lora(export_lora(transformer))
    assert {p.requires_grad for p in lora_parameters(transformer)} == {True}
    for name, (a, b) in factors().items():
        torch.testing.assert_close(again.layers[name].update(), scale * b @ a)
