"""Few-step LoRAs of two experts, presets of other models, and assumptions about unnamed files."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reasoners.test_parts import RANK, lora_of, same_weights, weights, write_lora
from tests.reasoners.tiny_hunyuan import tiny_hunyuan_pipeline
from tests.reasoners.tiny_ltx import tiny_ltx_pipeline
from vlmteacher.errors import InputError, Notice
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.reasoners.few_step_lora import noise_in_name
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.reasoners.presets import HUB_IDS, PRESETS, check_distilled, check_preset
from vlmteacher.reasoners.sampling import SamplerSettings

FOUR_STEPS, FOUR_STEPS_A14B = "wan2.1-lightx2v-4step", "wan2.2-a14b-lightx2v-4step"


@contextmanager
def notices() -> Iterator[list[str]]:
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    told += [str(each.message) for each in caught if issubclass(each.category, Notice)]


def files(a14b, folder, *names: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    return [write_lora(folder / name, lora_of(a14b / "transformer", seed), "musubi") for seed, name in enumerate(names)]


def expected(a14b, expert: str, seed: int) -> torch.Tensor:
    a, b = lora_of(a14b / "transformer", seed)["blocks.0.ffn.net.2"]
    return weights(a14b / expert)["blocks.0.ffn.net.2.weight"] + 2 * b @ a


# ---------------------------------------------------------------- two experts


@pytest.mark.parametrize(
    ("name", "noise"),
    [
        ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors", "high"),
        ("Wan2.2-Lightning_T2V-A14B-4steps-lora_LOW_fp16.safetensors", "low"),
        ("low_noise_model.safetensors", "low"),
        ("high_res_low_noise.safetensors", "low"),
        ("HighNoise.safetensors", "high"),
        ("high_noise_model/lora.safetensors", "high"),
        ("followers.safetensors", None),
        ("high_low.safetensors", None),
        ("lora.safetensors", None),
    ],
)
def test_what_a_name_says_of_the_noise(name, noise):
    assert noise_in_name(f"/somewhere/{name}") == noise


def test_exchanged_experts_are_refused(a14b, tmp_path):
    high, low = files(a14b, tmp_path, "a_high_noise.safetensors", "a_low_noise.safetensors")
    for given in ([low, high], [low, low], [high, high]):
        with pytest.raises(InputError, match=r"_(low|high)_noise\S+ is for the \S+ expert by its name"):
            load_reasoner(a14b, few_step_lora=given, preset=FOUR_STEPS_A14B)
    shutil.copytree(a14b / "transformer", tmp_path / "high_noise_model")
    shutil.copytree(a14b / "transformer_2", tmp_path / "low_noise_model")
    with pytest.raises(InputError, match=r"transformer \S+low_noise_model is for the low-noise expert by its name"):
        load_reasoner(a14b, transformer=[str(tmp_path / f"{each}_noise_model") for each in ("low", "high")])
    with pytest.raises(InputError, match="low_noise_model is for the low-noise expert"):
        load_reasoner(a14b, transformer=str(tmp_path / "low_noise_model"))


def test_one_lora_for_two_experts_is_refused(a14b, tmp_path):
    (one,) = files(a14b, tmp_path, "high_noise.safetensors")
    with pytest.raises(
        InputError, match="has two experts, and the low-noise one would be sampled in few steps as it is"
    ):
        load_reasoner(a14b, few_step_lora=one, preset=FOUR_STEPS_A14B)
    distilled = [str(a14b / "transformer"), str(a14b / "transformer_2")]
    with notices() as told:
        reasoner = load_reasoner(a14b, few_step_lora=one, transformer=distilled, preset=FOUR_STEPS_A14B)
    assert any("few_step_lora: assumed is" in text and "own for low noise" in text for text in told)
    assert same_weights(reasoner.transformer_2, weights(a14b / "transformer_2"))


def test_the_low_noise_experts_lora_is_not_gone_on_from(a14b, pipe, tmp_path):
    low, high = files(a14b, tmp_path, "low_noise.safetensors", "high_noise.safetensors")
    two = TeacherPipeline(load_reasoner(a14b), pipe.teacher, pipe.decoder)
    for use in (two.load_lora, two.fuse):
        with pytest.raises(InputError, match="is for the low-noise expert by its name: give the high-noise one"):
            use(low)
        use(high)
    assert two.lora.scale_source == "alpha tensors"


def test_what_is_assumed_of_two_files(a14b, tmp_path):
    first, second = files(a14b, tmp_path, "one.safetensors", "two.safetensors")
    with notices() as told:
        reasoner = load_reasoner(a14b, few_step_lora=[first, second], preset=FOUR_STEPS_A14B)
    assert told == [f"few_step_lora: assumed is {first} for high noise, {second} for low noise"]
    assert reasoner.notes == {"few_step_lora_scale": "transformer: alpha tensors; transformer_2: alpha tensors"}
    named = files(a14b, tmp_path, "high_noise.safetensors", "low_noise.safetensors")
    with notices() as told:
        load_reasoner(a14b, few_step_lora=named, preset=FOUR_STEPS_A14B)
        load_reasoner(a14b, few_step_lora=[first, first], preset=FOUR_STEPS_A14B)  # meant for both
    assert told == []


@pytest.mark.parametrize("prefixes", [("transformer.", "transformer_2."), ("high_noise.", "low_noise.")])
def test_one_file_of_both_experts(a14b, t2v, tmp_path, prefixes):
    state = {}
    for seed, prefix in enumerate(prefixes):
        for name, (a, b) in lora_of(a14b / "transformer", seed).items():
            state |= {f"{prefix}{name}.lora_A.weight": a, f"{prefix}{name}.lora_B.weight": 2 * b}
    save_file(state, file := str(tmp_path / "both.safetensors"))
    reasoner = load_reasoner(a14b, few_step_lora=file, preset=FOUR_STEPS_A14B)
    for seed, expert in enumerate(("transformer", "transformer_2")):
        found = getattr(reasoner, expert).blocks[0].ffn.net[2].weight
        torch.testing.assert_close(found, expected(a14b, expert, seed))
    with pytest.raises(InputError, match="which the other file is for"):
        load_reasoner(a14b, few_step_lora=[file, file], preset=FOUR_STEPS_A14B)
    with pytest.raises(InputError, match=rf"LoRA of a low-noise expert \({prefixes[1]}\S+\), which .* does not have"):
        load_reasoner(t2v, few_step_lora=file, preset=FOUR_STEPS)
    one = load_reasoner(t2v, few_step_lora=file, preset=FOUR_STEPS, lora_partial=True)
    assert one.notes["few_step_lora_unused"].startswith(prefixes[1])
    save_file({k: v for k, v in state.items() if k.startswith(prefixes[1])}, low := str(tmp_path / "l.safetensors"))
    with pytest.raises(InputError, match="which the other file is for"):
        load_reasoner(a14b, few_step_lora=[low, low], preset=FOUR_STEPS_A14B)
    with pytest.raises(InputError, match="and the high-noise one would be sampled in few steps as it is"):
        load_reasoner(a14b, few_step_lora=low, preset=FOUR_STEPS_A14B)


# ---------------------------------------------------------------- scales and parts of LoRAs


def test_a_file_of_save_lora_adapter_is_merged(t2v, tmp_path):
    """A regression: nothing was merged, and the base model was sampled in 4 steps without guidance."""
    import peft

    transformer = load_reasoner(t2v).transformer
    config = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False)
    transformer.add_adapter(config)
    transformer.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    state = load_file(tmp_path / "lora.safetensors")
    merged = load_reasoner(t2v, few_step_lora=str(tmp_path / "lora.safetensors"), preset=FOUR_STEPS)
    found, own = merged.transformer.state_dict(), weights(t2v / "transformer")
    changed = {name for name, value in own.items() if not torch.equal(value, found[name])}
    assert changed == {f"blocks.{i}.attn{j}.to_q.weight" for i in (0, 1) for j in (1, 2)}
    a, b = (state[f"blocks.0.attn1.to_q.lora_{part}.weight"] for part in "AB")
    name = "blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(found[name], own[name] + 2 * b @ a)
    assert merged.notes == {"few_step_lora_scale": "metadata lora_adapter_metadata"}


def test_a_folder_of_peft_is_merged(t2v, tmp_path):
    state = {
        f"base_model.model.{name}.lora_{part}.weight": value
        for name, pair in lora_of(t2v / "transformer").items()
        for part, value in zip("AB", pair, strict=True)
    }
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 6, "peft_type": "LORA"}))
    merged = load_reasoner(t2v, few_step_lora=str(tmp_path), preset=FOUR_STEPS)
    assert merged.notes == {"few_step_lora_scale": "adapter_config.json"}
    torch.testing.assert_close(merged.transformer.blocks[0].ffn.net[2].weight, expected(t2v, "transformer", 0))


def test_an_image_models_lora_is_merged_in_part(t2v, tmp_path):
    file = write_lora(tmp_path / "lora.safetensors", lora_of(t2v / "transformer"), "comfyui")
    image = {
        f"diffusion_model.blocks.{i}.cross_attn.k_img.lora_{p}.weight": torch.ones(3, 3) for i in (0, 1) for p in "AB"
    }
    save_file(load_file(file) | image, file)
    with pytest.raises(InputError, match=r"k_img\.lora_A\.weight\): --lora-partial"):
        load_reasoner(t2v, few_step_lora=file, preset=FOUR_STEPS)
    with notices() as told:
        merged = load_reasoner(t2v, few_step_lora=file, preset=FOUR_STEPS, lora_partial=True)
    assert any("4 of 64 tensors stay unused: diffusion_model.blocks.*.cross_attn.k_img" in text for text in told)
    assert merged.notes["few_step_lora_unused"].split(", ") == sorted(image)
    torch.testing.assert_close(merged.transformer.blocks[0].ffn.net[2].weight, expected(t2v, "transformer", 0))


# ---------------------------------------------------------------- presets and assumptions


def test_presets_of_other_models_are_refused(t2v, a14b, tmp_path):
    for directory, preset, said in (
        (t2v, "ltx-0.9.8-distilled", "preset ltx-0.9.8-distilled is for LTX-Video models, which"),
        (t2v, "hunyuan-video-1.5-480p", "for HunyuanVideo-1.5 models"),
        (t2v, "wan2.2-ti2v-5b", "for Wan 2.2 TI2V-5B"),
        (t2v, "wan2.2-t2v-a14b", r"for models of two experts \(A14B\)"),
        (a14b, "fastwan2.1-t2v-480p", "for a single Wan model that is not TI2V-5B"),
        (a14b, "wan2.2-i2v-a14b", "for models that are given an image"),
    ):
        with pytest.raises(InputError, match=said):
            load_reasoner(directory, preset=preset)
    assert load_reasoner(a14b, preset=FOUR_STEPS).settings == PRESETS[FOUR_STEPS_A14B]  # the same settings
    ltx = tiny_ltx_pipeline(tmp_path / "ltx")
    with pytest.raises(InputError, match=r"fastwan2[.]2-ti2v-5b is for Wan models"):
        load_reasoner(ltx, preset="fastwan2.2-ti2v-5b")


def test_every_known_model_takes_its_own_preset():
    """With the class, experts and expand_timesteps of its model_index.json on the hub."""
    for hub_id, preset in HUB_IDS.items():
        image = ("i2v" in hub_id.lower() and "ti2v" not in hub_id.lower()) or "FLF2V" in hub_id
        if "hunyuan" in hub_id.lower():
            family = "HunyuanVideo15" if "1.5" in hub_id else "HunyuanVideo"
            kind = f"{family}ImageToVideoPipeline" if image else f"{family}Pipeline"
        elif "CogVideoX" in hub_id:
            kind = "CogVideoXImageToVideoPipeline" if image else "CogVideoXPipeline"
        elif "Cosmos" in hub_id:
            kind = "Cosmos2_5_PredictBasePipeline"
        elif "LTX" in hub_id:
            kind = "LTX2Pipeline" if "LTX-2" in hub_id else "LTXConditionPipeline"
        elif "SkyReels" in hub_id:
            kind = "SkyReelsV2" + "DiffusionForcing" * ("-DF-" in hub_id) + "ImageToVideo" * image + "Pipeline"
        elif "VACE" in hub_id or "ChronoEdit" in hub_id:
            kind = "WanVACEPipeline" if "VACE" in hub_id else "ChronoEditPipeline"
        else:
            kind = "WanImageToVideoPipeline" if image else "WanPipeline"
        index = {"_class_name": kind, "expand_timesteps": "TI2V-5B" in hub_id}
        if "A14B" in hub_id:
            index["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
        check_preset(preset, index, hub_id)
        check_distilled(preset, preset, hub_id)


def test_a_base_model_is_not_sampled_as_a_distilled_one(t2v, tmp_path):
    base = tmp_path / "Wan2.1-T2V-1.3B-Diffusers"
    shutil.copytree(t2v, base)
    with pytest.raises(
        InputError, match=r"4step .4 steps, .* is not for \S+, a model that is known to want wan2.1-t2v"
    ):
        load_reasoner(base, preset=FOUR_STEPS)
    file = write_lora(tmp_path / "lora.safetensors", lora_of(t2v / "transformer"), "comfyui")
    assert load_reasoner(base, preset=FOUR_STEPS, few_step_lora=file).settings == PRESETS[FOUR_STEPS]
    other = str(t2v / "transformer")
    assert load_reasoner(base, preset=FOUR_STEPS, transformer=other).settings == PRESETS[FOUR_STEPS]
    with notices() as told:
        taken = load_reasoner(base, transformer=other)
    assert taken.settings == PRESETS["wan2.1-t2v-480p"] and "wan2.1-t2v-480p" in taken.notes["sampling"]
    assert len(told) == 1 and "how" in told[0] and "assumed" in told[0]
    (base / "reasoner.json").write_text("{}")  # somebody has said how
    assert load_reasoner(base, preset=FOUR_STEPS).settings == PRESETS[FOUR_STEPS]
    distilled = tmp_path / "FastWan2.1-T2V-1.3B-Diffusers"
    shutil.copytree(t2v, distilled)
    with pytest.raises(InputError, match=r"wan2.1-t2v-480p .50 steps, .*guidance 5. is not for"):
        load_reasoner(distilled, preset="wan2.1-t2v-480p")


def test_what_is_assumed_of_an_unknown_model_is_told_and_noted(t2v, tmp_path):
    with notices() as told:
        reasoner = load_reasoner(t2v)
    assert reasoner.settings == SamplerSettings()
    assert reasoner.notes == {"sampling": "assumed: 4 steps, renoise, shift 1, no guidance"}
    assert told == [f"how {t2v} is to be sampled is not known; {reasoner.notes['sampling']} (--preset says it)"]
    file = write_lora(tmp_path / "lora.safetensors", lora_of(t2v / "transformer"), "musubi")
    with notices() as told:
        assert load_reasoner(t2v, preset="wan2.1-t2v-480p").notes == {}
        load_reasoner(t2v, preset="wan2.1-t2v-480p", few_step_lora=file)
    assert told == ["few_step_lora with 50 steps, euler, shift 3, guidance 5, as base models are sampled"]


def test_presets_that_a_hunyuan_config_speaks_against(tmp_path):
    directory = tiny_hunyuan_pipeline(tmp_path / "model", "HunyuanVideo15ImageToVideoPipeline")
    config = json.loads((directory / "transformer" / "config.json").read_text())
    step, base = "hunyuan-video-1.5-480p-i2v-step-distilled", "hunyuan-video-1.5-480p"
    right, wrong = (step, base) if config["use_meanflow"] else (base, step)
    assert load_reasoner(directory, preset=right).notes == {}
    guider = directory / "guider" / "guider_config.json"
    unguided = guider.read_text()
    guider.write_text(json.dumps(json.loads(unguided) | {"guidance_scale": 6.0 if wrong == base else 1.0}))
    with pytest.raises(InputError, match="use_meanflow in its config"):
        load_reasoner(directory, preset=wrong)
    guider.write_text(unguided)
    config["target_size"] = 960
    (directory / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"for another size than .*, a 720p model by its config"):
        load_reasoner(directory, preset=right)
