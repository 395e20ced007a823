"""What is particular to the models that are Wan's relatives: VACE, SkyReels-V2, ChronoEdit, and to last frames."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.reasoners.checks import check_kept_levels, one_update
from tests.reasoners.tiny_checkpoints import HEIGHT, SIZE, WIDTH, changed
from tests.tiny_pair import PROMPT, tiny_decoder
from tests.tiny_teacher import tiny_qwen3_vl
from vlmteacher import InputError, TeacherPipeline
from vlmteacher.lora.adapter import add_lora, lora_state_dict
from vlmteacher.planning.models import build_reasoner
from vlmteacher.reasoners.few_step_lora import merge_few_step_loras
from vlmteacher.reasoners.loading import adopt_reasoner, load_reasoner
from vlmteacher.reasoners.presets import PRESETS, check_preset, known_preset
from vlmteacher.reasoners.sampling import SamplerSettings


def instance(reasoner, image=None, last_image=None):
    condition = reasoner.encode(PROMPT, image, *SIZE, last_image=last_image)
    return condition, reasoner.noise(condition, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["wan21_flf2v", "wan_vace", "skyreels_i2v", "skyreels_df", "chronoedit"])
def test_a_plan_has_the_shapes_of_an_instance(checkpoint, image, family):
    real, (meta, _) = load_reasoner(checkpoint(family)), build_reasoner(str(checkpoint(family)), torch.float32)
    last = image if family == "wan21_flf2v" else None
    encoded, blank = real.encode(PROMPT, image, *SIZE, last_image=last), meta.blank_condition(*SIZE)
    assert type(real) is type(meta) and encoded.inputs.keys() == blank.inputs.keys()
    assert (encoded.first_frame is None) == (blank.first_frame is None)
    for name, value in blank.inputs.items():
        found = encoded.inputs[name]
        clip = name == "encoder_hidden_states_image"  # whose tokens are those of the full-size model in a plan
        assert (found.shape[::2] if clip else found.shape) == (value.shape[::2] if clip else value.shape)
        assert found.dtype == value.dtype


@pytest.mark.parametrize("family", ["wan_vace", "skyreels_df", "chronoedit"])
def test_what_the_blocks_keep_changes_no_bit(checkpoint, image, family):
    reasoner = load_reasoner(checkpoint(family))
    check_kept_levels(reasoner, *instance(reasoner, image))


@pytest.mark.parametrize("family", ["wan_vace", "skyreels_df", "skyreels_i2v", "chronoedit"])
def test_a_loaded_pipeline_is_adopted(checkpoint, image, family):
    pipeline = DiffusionPipeline.from_pretrained(checkpoint(family))
    adopted, loaded = adopt_reasoner(pipeline), load_reasoner(checkpoint(family))
    with torch.no_grad():
        a, b = (reasoner.predict_clean(*instance(reasoner, image)) for reasoner in (adopted, loaded))
    assert torch.equal(a, b) and adopted.transformer is pipeline.transformer


# ---------------------------------------------------------------- last frames


def test_who_takes_a_last_frame(checkpoint, image):
    takes = {
        "wan21_t2v": False,
        "wan21_i2v": False,  # CLIP's features of a second image would be taken for text
        "wan21_flf2v": True,
        "wan22_ti2v": False,
        "wan22_i2v_a14b": True,
        "wan_vace": True,
        "skyreels_i2v": False,
        "skyreels_df": True,
        "chronoedit": False,
    }
    for family, expected in takes.items():
        reasoner = load_reasoner(checkpoint(family))
        assert reasoner.takes_last_image == expected, family
        if not expected:
            with pytest.raises(InputError, match="takes no last frame"):
                reasoner.encode(PROMPT, image, *SIZE, last_image=image)
    flf2v = load_reasoner(checkpoint("wan21_flf2v"))
    with pytest.raises(InputError, match=r"needs a last frame .it is a first-and-last-frame model.: give last_image"):
        flf2v.encode(PROMPT, image, *SIZE)
    with pytest.raises(InputError, match="needs an image"):
        flf2v.encode(PROMPT, None, *SIZE, last_image=image)


@pytest.mark.parametrize("family", ["wan21_flf2v", "wan22_i2v_a14b"])
def test_the_last_frame_is_the_masks_last_channel(checkpoint, image, family):
    reasoner = load_reasoner(checkpoint(family))
    condition, noise = instance(reasoner, image, image.rotate(180))
    mask = condition.inputs["image_latents"][0, :4, :, 0, 0]
    assert mask.T.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    other, _ = instance(reasoner, image, image)
    with torch.no_grad():
        a, b = (reasoner.predict_clean(c, noise) for c in (condition, other))
    assert (a - b).abs().max() > 1e-3


def test_a_vace_model_is_optimised_with_both_frames(checkpoint, image, tmp_path):
    """The LoRA is on the blocks, not on the control branch, which has no part in the backward."""
    models = checkpoint("wan_vace"), tiny_qwen3_vl(tmp_path / "teacher"), tiny_decoder(tmp_path / "decoder.safetensors")
    pipe = TeacherPipeline.from_pretrained(*models)
    pipe.reasoner.settings = SamplerSettings((1000, 500))
    out = one_update(pipe, PROMPT, image, SIZE, last_image=image.rotate(180))
    assert out.updates == 1 and out.history[0]["grad_norm"] > 0
    assert (out.frames - out.frames_before).abs().max() > 1e-3

    reasoner = pipe.reasoner
    condition, noise = instance(reasoner, image)
    add_lora(reasoner.transformer, rank=2, seed=0)
    layers = {name.partition(".lora_")[0] for name in lora_state_dict(reasoner.transformer)}
    assert len(layers) == 2 * 10 and all(name.startswith("blocks.") for name in layers)
    seen = []
    hook = reasoner.transformer.vace_blocks[0].register_forward_hook(lambda *args: seen.extend(args[2]))
    reasoner.predict_clean(condition, noise).sum().backward()
    hook.remove()
    assert len(seen) == 2 and not any(each.requires_grad for each in seen)


def test_the_mask_of_a_vace_model_is_that_of_the_middle_of_a_latent_frame(checkpoint, image):
    reasoner = load_reasoner(checkpoint("wan_vace"))
    control = reasoner.encode(PROMPT, image, 9, HEIGHT, WIDTH).inputs["control_hidden_states"]
    assert control.shape == (1, 2 * 8 + 64, 3, 4, 6) and bool((control[:, 16:] == 1).all())
    grey = reasoner.encode(PROMPT, None, 9, HEIGHT, WIDTH).inputs["control_hidden_states"]
    assert torch.equal(control[:, 8:], grey[:, 8:]) and not torch.equal(control[:, :8], grey[:, :8])
    assert torch.equal(grey[:, :8], grey[:, 8:16])


def test_a_lora_of_the_base_model_is_merged_into_a_vace_models_blocks(checkpoint):
    """LightX2V's few-step LoRA for text-to-video."""
    from vlmteacher.lora.formats import Factors, LoRA

    reasoner = load_reasoner(checkpoint("wan_vace"), preset="wan2.1-vace-lightx2v-4step")
    before = {name: value.clone() for name, value in reasoner.transformer.state_dict().items()}
    layer = "blocks.1.attn1.to_q"
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    merge_few_step_loras(reasoner, {"transformer": LoRA({layer: Factors(a, b, 2.0)})}, partial=False)
    after = reasoner.transformer.state_dict()
    differing = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert differing == {f"{layer}.weight"}
    torch.testing.assert_close(after[f"{layer}.weight"], before[f"{layer}.weight"] + b @ a)


# ---------------------------------------------------------------- SkyReels-V2, ChronoEdit


def test_diffusion_forcing_has_a_timestep_for_each_latent_frame(checkpoint, image):
    reasoner = load_reasoner(checkpoint("skyreels_df"))
    condition, noise = instance(reasoner, image, image.rotate(180))
    assert condition.first_frame.shape == condition.inputs["last_frame"].shape == (1, 8, 1, 4, 6)
    seen = []
    reasoner.transformer.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    with torch.no_grad():
        velocity = reasoner.velocity(condition, noise.z1, 0.7777)
        slow = reasoner.with_sampling(fps=16.0)
        other = slow.velocity(condition, noise.z1, 0.7777)
    assert seen[0]["timestep"].tolist() == [[0, 777, 0]] and seen[0]["hidden_states"].shape[2] == 3
    assert velocity.shape == noise.z1.shape and [given["fps"] for given in seen] == [[1], [0]]
    assert not torch.equal(velocity, other)


def test_models_that_are_refused(checkpoint, tmp_path):
    for family, file, entries, said in (
        ("skyreels_df", "transformer/config.json", {"num_frame_per_block": 2}, "2 latent frames one after the other"),
        ("skyreels_df", "model_index.json", {"_class_name": "SkyReelsV2Pipeline"}, "diffusion-forcing pipelines alone"),
    ):
        copy = changed(checkpoint(family), tmp_path / f"{family}{len(entries)}{len(file)}", file, **entries)
        with pytest.raises(InputError, match=said) as caught:
            load_reasoner(copy)
        assert "\n" not in str(caught.value)
    copy = changed(checkpoint("wan_vace"), tmp_path / "control", "transformer/config.json", vace_in_channels=96)
    with pytest.raises(InputError, match="takes a control of 96 channels, and its VAE makes 80"):
        build_reasoner(str(copy))
    v2v = {"_class_name": "SkyReelsV2DiffusionForcingVideoToVideoPipeline"}
    copy = changed(checkpoint("skyreels_df"), tmp_path / "v2v", "model_index.json", **v2v)
    with pytest.raises(InputError, match="is a SkyReelsV2DiffusionForcingVideoToVideoPipeline: the known Reasoners"):
        load_reasoner(copy)


def test_what_cannot_be_trained(checkpoint):
    load_reasoner(checkpoint("skyreels_t2v")).check_trainable()
    for family in ("wan_vace", "skyreels_df", "skyreels_i2v", "chronoedit", "wan21_flf2v"):
        with pytest.raises(InputError, match="cannot be trained"):
            load_reasoner(checkpoint(family)).check_trainable()


def test_chronoedit_makes_five_frames(checkpoint, image):
    reasoner = load_reasoner(checkpoint("chronoedit"))
    for frames in (1, 9, 29):
        with pytest.raises(InputError, match=f"num_frames must be 5 for ChronoEdit, .*, not {frames}"):
            reasoner.encode(PROMPT, image, frames, HEIGHT, WIDTH)
    assert {PRESETS[name].num_frames for name in PRESETS if name.startswith("chronoedit")} == {5}


@pytest.mark.parametrize(
    "preset, kind, said",
    [
        ("wan2.1-flf2v-720p", "WanPipeline", "models that are given an image"),
        ("wan2.1-vace-480p", "WanPipeline", "Wan VACE models"),
        ("skyreels-v2-df-720p", "SkyReelsV2ImageToVideoPipeline", "models of diffusion forcing"),
        ("skyreels-v2-i2v-540p", "SkyReelsV2Pipeline", "models that are given an image"),
        ("skyreels-v2-t2v-720p", "WanPipeline", "SkyReels-V2 models"),
        ("chronoedit-14b", "WanImageToVideoPipeline", "ChronoEdit models"),
    ],
)
def test_presets_of_other_models(preset, kind, said):
    with pytest.raises(InputError, match=f"preset {preset} is for {said}, which"):
        check_preset(preset, {"_class_name": kind}, "the model")


def test_presets(checkpoint):
    for family, preset in (("wan_vace", "wan2.1-vace-480p"), ("skyreels_t2v", "skyreels-v2-t2v-540p")):
        assert load_reasoner(checkpoint(family)).settings == PRESETS[preset]
    assert load_reasoner(checkpoint("chronoedit")).settings == PRESETS["chronoedit-14b"]
    with pytest.raises(InputError, match=r"preset wan2.1-flf2v-720p is for models that need a last frame"):
        load_reasoner(checkpoint("wan21_i2v"), preset="wan2.1-flf2v-720p")
    assert load_reasoner(checkpoint("wan21_flf2v"), preset="wan2.1-flf2v-720p").settings.shift == 16
    assert known_preset("Skywork/SkyReels-V2-I2V-14B-720P-Diffusers") == PRESETS["skyreels-v2-i2v-720p"]
    assert known_preset("Wan-AI/Wan2.1-VACE-14B-diffusers") == PRESETS["wan2.1-vace-720p"]
