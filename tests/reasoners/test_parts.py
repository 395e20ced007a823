"""Other transformers and few-step LoRAs in a pipeline, and the presets of the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from tests.reasoners import tiny_checkpoints
from tests.reasoners.tiny_checkpoints import SIZE
from vlmteacher.errors import InputError
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.reasoners.presets import HUB_IDS, PRESETS, find_preset, known_preset
from vlmteacher.reasoners.sampling import SamplerSettings

ORIGINAL_NAMES = {  # diffusers' names of a block's layers -> those of the model's authors
    **{
        f"attn{number}.{ours}": f"{kind}_attn.{theirs}"
        for number, kind in ((1, "self"), (2, "cross"))
        for ours, theirs in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
    },
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
RANK, ALPHA = 3, 6.0


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    return tiny_checkpoints.wan22_i2v_a14b(tmp_path_factory.mktemp("i2v"))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(next(directory.glob("*.safetensors")))


def same_weights(network: torch.nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    state = network.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def original_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformer's weights as Wan's authors name them."""
    renamed = {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "proj_out": "head.head",
        **ORIGINAL_NAMES,
        "attn1.": "self_attn.",
        "attn2.": "cross_attn.",
        "norm2": "norm3",
    }
    found = {}
    for name, value in state.items():
        new = "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")
        for ours, theirs in renamed.items():
            new = new.replace(ours, theirs)
        found[new] = value
    return found


# ---------------------------------------------------------------- transformers


def test_a_transformer_from_another_directory(t2v, a14b):
    """The transformer's directory, or that of a pipeline with it."""
    for given in (a14b, a14b / "transformer"):
        reasoner = load_reasoner(t2v, transformer=str(given))
        assert same_weights(reasoner.transformer, weights(a14b / "transformer"))
    with pytest.raises(InputError, match=r"has 1 transformer.s., 2 were given"):
        load_reasoner(t2v, transformer=[str(a14b), str(a14b)])


def test_experts_from_other_directories(t2v, a14b, i2v):
    reasoner = load_reasoner(a14b, transformer=[str(t2v), str(a14b / "transformer")])
    assert same_weights(reasoner.transformer, weights(t2v / "transformer"))
    assert same_weights(reasoner.transformer_2, weights(a14b / "transformer"))
    with pytest.raises(InputError, match="one expert takes 20 channels and the other 8"):
        load_reasoner(a14b, transformer=str(i2v))
    own = load_reasoner(a14b, transformer=str(t2v))
    assert same_weights(own.transformer_2, weights(a14b / "transformer_2"))


@pytest.mark.parametrize("names", ["diffusers", "original"])
def test_a_single_file(t2v, a14b, tmp_path, names):
    state = weights(a14b / "transformer_2")
    file = tmp_path / "model.safetensors"
    save_file(state if names == "diffusers" else original_names(state), file)
    assert (names == "original") == any("self_attn" in name for name in load_file(file))
    reasoner = load_reasoner(t2v, transformer=str(file))
    assert same_weights(reasoner.transformer, state)
    half = load_reasoner(t2v, torch.bfloat16, transformer=str(file)).transformer
    of_directory = load_reasoner(t2v, torch.bfloat16).transformer
    assert {n: p.dtype for n, p in half.named_parameters()} == {n: p.dtype for n, p in of_directory.named_parameters()}


def test_files_that_are_no_such_transformer(t2v, i2v, tmp_path):
    state = weights(t2v / "transformer")
    file = tmp_path / "model.safetensors"
    save_file({name: value for name, value in state.items() if "blocks.1" not in name}, file)
    with pytest.raises(InputError, match=r"WanTransformer3DModel lacks 27 weights \(blocks.1.attn1.norm_k.weight, ..."):
        load_reasoner(t2v, transformer=str(file))
    save_file(weights(i2v / "transformer"), file)  # 20 input channels
    with pytest.raises(
        InputError,
        match=r"other shapes in 1 weights \(patch_embedding.weight \(32, 20, 1, 2, 2\), not \(32, 8, 1, 2, 2\)",
    ):
        load_reasoner(t2v, transformer=str(file))
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in state.items()}, file)
    with pytest.raises(
        InputError, match=r"holds F8_E4M3 values without a scale .*: give weights that are not quantised"
    ):
        load_reasoner(t2v, transformer=str(file))
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_reasoner(t2v, transformer=str(file))
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model.pt is no .safetensors or .gguf file"):
        load_reasoner(t2v, transformer=str(tmp_path / "model.pt"))
    with pytest.raises(InputError, match=r"has no config.json"):
        load_reasoner(t2v, transformer=str(tmp_path))
    with pytest.raises(InputError, match=r"none.safetensors is no file"):
        load_reasoner(t2v, transformer=str(tmp_path / "none.safetensors"))
    with pytest.raises(InputError, match="no-such/model is neither a directory nor a model that can be reached"):
        load_reasoner(t2v, transformer="no-such/model", local_files_only=True)


def test_a_directory_that_lacks_weights(t2v, tmp_path):
    copy = tmp_path / "transformer"
    shutil.copytree(t2v / "transformer", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(InputError, match=r"lacks \d+ weights \(blocks.2"):
        load_reasoner(t2v, transformer=str(copy))


def test_a_transformer_that_does_not_fit_the_vae(t2v, tmp_path):
    WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=48, out_channels=48, text_dim=32, num_layers=1
    ).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="takes 48 channels and gives 48, but the VAE has 8"):
        load_reasoner(t2v, transformer=str(tmp_path))
    WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=8, out_channels=8, text_dim=64, num_layers=1
    ).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="takes text of width 64 and the text encoder gives 32"):
        load_reasoner(t2v, transformer=str(tmp_path))


# ---------------------------------------------------------------- few-step LoRAs


def lora_of(directory: Path, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random A (r, in) and B (out, r) by diffusers' name of the layer."""
    state, generator = weights(directory), torch.Generator().manual_seed(seed)
    found = {}
    for block in (0, 1):
        for layer in ORIGINAL_NAMES:
            out_features, in_features = state[f"blocks.{block}.{layer}.weight"].shape
            shapes = (RANK, in_features), (out_features, RANK)
            found[f"blocks.{block}.{layer}"] = tuple(0.1 * torch.randn(s, generator=generator) for s in shapes)
    return found


def write_lora(path: Path, lora: dict[str, tuple[torch.Tensor, torch.Tensor]], style: str) -> str:
    """Write a LoRA file of alpha / rank = 2 in one of the published key styles."""
    state, metadata = {}, None
    for name, (a, b) in lora.items():
        _, block, layer = name.split(".", 2)
        theirs = f"blocks.{block}.{ORIGINAL_NAMES[layer]}"
        if style == "diffusers":
            state |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
        elif style == "comfyui":
            prefix = f"diffusion_model.{theirs}"
            state |= {
                f"{prefix}.lora_A.weight": a,
                f"{prefix}.lora_B.weight": b,
                f"{prefix}.alpha": torch.tensor(ALPHA),
            }
        else:
            prefix = f"lora_unet_{theirs.replace('.', '_')}"
            state |= {
                f"{prefix}.lora_down.weight": a,
                f"{prefix}.lora_up.weight": b,
                f"{prefix}.alpha": torch.tensor(ALPHA),
            }
    if style == "diffusers":
        config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(lora)}
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata)
    return str(path)


@pytest.mark.parametrize("style", ["diffusers", "comfyui", "musubi"])
def test_a_few_step_lora_is_in_the_weights(t2v, tmp_path, style):
    lora = lora_of(t2v / "transformer")
    file = write_lora(tmp_path / "lora.safetensors", lora, style)
    merged = load_reasoner(t2v, few_step_lora=file, preset="wan2.1-lightx2v-4step").transformer
    expected = weights(t2v / "transformer")
    for name, (a, b) in lora.items():
        expected[f"{name}.weight"] += ALPHA / RANK * b @ a
    assert merged.state_dict().keys() == expected.keys()  # no adapter is left
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_the_merged_model_is_diffusers_model_with_the_lora(t2v, tmp_path):
    file = write_lora(tmp_path / "lora.safetensors", lora_of(t2v / "transformer"), "comfyui")
    reasoner = load_reasoner(t2v, few_step_lora=file, preset="wan2.1-lightx2v-4step")
    pipe = WanPipeline.from_pretrained(t2v)
    condition = reasoner.encode("move the box", None, *SIZE)
    noise = reasoner.noise(condition, torch.Generator().manual_seed(0))
    plain = load_reasoner(t2v).velocity(condition, noise.z1, 1.0)
    pipe.load_lora_weights(file)
    with torch.no_grad():
        ours = reasoner.velocity(condition, noise.z1, 1.0)
        theirs = pipe.transformer(noise.z1, torch.tensor([1000.0]), condition.prompt_embeds, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (ours - plain).abs().mean() > 1e-3


def test_a_lora_with_biases(t2v, tmp_path):
    """Like LightX2V's files: ``diff_b`` beside the factors, here of one layer only."""
    lora = lora_of(t2v / "transformer")
    file = write_lora(tmp_path / "lora.safetensors", lora, "comfyui")
    bias = torch.linspace(-1, 1, 32)
    save_file(load_file(file) | {"diffusion_model.blocks.0.self_attn.q.diff_b": bias}, file)
    merged = load_reasoner(t2v, few_step_lora=file, preset="wan2.1-lightx2v-4step").transformer.state_dict()
    own = weights(t2v / "transformer")
    changed = {name for name in own if name.endswith(".bias") and not torch.equal(own[name], merged[name])}
    assert changed == {"blocks.0.attn1.to_q.bias"}
    torch.testing.assert_close(merged["blocks.0.attn1.to_q.bias"], own["blocks.0.attn1.to_q.bias"] + bias)


def test_each_expert_has_its_lora(a14b, tmp_path):
    files = [
        write_lora(tmp_path / f"{name}_noise.safetensors", lora_of(a14b / "transformer", seed), "musubi")
        for seed, name in enumerate(("high", "low"))
    ]
    reasoner = load_reasoner(a14b, few_step_lora=files, preset="wan2.2-a14b-lightx2v-4step")
    for seed, (name, network) in enumerate(
        (("transformer", reasoner.transformer), ("transformer_2", reasoner.transformer_2))
    ):
        a, b = lora_of(a14b / "transformer", seed)["blocks.0.ffn.net.2"]
        expected = weights(a14b / name)["blocks.0.ffn.net.2.weight"] + 2 * b @ a
        torch.testing.assert_close(network.blocks[0].ffn.net[2].weight, expected)


def test_a_bfloat16_model_is_merged_in_float32(t2v, tmp_path):
    """W + s B A is rounded once, and no product of rounded factors is added."""
    lora = lora_of(t2v / "transformer")
    file = write_lora(tmp_path / "lora.safetensors", lora, "diffusers")
    merged = load_reasoner(t2v, torch.bfloat16, few_step_lora=file, preset="wan2.1-lightx2v-4step").transformer
    state = weights(t2v / "transformer")
    for name, (a, b) in lora.items():
        exact = state[f"{name}.weight"].bfloat16().float() + 2.0 * (b @ a)
        found = merged.get_submodule(name).weight
        assert found.dtype == torch.bfloat16
        assert (found.float() - exact).abs().max() <= exact.abs().max() * 2**-8
        assert (found == exact.bfloat16()).float().mean() > 0.999


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda s: {f"unet.{k}": v for k, v in s.items()},
            r"no linear layer unet\.transformer\.\S+ \(unet\.transformer",
        ),
        (
            lambda s: {k.replace("blocks.1", "blocks.9"): v for k, v in s.items()},
            r"no linear layer blocks\.9\.\S+ \(transformer\.blocks\.9",
        ),
        (
            lambda s: {k: torch.cat([v, v], -1) if "lora_A" in k else v for k, v in s.items()},
            r"\(transformer\.blocks\.\S+\) is 64 -> 32, that of this Wan",
        ),
        (
            lambda s: {k.replace("lora_A", "hada_w1"): v for k, v in s.items()},
            r"holds transformer\.blocks\.0\.\S+hada_w1",
        ),
        (lambda s: {k: v * float("nan") for k, v in s.items()}, "no finite numbers"),
        (lambda s: {"diffusion_model.something": torch.zeros(1)}, "holds diffusion_model.something"),
        (lambda s: {k: 0 * v for k, v in s.items()}, "changes nothing"),
        (lambda s: {f"text_encoder.{k}": v for k, v in s.items()}, "is of a text encoder"),
    ],
)
def test_loras_of_other_models(t2v, tmp_path, change, said):
    file = tmp_path / "lora.safetensors"
    write_lora(file, lora_of(t2v / "transformer"), "diffusers")
    save_file(change(load_file(file)), file)
    with pytest.raises(InputError, match=said) as caught:
        load_reasoner(t2v, few_step_lora=str(file), preset="wan2.1-lightx2v-4step")
    assert "\n" not in str(caught.value)


def test_lora_files_that_cannot_be_read(t2v, tmp_path):
    for file, said in (
        (tmp_path / "none.safetensors", "is no file"),
        (tmp_path / "lora.bin", "is no .safetensors file"),
        (tmp_path / "cut.safetensors", r"cannot be read \(Error"),
    ):
        if file.name != "none.safetensors":
            file.write_bytes(b"12345678 cut")
        with pytest.raises(InputError, match=said):
            load_reasoner(t2v, few_step_lora=str(file), preset="wan2.1-lightx2v-4step")


# ---------------------------------------------------------------- presets


def test_every_preset_can_be_sampled_and_every_id_has_one():
    for settings in PRESETS.values():
        settings.check()
        assert settings.sigmas[0] == 1 and 0 < settings.sigmas[-1] < 1
        assert settings.num_frames % 4 == 1 and settings.height % 16 == settings.width % 16 == 0
    assert set(HUB_IDS.values()) <= set(PRESETS)
    assert PRESETS["fastwan2.2-ti2v-5b"].timesteps == (1000, 757, 522)
    assert PRESETS["wan2.2-ti2v-5b-turbo"].timesteps == (1000, 750, 500, 250)
    np.testing.assert_allclose(PRESETS["wan2.1-lightx2v-4step"].sigmas, (1, 0.9375, 5 / 6, 0.625))
    assert len(PRESETS["wan2.2-ti2v-5b"].timesteps) == 50 and PRESETS["wan2.2-ti2v-5b"].guidance_scale == 5
    with pytest.raises(InputError, match=r"unknown preset 'turbo': choose from wan2.1-t2v-480p, "):
        find_preset("turbo")


def test_which_settings_are_taken(t2v, tmp_path):
    """A preset precedes reasoner.json, which precedes the known id, also as the name of a local directory."""
    assert known_preset("Wan-AI/Wan2.2-TI2V-5B-Diffusers") == PRESETS["wan2.2-ti2v-5b"]
    assert known_preset("some/where", "/models/fastwan2.2-TI2V-5B-FullAttn-Diffusers/") == PRESETS["fastwan2.2-ti2v-5b"]
    assert known_preset("owner/model") is None
    directory = tmp_path / "Wan2.1-T2V-1.3B-Diffusers"
    shutil.copytree(t2v, directory)
    assert load_reasoner(directory).settings == PRESETS["wan2.1-t2v-480p"]
    (directory / "reasoner.json").write_text(json.dumps({"timesteps": [1000, 400], "sampler": "euler"}))
    assert load_reasoner(directory).settings == SamplerSettings(timesteps=(1000, 400), sampler="euler")
    assert load_reasoner(directory, preset="wan2.1-lightx2v-4step").settings == PRESETS["wan2.1-lightx2v-4step"]
    assert load_reasoner(t2v).settings == SamplerSettings()


def test_by_hub_id_from_the_cache(t2v, a14b, tmp_path, monkeypatch):
    """From the hub's cache: pipeline, transformer and the config for a single file by id, with their presets."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    ids = {"Wan-AI/Wan2.1-T2V-1.3B-Diffusers": t2v, "FastVideo/FastWan2.1-T2V-1.3B-Diffusers": a14b}
    for name, directory in ids.items():
        cached = tmp_path / f"models--{name.replace('/', '--')}"
        shutil.copytree(directory, cached / "snapshots" / commit)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(commit)
    base, other = ids
    reasoner = load_reasoner(base, local_files_only=True)
    assert reasoner.settings == PRESETS["wan2.1-t2v-480p"]
    assert same_weights(reasoner.transformer, weights(t2v / "transformer"))
    fast = load_reasoner(base, local_files_only=True, transformer=other)
    assert fast.settings == PRESETS["fastwan2.1-t2v-480p"]
    assert same_weights(fast.transformer, weights(a14b / "transformer"))
    file = tmp_path / "model.safetensors"
    save_file(original_names(weights(a14b / "transformer_2")), file)
    single = load_reasoner(base, local_files_only=True, transformer=str(file))
    assert same_weights(single.transformer, weights(a14b / "transformer_2"))


def test_a_few_step_lora_asks_how_it_is_sampled(t2v, tmp_path):
    file = write_lora(tmp_path / "lora.safetensors", lora_of(t2v / "transformer"), "diffusers")
    with pytest.raises(InputError, match=r"changes how .* is sampled: name a preset .wan2.1-t2v-480p"):
        load_reasoner(t2v, few_step_lora=file)
