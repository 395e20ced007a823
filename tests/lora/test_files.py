"""LoRA files of every style, for every family, against diffusers' own loaders; unusable files are refused."""

import json

import pytest
import torch
from diffusers import (
    CogVideoXPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    LTX2Pipeline,
    LTXPipeline,
    WanPipeline,
)
from safetensors.torch import load, save

from tests.tiny_transformers import FAMILIES, call, tiny_transformer
from vlmteacher.errors import InputError
from vlmteacher.lora.adapter import add_lora, export_lora, lora_parameters, lora_state_dict
from vlmteacher.lora.formats import STYLES, Factors, LoRA, merge_lora, read_lora
from vlmteacher.lora.fused_layer import LoRALinear
from vlmteacher.reasoners.checkpointing import block_list


def trained(family, rank=4, alpha=6.0, fused=True):
    """A transformer with a LoRA whose update is not 0."""
    transformer = tiny_transformer(family)
    add_lora(transformer, rank, alpha, seed=0, fused=fused)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(transformer):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return transformer


def loaded_by_diffusers(family, path):
    """A transformer on which diffusers has put the LoRA file."""
    transformer = tiny_transformer(family)
    scheduler = FlowMatchEulerDiscreteScheduler()
    if family == "hunyuan_video15":  # its pipeline has no LoRA loader
        # By the path alone diffusers would not look at the metadata, and take alpha for the rank.
        transformer.load_lora_adapter(path.parent, weight_name=path.name, prefix="transformer")
    else:
        kind, *others = {
            "ltx": (LTXPipeline,),
            "ltx2": (LTX2Pipeline, "connectors", "audio_vae", "vocoder"),
            "cogvideox": (CogVideoXPipeline,),
            "hunyuan_video": (HunyuanVideoPipeline, "text_encoder_2", "tokenizer_2"),
        }.get(family, (WanPipeline,))
        none = dict.fromkeys(("tokenizer", "text_encoder", "vae", *others))
        pipe = kind(scheduler=scheduler, transformer=transformer, **none)
        pipe.load_lora_weights(path.parent, weight_name=path.name)
    return transformer


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_the_blocks_is_adapted_by_our_operator(family):
    transformer = trained(family)
    blocks = block_list(transformer)
    wanted = {f"{type(blocks)}{name}" for name, each in blocks.named_modules() if isinstance(each, LoRALinear)}
    linear = {
        f"{type(blocks)}{name}"
        for name, each in blocks.named_modules()
        if hasattr(each, "in_features") and ".norm" not in name and "lora_" not in name and "base_layer" not in name
        if family != "ltx2" or not any(other in name for other in ("audio", "to_gate_logits"))
    }
    assert wanted == linear
    assert sum(isinstance(each, LoRALinear) for each in transformer.modules()) == len(linear)


@pytest.mark.parametrize(
    ("family", "style"),  # diffusers has loaders for these
    [(family, "diffusers") for family in FAMILIES]
    + [
        ("wan", "comfyui"),
        ("wan_i2v", "comfyui"),
        ("ltx", "comfyui"),
        ("ltx2", "comfyui"),
        ("wan", "musubi"),
        ("wan_i2v", "musubi"),
    ],
)
def test_diffusers_loads_every_style_as_the_same_lora(family, style, tmp_path):
    transformer, path = trained(family), tmp_path / "lora.safetensors"
    path.write_bytes(read_lora(export_lora(transformer)).to_bytes(style))
    theirs = loaded_by_diffusers(family, path)
    expected = call(transformer)
    assert (call(tiny_transformer(family)) - expected).abs().max() > 1e-2
    torch.testing.assert_close(call(theirs), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("style", STYLES)
def test_what_is_written_is_read_again(family, style):
    lora = read_lora(export_lora(trained(family)))
    assert (lora.rank, lora.alpha) == (4, 6.0)
    if style == "musubi" and family in ("ltx", "ltx2", "cogvideox"):
        with pytest.raises(InputError, match=r"musubi-tuner has no (LTX-Video|CogVideoX)"):
            lora.to_bytes(style)
        return
    again = read_lora(lora.to_bytes(style))
    assert again.layers.keys() == lora.layers.keys()
    for name, layer in lora.layers.items():
        assert again.layers[name].rank == 4
        torch.testing.assert_close(again.layers[name].update(), layer.update(), atol=1e-6, rtol=1e-6)
    assert lora.to_bytes(style) == lora.to_bytes(style)
    if style == "musubi":
        assert again.alpha == 6.0


def test_the_names_are_those_that_the_tools_use():
    keys = {style: set(load(read_lora(export_lora(trained("wan_i2v"))).to_bytes(style))) for style in STYLES}
    assert "transformer.blocks.1.attn2.add_k_proj.lora_A.weight" in keys["diffusers"]
    assert "diffusion_model.blocks.1.cross_attn.k_img.lora_A.weight" in keys["comfyui"]
    wanted = {f"lora_unet_blocks_1_cross_attn_k_img.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert wanted < keys["musubi"]
    hunyuan = read_lora(export_lora(trained("hunyuan_video15")))
    assert "lora_unet_double_blocks_0_img_attn_q.lora_down.weight" in load(hunyuan.to_bytes("musubi"))
    comfyui = load(hunyuan.to_bytes("comfyui"))
    assert comfyui["diffusion_model.double_blocks.0.txt_attn.qkv.lora_A.weight"].shape == (12, 32)
    fused = [comfyui[f"diffusion_model.double_blocks.0.img_attn.qkv.lora_{part}.weight"] for part in "BA"]
    parts = [hunyuan.layers[f"transformer_blocks.0.attn.to_{part}"].update() for part in "qkv"]
    torch.testing.assert_close(fused[0] @ fused[1], torch.cat(parts), atol=1e-6, rtol=1e-6)
    older = read_lora(export_lora(trained("hunyuan_video")))
    musubi, comfyui = (load(older.to_bytes(style)) for style in ("musubi", "comfyui"))
    assert "lora_unet_double_blocks_0_img_attn_qkv.alpha" in musubi
    assert "diffusion_model.double_blocks.1.txt_mlp.2.lora_A.weight" in comfyui
    names = [f"single_transformer_blocks.1.{part}" for part in (*(f"attn.to_{each}" for each in "qkv"), "proj_mlp")]
    up, down = (musubi[f"lora_unet_single_blocks_1_linear1.lora_{end}.weight"] for end in ("up", "down"))
    joint = torch.cat([older.layers[name].update() for name in names])  # 3 of 32 rows and one of 128
    assert joint.shape == (7 * 32, 32)
    torch.testing.assert_close(1.5 * up @ down, joint, atol=1e-6, rtol=1e-6)


def test_layers_of_several_ranks_and_alphas_reach_diffusers(tmp_path):
    lora = read_lora(export_lora(trained("wan")))
    layers = dict(lora.layers)
    a, b = layers["blocks.0.attn1.to_q"].a, layers["blocks.0.attn1.to_q"].b
    layers["blocks.0.attn1.to_q"] = Factors(a[:1].contiguous(), b[:, :1].contiguous(), 3.0)
    layers["blocks.1.ffn.net.2"] = Factors(layers["blocks.1.ffn.net.2"].a, layers["blocks.1.ffn.net.2"].b, 1.0)
    mixed = LoRA(layers)
    path = tmp_path / "mixed.safetensors"
    path.write_bytes(mixed.to_bytes("diffusers"))
    continued, merged = tiny_transformer("wan"), tiny_transformer("wan")
    add_lora(continued, start=read_lora(path))
    merge_lora(merged, mixed)
    theirs = call(loaded_by_diffusers("wan", path))
    torch.testing.assert_close(call(continued), theirs, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(call(merged), theirs, atol=2e-5, rtol=1e-4)
    assert read_lora(export_lora(continued)).layers["blocks.0.attn1.to_q"].scale == 3.0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_goes_on_from_a_file_and_merges(family):
    transformer = trained(family)
    lora, expected = read_lora(export_lora(transformer)), call(transformer)
    continued, merged = tiny_transformer(family), tiny_transformer(family)
    add_lora(continued, rank=2, start=lora)
    assert torch.equal(call(continued), expected)
    assert {p.requires_grad for p in lora_parameters(continued)} == {True}
    before, after = lora_state_dict(transformer), lora_state_dict(continued)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert merge_lora(merged, lora) < 1e-4
    torch.testing.assert_close(call(merged), expected, atol=2e-5, rtol=1e-4)
    assert merge_lora(tiny_transformer(family).bfloat16(), lora) > 1e-3


def test_a_part_of_the_layers_goes_on_alone():
    lora = read_lora(export_lora(trained("wan")))
    part = LoRA({name: layer for name, layer in lora.layers.items() if name.startswith("blocks.1.attn1")})
    transformer = tiny_transformer("wan")
    add_lora(transformer, start=part)
    assert read_lora(export_lora(transformer)).layers.keys() == part.layers.keys()


def broken(change):
    tensors = load(export_lora(trained("wan")))
    change(tensors)
    return save(tensors)


KEY = "transformer.blocks.0.attn1.to_q.lora_A.weight"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04 a pickle", "cannot be read"),
        (b"", "cannot be read"),
        (save({"x": torch.ones(2)})[:-3], "cannot be read"),
        (save({}), "holds no tensors"),
        (broken(lambda t: t.pop(KEY)), "only transformer.blocks.0.attn1.to_q.lora_B.weight of"),
        (broken(lambda t: t[KEY].view(-1)[3:4].fill_(torch.nan)), "no finite numbers"),
        (broken(lambda t: t[KEY].view(-1)[3:4].fill_(-torch.inf)), f"{KEY} with values that are no finite numbers"),
        (broken(lambda t: t[KEY].view(-1)[3:4].fill_(-1e30)), f"{KEY} with values up to 1e\\+30"),
        (broken(lambda t: [v.fill_(1e9) for k, v in t.items() if KEY[:-13] in k]), r"lora_A.*lora_B.*of norm \de\+20"),
        (broken(lambda t: t.update({KEY: t[KEY].to(torch.int8)})), "int8: only"),
        (broken(lambda t: t.update({KEY.replace("lora_A.weight", "alpha"): torch.tensor(torch.inf)})), "no finite"),
        (broken(lambda t: t.update({KEY: torch.ones(3, 32)})), "of rank 3 and 4"),
        (broken(lambda t: t.update({"transformer.proj_out.set_weight": torch.ones(3)})), "only plain LoRA factors"),
        (broken(lambda t: t.update({"lora_unet_double_x.lora_up.weight": torch.ones(3, 3)})), "no model known here"),
        (save(load(export_lora(trained("wan"))), {"lora_adapter_metadata": '{"use_dora": true}'}), "use_dora"),
        (save(load(export_lora(trained("wan"))), {"lora_adapter_metadata": '{"lora_alpha": "x"}'}), "a number"),
        (save(load(export_lora(trained("wan"))), {"lora_adapter_metadata": "[1]"}), "is no JSON object"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(data, message, tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read_lora(path)
    assert "\n" not in str(caught.value)


def test_an_update_too_large_for_the_models_dtype_names_the_layer():
    """In float16 the largest number is 65504."""
    lora = read_lora(broken(lambda t: t[KEY].fill_(1e7)))
    with pytest.raises(InputError, match=r"blocks\.0\.attn1\.to_q: .*is not finite in torch\.float16"):
        add_lora(tiny_transformer("wan").half(), start=lora)
    with pytest.raises(InputError, match=r"blocks\.0\.attn1\.to_q.* is not finite in torch\.float16"):
        merge_lora(tiny_transformer("wan").half(), lora)


def test_factors_that_are_zero():
    """A alone may be 0: then B stays where it is until A has moved. With both, no gradient reaches either."""
    zero_a = read_lora(broken(lambda t: t[KEY].zero_()))
    add_lora(tiny_transformer("wan"), start=zero_a)
    both = read_lora(broken(lambda t: [v.zero_() for k, v in t.items() if KEY[:-13] in k]))
    with pytest.raises(InputError, match=rf"both factors of blocks\.0\.attn1\.to_q are 0 \({KEY}, .*lora_B"):
        add_lora(tiny_transformer("wan"), start=both)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_lora(tmp_path / "none.safetensors")


def test_a_lora_for_another_model_is_refused_and_changes_nothing():
    ltx, wan = (read_lora(export_lora(trained(family))) for family in ("ltx", "wan"))
    transformer = tiny_transformer("wan")
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    for use in (lambda lora: add_lora(transformer, start=lora), lambda lora: merge_lora(transformer, lora)):
        with pytest.raises(InputError, match="has no linear layer transformer_blocks"):
            use(ltx)
        layers = dict(wan.layers)
        layers["blocks.1.attn2.to_v"] = Factors(torch.ones(4, 16), torch.ones(32, 4), 4.0)
        with pytest.raises(InputError, match=r"its blocks\.1\.attn2\.to_v is 16 -> 32, that of this Wan\w+ 32 -> 32"):
            use(LoRA(layers))
    after = transformer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_rank_and_alpha_stand_in_the_metadata():
    data = read_lora(export_lora(trained("wan"))).to_bytes("diffusers")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    config = json.loads(header["lora_adapter_metadata"])
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (4, 6.0)
    musubi = read_lora(data).to_bytes("musubi")
    header = json.loads(musubi[8 : 8 + int.from_bytes(musubi[:8], "little")])["__metadata__"]
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "6.0")
