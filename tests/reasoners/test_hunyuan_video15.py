"""The HunyuanVideo-1.5 Reasoner against diffusers' own pipelines and scheduler."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from PIL import Image
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from tests.other_device import other_device
from tests.reasoners.checks import check_kept_levels, one_update
from tests.reasoners.tiny_hunyuan import SIZE, tiny_hunyuan_pipeline
from tests.tiny_pair import tiny_decoder
from tests.tiny_teacher import tiny_qwen3_vl
from vlmteacher import InputError, TeacherPipeline
from vlmteacher.decoders.taehv import load_decoder
from vlmteacher.lora.adapter import add_lora, export_lora, lora_parameters
from vlmteacher.lora.formats import read_lora
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.reasoners.presets import PRESETS
from vlmteacher.reasoners.sampling import SamplerSettings

PROMPT = 'Move the red ball to the box that says "here" and "there".'
STEPS = SamplerSettings(timesteps=(1000, 500), shift=7.0, sampler="euler", max_sequence_length=1000)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The step-distilled image-to-video model."""
    return tiny_hunyuan_pipeline(tmp_path_factory.mktemp("hunyuan"))


@pytest.fixture()
def reasoner(directory):
    return load(directory)


def load(directory):
    reasoner = load_reasoner(directory)
    reasoner.settings = STEPS
    return reasoner


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))


def instance(reasoner, image, seed=0, prompt=PROMPT):
    condition = reasoner.encode(prompt, image, *SIZE)
    return condition, reasoner.noise(condition, torch.Generator().manual_seed(seed))


def stock(kind, directory, guidance_scale=1.0, **given):
    pipe = kind.from_pretrained(directory, guider=ClassifierFreeGuidance(guidance_scale=guidance_scale))
    pipe.set_progress_bar_config(disable=True)
    return pipe(num_frames=SIZE[0], num_inference_steps=2, output_type="pt", **given).frames[0]


@pytest.mark.parametrize("meanflow, prompt", [(True, PROMPT), (False, "no quoted words")])
def test_same_video_of_an_image_as_the_diffusers_pipeline(tmp_path, image, meanflow, prompt):
    """Covers three encoders, known latents and mask, shift, the next level of a step; diffusers' with padding."""
    directory = tiny_hunyuan_pipeline(tmp_path, meanflow=meanflow)
    reasoner = load(directory)
    condition, noise = instance(reasoner, image, prompt=prompt)
    ours = reasoner.decode(reasoner.sample(condition, noise))
    theirs = stock(HunyuanVideo15ImageToVideoPipeline, directory, prompt=prompt, image=image, latents=noise.z1)
    assert ours.shape == (5, 3, 64, 64) and ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_same_video_of_a_prompt_as_the_diffusers_pipeline(tmp_path):
    directory = tiny_hunyuan_pipeline(tmp_path, "HunyuanVideo15Pipeline", meanflow=False)
    reasoner = load(directory)
    guided = reasoner.with_sampling(guidance_scale=3.0, negative_prompt="blurred")
    condition, noise = instance(guided, None)
    ours = guided.decode(guided.sample(condition, noise))
    theirs = stock(
        HunyuanVideo15Pipeline,
        directory,
        guidance_scale=3.0,
        prompt=PROMPT,
        negative_prompt="blurred",
        height=64,
        width=64,
        latents=noise.z1,
    )
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert (reasoner.decode(reasoner.sample(*instance(reasoner, None))) - ours).abs().max() > 1e-3  # without guidance


def test_guided_mean_velocity(reasoner, image, directory):
    guided = reasoner.with_sampling(guidance_scale=3.0, negative_prompt="blurred")
    condition, noise = instance(guided, image)
    ours = guided.decode(guided.sample(condition, noise))
    theirs = stock(
        HunyuanVideo15ImageToVideoPipeline,
        directory,
        guidance_scale=3.0,
        prompt=PROMPT,
        negative_prompt="blurred",
        image=image,
        latents=noise.z1,
    )
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_one_step_prediction_is_one_euler_step_to_zero(directory, reasoner, image):
    """Against the stock transformer with stock attention, for the mean velocity from 1 to 0."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(sigmas=[1.0])
    (t,) = scheduler.timesteps
    condition, noise = instance(reasoner, image)
    inputs = dict(condition.inputs)
    transformer = HunyuanVideo15Transformer3DModel.from_pretrained(directory / "transformer")
    x = torch.cat([noise.z1, inputs.pop("known_latents")], 1)

    def step(until):
        u = transformer(
            x,
            t.expand(1),
            condition.prompt_embeds,
            timestep_r=torch.full((1,), until),
            return_dict=False,
            **inputs,
        )[0]
        return scheduler.step(u, t, noise.z1, return_dict=False)[0]

    with torch.no_grad():
        ours = reasoner.predict_clean(condition, noise)
        torch.testing.assert_close(ours, step(0.0), atol=1e-5, rtol=1e-5)
        assert (ours - noise.z1).abs().mean() > 0.01
        scheduler._step_index = None
        assert not torch.allclose(ours, step(500.0), atol=1e-4)  # the level it goes to matters


def test_the_image_comes_in_as_known_latents(reasoner, image):
    condition, _ = instance(reasoner, image)
    frame = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, :, None] / 255 * 2 - 1
    known = condition.inputs["known_latents"]
    expected = reasoner.vae.encode(frame).latent_dist.mode() * reasoner.vae.config.scaling_factor
    torch.testing.assert_close(known[:, :-1, :1], expected)
    assert known[:, -1, 0].eq(1).all() and known[:, :, 1:].eq(0).all()


def test_attention_keeps_no_mask(reasoner, image):
    """The stock attention keeps a mask of (video and text tokens)^2 in every block."""
    add_lora(reasoner.transformer, rank=2, seed=0)
    condition, noise = instance(reasoner, image)
    text = [condition.prompt_embeds, condition.inputs["encoder_hidden_states_2"], condition.inputs["image_embeds"]]
    joint = noise.z1[0, 0].numel() + sum(x.shape[1] for x in text)

    def masks_kept():
        saved = []
        with saved_tensors_hooks(lambda x: (saved.append(x.shape[-2:]), x)[1], lambda x: x):
            reasoner.predict_clean(condition, noise)
        return saved.count((joint, joint))

    assert masks_kept() == 0
    del reasoner.transformer.forward
    for block in reasoner.transformer.transformer_blocks:
        block.attn.set_processor(HunyuanVideo15AttnProcessor2_0())
    assert masks_kept() >= 2


def test_it_can_be_traced(reasoner, image):
    """No operation of the prediction reads a tensor's values: fake tensors, which have none, pass."""
    condition, noise = instance(reasoner, image)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = {name: mode.from_tensor(value) for name, value in condition.inputs.items()}
        condition = replace(condition, prompt_embeds=mode.from_tensor(condition.prompt_embeds), inputs=inputs)
        fake = reasoner.predict_clean(condition, replace(noise, z1=mode.from_tensor(noise.z1)))
    assert fake.shape == noise.z1.shape


def test_gradient_reaches_every_lora_b(reasoner, image):
    add_lora(reasoner.transformer, rank=4, seed=0)
    condition, noise = instance(reasoner, image)
    (reasoner.predict_clean(condition, noise) ** 2).sum().backward()
    found = {n: p.grad for n, p in reasoner.transformer.named_parameters() if "lora_B" in n}
    last = len(reasoner.transformer.transformer_blocks) - 1  # what it makes of the text is read by nobody
    unread = tuple(f"transformer_blocks.{last}.{x}" for x in ("attn.add_q_proj", "attn.to_add_out", "ff_context"))
    used = {name for name, grad in found.items() if grad is not None and grad.abs().max() > 0}
    assert len(found) == 24 and used == {name for name in found if not name.startswith(unread)}


def test_what_the_blocks_keep_changes_no_bit(reasoner, image):
    check_kept_levels(reasoner, *instance(reasoner, image))


def test_bfloat16(directory, reasoner, image):
    """Latents and LoRA stay float32."""
    low = load_reasoner(directory, torch.bfloat16)
    low.settings = STEPS
    add_lora(low.transformer, rank=2, seed=0)
    condition, noise = instance(low, image)
    z0 = low.predict_clean(condition, noise)
    z0.square().mean().backward()
    with torch.no_grad():
        expected = reasoner.predict_clean(*instance(reasoner, image))
    assert z0.dtype == torch.float32 and (z0 - expected).abs().mean() < 0.02
    assert all(p.grad is None or p.grad.isfinite().all() for p in low.transformer.parameters())


@pytest.mark.slow
def test_one_update_of_the_whole_pipeline(directory, tmp_path, image):
    """On the CPU, and on another device with offloading."""
    models = (
        directory,
        tiny_qwen3_vl(tmp_path / "teacher"),
        tiny_decoder(tmp_path / "decoder.safetensors", space_upscale=(True,) * 3),
    )

    def update(pipe):
        pipe.reasoner.settings = STEPS
        return one_update(pipe, PROMPT, image, SIZE)

    out = update(TeacherPipeline.from_pretrained(*models))
    change = (out.frames - out.frames_before).abs().max()
    assert out.updates == 1 and out.history[0]["grad_norm"] > 0
    assert out.frames.shape == (5, 3, 64, 64) and change > 1e-3

    pipe = TeacherPipeline.from_pretrained(*models, offload=True)
    with other_device():
        pipe.to("meta")
        there = update(pipe).frames.to("cpu")
    assert (there - out.frames).abs().max() < 0.02 * change


def test_large_frames_are_decoded_in_tiles(reasoner):
    latents = torch.randn(1, 8, 1, 20, 4, generator=torch.Generator().manual_seed(0))
    tiled = reasoner.decode(latents)
    reasoner.vae.disable_tiling()
    whole = reasoner.decode(latents)
    assert tiled.shape == whole.shape == (1, 3, 320, 64) and not torch.equal(tiled, whole)


@pytest.mark.parametrize(
    "size, said",
    [
        ((6, 64, 64), "num_frames must be 4k .* not 6: the nearest are 5 and 9"),
        ((5, 72, 64), "height must be a multiple of 16, not 72: the nearest are 64 and 80"),
    ],
)
def test_sizes_it_cannot_take(reasoner, image, size, said):
    with pytest.raises(InputError, match=said):
        reasoner.encode(PROMPT, image, *size)


def test_bad_input(directory, reasoner, image, tmp_path):
    with pytest.raises(InputError, match="prompt is empty"):
        reasoner.encode("", image, *SIZE)
    with pytest.raises(InputError, match="give the first frame"):
        reasoner.encode(PROMPT, None, *SIZE)
    text_only = load(tiny_hunyuan_pipeline(tmp_path / "text", "HunyuanVideo15Pipeline"))
    with pytest.raises(InputError, match="takes no image"):
        text_only.encode(PROMPT, image, *SIZE)
    copy = shutil.copytree(directory, tmp_path / "copy")
    shutil.rmtree(copy / "image_encoder")
    with pytest.raises(InputError, match="is the copy complete"):
        load_reasoner(copy)
    shutil.rmtree(copy / "vae")
    AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1).save_pretrained(
        copy / "vae"
    )
    with pytest.raises(InputError, match="takes 17 channels, with its VAE it would be given 9"):
        load_reasoner(copy)


def test_parts_that_cannot_be_read(directory, tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({"x": torch.ones(1)}, file)
    with pytest.raises(InputError, match="no single file of a HunyuanVideo15Transformer3DModel: give a directory"):
        load_reasoner(directory, transformer=str(file))
    file.rename(tmp_path / "weights.bin")
    preset = "hunyuan-video-1.5-480p-i2v-step-distilled"
    for name, message in (("weights.bin", "is no .safetensors file"), ("none.safetensors", "is no file")):
        with pytest.raises(InputError, match=f"{name} {message}"):
            load_reasoner(directory, few_step_lora=str(tmp_path / name), preset=preset)


@pytest.mark.parametrize("style", ["diffusers", "comfyui", "musubi"])
def test_a_few_step_lora_is_in_the_weights(directory, reasoner, image, tmp_path, style):
    """diffusers has no LoRA loader for this pipeline."""
    add_lora(reasoner.transformer, rank=4, alpha=2.0, seed=0)
    with torch.no_grad():
        for parameter in lora_parameters(reasoner.transformer):
            parameter += 0.1
    file = tmp_path / "few_step.safetensors"
    file.write_bytes(read_lora(export_lora(reasoner.transformer)).to_bytes(style))
    merged = load_reasoner(directory, few_step_lora=str(file), preset="hunyuan-video-1.5-480p-i2v-step-distilled")
    condition, noise = instance(reasoner, image)
    with torch.no_grad():
        ours, expected = (each.velocity(condition, noise.z1, 1.0) for each in (merged, reasoner))
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    assert not any("lora" in name for name, _ in merged.transformer.named_parameters())


def test_another_transformer_and_its_preset(directory, tmp_path):
    """A directory with the name of a hub model gets that model's preset."""
    name = "HunyuanVideo-1.5-Diffusers-480p_i2v_step_distilled"
    other = shutil.copytree(directory / "transformer", tmp_path / name / "transformer")
    reasoner = load_reasoner(directory, transformer=str(other.parent))
    assert reasoner.settings.sigmas[1] == pytest.approx(7 * 0.875 / (1 + 6 * 0.875))
    assert (len(reasoner.settings.timesteps), reasoner.settings.sampler, reasoner.width) == (8, "euler", 848)


def test_settings_of_a_checkpoint_of_unknown_name(directory, tmp_path):
    distilled, base = load_reasoner(directory).settings, load_reasoner(tiny_hunyuan_pipeline(tmp_path, meanflow=False))
    assert distilled == PRESETS["hunyuan-video-1.5-480p-i2v-step-distilled"]
    shift, guidance = {"shift": 7.0}, {"guidance_scale": 1.0}  # of this scheduler and this guider
    assert base.settings == replace(PRESETS["hunyuan-video-1.5-480p"], **shift, **guidance)


def guided_by(directory: Path, to: Path, **entries: Any) -> Path:
    """A copy of a pipeline with other entries in its guider's config."""
    copy = Path(shutil.copytree(directory, to))
    file = copy / "guider/guider_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return copy


@pytest.mark.parametrize(
    "entries, scale",
    [
        ({"guidance_scale": 6.0}, 6.0),
        ({"guidance_scale": 6.0, "enabled": False}, 1.0),
        ({"guidance_scale": 5.0, "use_original_formulation": True}, 6.0),
        ({"_class_name": "AdaptiveProjectedGuidance"}, r"is a 'AdaptiveProjectedGuidance', and only"),
        ({"guidance_rescale": 0.7}, r"says guidance_rescale 0\.7"),
        ({"stop": 0.5}, r"says stop 0\.5"),
        ({"guidance_scale": "6"}, "guidance_scale must be a number, not '6'"),
    ],
)
def test_the_guider_of_a_checkpoint_of_unknown_name(directory, tmp_path, entries, scale):
    copy = guided_by(directory, tmp_path / "copy", **entries)
    if isinstance(scale, float):
        assert load_reasoner(copy).settings.guidance_scale == scale
    else:
        with pytest.raises(InputError, match=scale):
            load_reasoner(copy)


def test_the_original_formulation_of_guidance(tmp_path):
    """diffusers' pipeline makes the same video by it."""
    made = tiny_hunyuan_pipeline(tmp_path / "made", "HunyuanVideo15Pipeline", meanflow=False)
    directory = guided_by(made, tmp_path / "copy", guidance_scale=2.0, use_original_formulation=True)
    reasoner = load_reasoner(directory)
    reasoner.settings = replace(STEPS, guidance_scale=reasoner.settings.guidance_scale)
    condition, noise = instance(reasoner, None)
    pipe = HunyuanVideo15Pipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt": PROMPT, "height": 64, "width": 64, "latents": noise.z1}
    theirs = pipe(num_frames=SIZE[0], num_inference_steps=2, output_type="pt", **given).frames[0]
    torch.testing.assert_close(reasoner.decode(reasoner.sample(condition, noise)), theirs, atol=2e-5, rtol=0)


def test_a_preset_against_the_guider(directory, tmp_path):
    """A preset without guidance on a model that wants it, and the reverse; another kind of guider is not compared."""
    guided = guided_by(directory, tmp_path / "guided", guidance_scale=6.0)
    step = "hunyuan-video-1.5-480p-i2v-step-distilled"
    with pytest.raises(InputError, match=r"is without guidance, and the guider of .* says a guidance of 6"):
        load_reasoner(guided, preset=step)
    plain = tiny_hunyuan_pipeline(tmp_path / "plain", meanflow=False)  # whose guider says 1
    with pytest.raises(InputError, match=r"is with guidance, and the guider of .* says none"):
        load_reasoner(plain, preset="hunyuan-video-1.5-480p")
    other = guided_by(directory, tmp_path / "other", _class_name="AdaptiveProjectedGuidance")
    assert load_reasoner(other, preset=step).settings == PRESETS[step]


def test_decoders_of_its_latents(reasoner, tmp_path):
    layout = {"space_upscale": (True,) * 3}
    plain = load_decoder(tiny_decoder(tmp_path / "taehv1_5.safetensors", **layout), reasoner)
    assert plain.latents_std is None  # takes what the transformer sees
    light = load_decoder(tiny_decoder(tmp_path / "lighttaehy1_5.safetensors", **layout), reasoner)
    torch.testing.assert_close(light.latents_std, reasoner.latents_std)  # takes the VAE's own
    torch.testing.assert_close(light.latents_mean, reasoner.latents_mean)
    with pytest.raises(InputError, match="latents of 16 channels, but the Reasoner's have 8"):
        load_decoder(tiny_decoder(tmp_path / "taew2_1.safetensors", 16, **layout), reasoner)
