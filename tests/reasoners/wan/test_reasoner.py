"""The Wan Reasoner against diffusers' own pipelines and scheduler."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline

from tests.tiny_models import TINY_SETTINGS, tiny_wan_pipeline
from vlmteacher.errors import InputError
from vlmteacher.lora.adapter import add_lora, lora_parameters
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.reasoners.sampling import SamplerSettings
from vlmteacher.reasoners.wan.reasoner import clean_prompt

PROMPT = "Move the red  ball to the green &amp; square."
SIZE = (5, 32, 48)


def instance(reasoner, image=None, seed=0):
    condition = reasoner.encode(PROMPT, image, *SIZE)
    return condition, reasoner.noise(condition, torch.Generator().manual_seed(seed))


def test_settings_of_the_directory(reasoner):
    assert (reasoner.num_frames, reasoner.height, reasoner.width, reasoner.fps) == (5, 32, 48, 8.0)
    assert (reasoner.latent_channels, reasoner.temporal_stride, reasoner.spatial_stride) == (8, 4, 8)
    assert reasoner.settings.sigmas == (1.0, 0.75, 0.5, 0.25)
    assert SamplerSettings(shift=5.0).sigmas == pytest.approx((1.0, 15 / 16, 5 / 6, 5 / 8))
    assert SamplerSettings().timesteps == (1000, 750, 500, 250) and SamplerSettings().num_frames == 89


@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
def test_same_video_as_the_diffusers_pipeline(directory, image, with_image):
    """Covers prompt and image encoding, per-token timesteps, sampler and VAE at once.

    FlowMatchEuler with stochastic_sampling predicts x0 and renoises, drawing from torch's global generator.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, shift=3.0)
    scheduler.set_timesteps(3)
    reasoner = load_reasoner(directory)
    reasoner.settings = SamplerSettings(timesteps=tuple(scheduler.timesteps.tolist()), max_sequence_length=12)
    condition, noise = instance(reasoner, image if with_image else None, seed=7)
    ours = reasoner.decode(reasoner.sample(condition, noise))

    given = {"image": image} if with_image else {}
    kind = WanImageToVideoPipeline if with_image else DiffusionPipeline
    pipe = kind.from_pretrained(directory, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(7)
    z1 = torch.randn(noise.z1.shape)
    theirs = pipe(
        prompt=PROMPT,
        num_frames=5,
        height=32,
        width=48,
        num_inference_steps=3,
        guidance_scale=1.0,
        latents=z1,
        max_sequence_length=12,
        output_type="pt",
        **given,
    ).frames[0]
    assert ours.shape == (5, 3, 32, 48) and ours.dtype == torch.float32
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_one_step_prediction_is_one_euler_step_to_zero(reasoner):
    condition, noise = instance(reasoner)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0])
    (t,) = scheduler.timesteps
    with torch.no_grad():
        u = reasoner.transformer(noise.z1, t.expand(1), condition.prompt_embeds, return_dict=False)[0]
        expected = scheduler.step(u, t, noise.z1, return_dict=False)[0]
        torch.testing.assert_close(reasoner.predict_clean(condition, noise), expected)
        assert (expected - noise.z1).abs().mean() > 0.01


def test_first_latent_frame_is_the_image(reasoner, image):
    condition, noise = instance(reasoner, image)
    frame = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, :, None] / 255 * 2 - 1
    latents = reasoner.vae.encode(frame).latent_dist.mode()
    mean, std = (
        torch.tensor(getattr(reasoner.vae.config, f"latents_{n}")).view(1, 8, 1, 1, 1) for n in ("mean", "std")
    )
    torch.testing.assert_close(condition.first_frame, (latents - mean) / std)
    with torch.no_grad():
        for z0 in (reasoner.predict_clean(condition, noise), reasoner.sample(condition, noise)):
            assert z0.shape == (1, 8, 2, 4, 6)
            assert torch.equal(z0[:, :, :1], condition.first_frame)
            assert not torch.equal(z0[:, :, 1:], noise.z1[:, :, 1:])


def test_z1_of_the_first_frame_does_not_matter_with_an_image(reasoner, image):
    condition, noise = instance(reasoner, image)
    other = type(noise)(noise.z1.clone(), noise.steps)
    other.z1[:, :, 0] = 9.0
    with torch.no_grad():
        assert torch.equal(reasoner.predict_clean(condition, noise), reasoner.predict_clean(condition, other))


def test_every_draw_follows_from_the_generator(reasoner, image):
    condition, noise = instance(reasoner, image, seed=3)
    _, again = instance(reasoner, image, seed=3)
    _, other = instance(reasoner, image, seed=4)
    assert len(noise.steps) == 3
    assert torch.equal(reasoner.sample(condition, noise), reasoner.sample(condition, again))
    torch.rand(5)  # the global generator has no part in it
    assert torch.equal(reasoner.sample(condition, noise), reasoner.sample(condition, again))
    assert not torch.equal(reasoner.sample(condition, noise), reasoner.sample(condition, other))
    draws = [noise.z1, *noise.steps]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_gradient_reaches_every_lora_b(reasoner, image):
    add_lora(reasoner.transformer, rank=4, seed=0)
    condition, noise = instance(reasoner, image)
    (reasoner.predict_clean(condition, noise) ** 2).sum().backward()
    for name, parameter in reasoner.transformer.named_parameters():
        if "lora_B" in name:
            assert parameter.grad.abs().sum() > 0, name
        elif "lora_A" not in name:
            assert parameter.grad is None, name
    assert len(lora_parameters(reasoner.transformer)) == 2 * 10 * 2


def test_text_only_with_one_timestep_equals_one_per_token(reasoner):
    condition, noise = instance(reasoner)
    tokens = torch.full((1, 2 * 2 * 3), 1000.0)
    with torch.no_grad():
        per_token = reasoner.transformer(noise.z1, tokens, condition.prompt_embeds, return_dict=False)[0]
        torch.testing.assert_close(reasoner.velocity(condition, noise.z1, 1.0), per_token, atol=1e-5, rtol=1e-5)


def test_an_image_of_another_size_is_resized(reasoner, image):
    condition, _ = instance(reasoner, image.resize((144, 96)).convert("RGBA"))
    assert condition.first_frame.shape == (1, 8, 1, 4, 6)
    with pytest.raises(InputError, match="the image is 20x70 pixels, the video 48x32: crop it"):
        instance(reasoner, image.resize((20, 70)))


def test_bfloat16_stays_near_float32(directory, image):
    half, full = load_reasoner(directory, torch.bfloat16), load_reasoner(directory)
    assert half.dtype == torch.bfloat16 and half.vae.dtype == torch.float32
    with torch.no_grad():
        a, b = (r.predict_clean(*instance(r, image)) for r in (half, full))
    assert a.dtype == torch.float32
    assert (a - b).norm() / b.norm() < 0.02


@pytest.mark.parametrize(
    "size, said",
    [
        ((12, 32, 48), "num_frames must be 4k .* not 12: the nearest are 9 and 13"),
        ((1, 32, 48), "nearest are 5 and 9"),
        ((5, 40, 48), "height must be a multiple of 16, not 40: the nearest are 32 and 48"),
        ((5, 32, 7), "width must be a multiple of 16, not 7: the nearest are 16 and 32"),
        ((5, 32, -16), "nearest are 16 and 32"),
    ],
)
def test_sizes_it_cannot_take(reasoner, size, said):
    with pytest.raises(InputError, match=said):
        reasoner.encode(PROMPT, None, *size)


def test_empty_prompt(reasoner):
    with pytest.raises(InputError, match="prompt is empty"):
        reasoner.encode(" \n", None, *SIZE)


def test_image_for_a_text_only_pipeline(tmp_path, image):
    reasoner = load_reasoner(tiny_wan_pipeline(tmp_path, expand_timesteps=False))
    with pytest.raises(InputError, match="takes no image"):
        reasoner.encode(PROMPT, image, *SIZE)


def test_prompt_cleaning_is_that_of_diffusers():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for text in ["  a\n\tb ", "&amp;lt;b&gt; caf\u00c3\u00a9", "“quoted”", PROMPT]:
        assert clean_prompt(text) == prompt_clean(text)


def test_not_a_pipeline(tmp_path):
    with pytest.raises(InputError, match="no diffusers pipeline: it has no model_index"):
        load_reasoner(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match="no diffusers pipeline index"):
        load_reasoner(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(InputError, match="is a FluxPipeline: the known Reasoners are WanPipeline, WanImageToVideo"):
        load_reasoner(tmp_path)


@pytest.mark.parametrize("name", ["no-such-owner/no-such-model", "./no/such/directory"])
def test_unknown_model_without_network(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(InputError, match="give a local directory"):
        load_reasoner(name)


def test_incomplete_or_unfit_pipelines(directory, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(InputError, match="is the copy complete"):
        load_reasoner(copy)
    weights = next((copy / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="is the copy complete"):
        load_reasoner(copy)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"timesteps": [900, 500]}, "fall from 1000"),
        ({"timesteps": [1000, 500, 500]}, "fall from 1000"),
        ({"steps": 4}, "unknown entry 'steps'"),
        ({"timesteps": 4}, "cannot be used"),
    ],
)
def test_bad_reasoner_json(tmp_path, change, said):
    (tmp_path / "reasoner.json").write_text(json.dumps(TINY_SETTINGS | change))
    with pytest.raises(InputError, match=said):
        SamplerSettings.load(tmp_path / "reasoner.json")
