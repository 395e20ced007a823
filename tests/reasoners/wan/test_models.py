"""Each Wan model in its hub layout: the same video as its own diffusers pipeline, and a LoRA that can be trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

from tests.reasoners import tiny_checkpoints
from tests.reasoners.tiny_checkpoints import FRAMES, HEIGHT, SIZE, WIDTH
from vlmteacher.errors import InputError
from vlmteacher.lora.adapter import add_lora
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.reasoners.sampling import SamplerSettings
from vlmteacher.reasoners.wan.reasoner import WanReasoner

PROMPT, NEGATIVE = "move the red ball to the box", "green square"
FAMILIES = ("wan21_t2v", "wan21_i2v", "wan22_ti2v", "wan22_t2v_a14b", "wan22_i2v_a14b")
IMAGE_FAMILIES = ("wan21_i2v", "wan22_ti2v", "wan22_i2v_a14b")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Directories of checkpoints by family, each written once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = getattr(tiny_checkpoints, family)(tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def load(directory: Path, **settings: Any) -> WanReasoner:
    reasoner = load_reasoner(directory)
    reasoner.settings = SamplerSettings(**settings)
    return reasoner


def instance(reasoner, image, seed=0):
    condition = reasoner.encode(PROMPT, image, *SIZE)
    return condition, reasoner.noise(condition, torch.Generator().manual_seed(seed))


def diffusers_video(directory: Path, scheduler: Any, image: Image.Image | None, shape: Any, seed: int, **call: Any):
    """Frames (F, 3, H, W) of the checkpoint's own pipeline class; TI2V-5B with an image needs the other class.

    The scheduler draws from the global generator, as z1 of `shape` is drawn here.
    """
    kind = DiffusionPipeline
    if image is not None:
        from diffusers import WanImageToVideoPipeline as kind
    pipe = kind.from_pretrained(directory, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(seed)
    z1 = torch.randn(shape)
    given = {} if image is None else {"image": image}
    return pipe(
        **given,
        prompt=PROMPT,
        num_frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        latents=z1,
        output_type="pt",
        **call,
    ).frames[0]


@pytest.mark.parametrize("sampler", ["renoise", "euler"])
@pytest.mark.parametrize("family", [*FAMILIES, "wan22_ti2v with image"])
def test_same_video_as_the_diffusers_pipeline(checkpoint, image, family, sampler):
    """Covers text, image channels, CLIP's features, experts and their guidance, sampler and VAE at once."""
    family, _, with_image = family.partition(" ")
    image = image if with_image or family in ("wan21_i2v", "wan22_i2v_a14b") else None
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=sampler == "renoise", shift=3.0)
    scheduler.set_timesteps(4)
    guidance = {"guidance_scale": 3.0, "negative_prompt": NEGATIVE} if sampler == "euler" else {"guidance_scale": 1.0}
    if "a14b" in family and sampler == "euler":
        guidance["guidance_scale_2"] = 2.0
    reasoner = load(checkpoint(family), timesteps=tuple(scheduler.timesteps.tolist()), sampler=sampler, **guidance)
    if "a14b" in family:
        levels = [sigma >= reasoner.boundary_ratio for sigma in reasoner.settings.sigmas]
        assert any(levels) and not all(levels)  # both experts have something to do
    condition, noise = instance(reasoner, image, seed=7)
    assert len(noise.steps) == (3 if sampler == "renoise" else 0)
    ours = reasoner.decode(reasoner.sample(condition, noise))

    shape = noise.z1.shape
    theirs = diffusers_video(checkpoint(family), scheduler, image, shape, seed=7, num_inference_steps=4, **guidance)
    assert ours.shape == (FRAMES, 3, HEIGHT, WIDTH) and ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=0)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_prediction_is_a_step_of_its_own_scheduler_to_zero(checkpoint, image, family, guidance_scale):
    """The hub's UniPC begins at 1 - 1e-6, FlowMatchEuler exactly at 1."""
    reasoner = load(checkpoint(family), guidance_scale=guidance_scale, negative_prompt=NEGATIVE)
    condition, noise = instance(reasoner, image if family in IMAGE_FAMILIES else None)
    with torch.no_grad():
        z0 = reasoner.predict_clean(condition, noise)
        velocity = reasoner.guided_velocity(condition, noise.z1, 1.0)
    own = DiffusionPipeline.from_pretrained(checkpoint(family)).scheduler
    assert isinstance(own, UniPCMultistepScheduler)
    for scheduler in (own, FlowMatchEulerDiscreteScheduler()):
        scheduler.set_timesteps(1)
        assert abs(float(scheduler.sigmas[0]) - 1) < 2e-6 and scheduler.sigmas[-1] == 0
        expected = scheduler.step(velocity, scheduler.timesteps[0], noise.z1, return_dict=False)[0]
        known = 1 if condition.first_frame is not None else 0
        torch.testing.assert_close(z0[:, :, known:], expected[:, :, known:], atol=2e-5, rtol=1e-5)
    if known:
        assert torch.equal(z0[:, :, :1], condition.first_frame)
    assert (z0 - noise.z1).abs().mean() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_reaches_every_lora_b_of_the_taught_transformer(checkpoint, image, family):
    reasoner = load(checkpoint(family), guidance_scale=2.0)
    add_lora(reasoner.transformer, rank=2, seed=0)
    condition, noise = instance(reasoner, image if family in IMAGE_FAMILIES else None)
    reasoner.predict_clean(condition, noise).square().sum().backward()
    found = 0
    for name, parameter in reasoner.transformer.named_parameters():
        if "lora_B" in name:
            found += 1
            assert parameter.grad.abs().sum() > 0, name
        elif "lora_A" not in name:
            assert parameter.grad is None, name
    assert found >= 2 * 10
    for name, network in reasoner.networks.items():
        if name != "transformer":
            assert all(p.grad is None for p in network.parameters()), name


def test_the_image_reaches_an_i2v_model(checkpoint, image):
    for family in ("wan21_i2v", "wan22_i2v_a14b"):
        reasoner = load(checkpoint(family))
        condition, noise = instance(reasoner, image)
        assert condition.first_frame is None
        latents = condition.inputs["image_latents"]
        assert latents.shape == (1, 4 + 8, 2, 4, 6)
        assert torch.equal(latents[:, :4, 0], torch.ones(1, 4, 4, 6)) and not latents[:, :4, 1:].any()
        other, _ = instance(reasoner, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        with torch.no_grad():
            a, b = (reasoner.predict_clean(c, noise) for c in (condition, other))
        assert (a - b).abs().max() > 1e-3
        if family == "wan21_i2v":
            features = condition.inputs["encoder_hidden_states_image"]
            assert features.shape == (1, 5, 16)  # 2 x 2 patches and the class token
            blind = replace(condition, inputs={**condition.inputs, "encoder_hidden_states_image": 0 * features})
            with torch.no_grad():
                assert (reasoner.predict_clean(blind, noise) - a).abs().max() > 1e-3
    assert "encoder_hidden_states_image" not in condition.inputs  # Wan 2.2 has no CLIP


def test_an_i2v_model_needs_the_image_and_a_t2v_model_takes_none(checkpoint, image):
    with pytest.raises(InputError, match="needs an image"):
        load(checkpoint("wan22_i2v_a14b")).encode(PROMPT, None, *SIZE)
    with pytest.raises(InputError, match="takes no image"):
        load(checkpoint("wan22_t2v_a14b")).encode(PROMPT, image, *SIZE)


def test_experts_work_on_their_side_of_the_boundary(checkpoint):
    """One expert predicts each level; a LoRA on the high-noise expert changes nothing below the boundary."""
    reasoner = load(checkpoint("wan22_t2v_a14b"))
    assert set(reasoner.networks) == {"transformer", "transformer_2", "vae", "text_encoder"}
    condition, noise = instance(reasoner, None)
    levels = (1.0, 0.875, 0.874, 0.1)
    with torch.no_grad():
        for sigma in levels:
            own = reasoner.velocity(condition, noise.z1, sigma)
            for expert, works in (
                (reasoner.transformer, sigma >= 0.875),
                (reasoner.transformer_2, sigma < 0.875),
            ):
                same = torch.equal(own, reasoner.velocity(condition, noise.z1, sigma, transformer=expert))
                assert same == works
    before = [reasoner.velocity(condition, noise.z1, sigma) for sigma in levels]
    add_lora(reasoner.transformer, rank=2, seed=0)
    with torch.no_grad():
        for name, parameter in reasoner.transformer.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        after = [reasoner.velocity(condition, noise.z1, sigma) for sigma in levels]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, False, True, True]


def test_guidance_moves_away_from_the_negative_prompt(checkpoint):
    reasoner = load(checkpoint("wan21_t2v"), guidance_scale=3.0, negative_prompt=NEGATIVE)
    condition, noise = instance(reasoner, None)
    bare = replace(condition, negative=None)
    with torch.no_grad():
        with_, without = (
            reasoner.predict_clean(c, noise)
            for c in (bare, replace(bare, prompt_embeds=condition.negative.prompt_embeds))
        )
        torch.testing.assert_close(
            reasoner.predict_clean(condition, noise), without + 3 * (with_ - without), atol=1e-4, rtol=1e-4
        )
    torch.testing.assert_close(condition.negative.prompt_embeds, reasoner.encode_prompt(NEGATIVE))
    assert load(checkpoint("wan21_t2v")).encode(PROMPT, None, *SIZE).negative is None


def test_settings_of_one_call(checkpoint):
    reasoner = load(checkpoint("wan21_t2v"))
    before = reasoner.settings
    other = reasoner.with_sampling(5, sampler="euler", guidance_scale=2.0, negative_prompt=None)
    assert other.settings == replace(before, timesteps=(1000, 800, 600, 400, 200), sampler="euler", guidance_scale=2.0)
    condition, noise = instance(other, None)
    assert condition.negative is not None and noise.steps == ()
    assert reasoner.settings is before and other.transformer is reasoner.transformer
    for wrong, said in (
        ({"num_inference_steps": 0}, "num_inference_steps must lie between 1 and 1000, not 0"),
        ({"guidance_scale": 0.5}, "guidance_scale must be 1 .no guidance. or more, at most .*, not 0.5"),
        ({"sampler": "unipc"}, "sampler must be renoise or euler, not 'unipc'"),
        ({"shift": 0.0}, "shift must be greater than 0, not 0.0"),
    ):
        with pytest.raises(InputError, match=said):
            reasoner.with_sampling(**wrong)
    assert reasoner.settings is before


def test_a_text_of_another_length_would_be_taken_for_the_image(checkpoint, image):
    """diffusers takes the last 512 tokens as text and the others, of which there would be none, as CLIP's."""
    with pytest.raises(InputError, match=r"max_sequence_length must be 512 .* not 12"):
        load(checkpoint("wan21_i2v"), max_sequence_length=12).encode(PROMPT, image, *SIZE)


# ---------------------------------------------------------------- parts that do not fit


def changed(directory: Path, copy: Path, file: str, **entries: Any) -> Path:
    """A copy of a checkpoint with other entries in one of its json files."""
    shutil.copytree(directory, copy)
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return copy


def test_a_vae_of_another_model(checkpoint, tmp_path):
    """Like Wan 2.1's VAE (16 channels) beside the transformer of TI2V-5B (48)."""
    copy = changed(checkpoint("wan21_t2v"), tmp_path / "copy", "model_index.json")
    shutil.rmtree(copy / "vae")
    from diffusers import AutoencoderKLWan

    AutoencoderKLWan(
        base_dim=8,
        z_dim=6,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 6,
        latents_std=[1.0] * 6,
    ).save_pretrained(copy / "vae")
    with pytest.raises(InputError, match="takes 8 channels and gives 8, but the VAE has 6"):
        load_reasoner(copy)


@pytest.mark.parametrize(
    "file, entries, said",
    [
        ("vae/config.json", {"latents_mean": None}, "no latents_mean of 8 values"),
        ("vae/config.json", {"latents_std": [1.0] * 7}, "no latents_std of 8 values"),
        ("model_index.json", {"boundary_ratio": 0.9}, "two experts .* one of them is missing"),
        ("model_index.json", {"transformer": [None, None]}, "has no transformer for the high noise"),
        ("model_index.json", {"_class_name": "WanVACEPipeline"}, "is a WanVACEPipeline: the known Reasoners are Wan"),
    ],
)
def test_configs_that_do_not_fit(checkpoint, tmp_path, file, entries, said):
    with pytest.raises(InputError, match=said) as caught:
        load_reasoner(changed(checkpoint("wan21_t2v"), tmp_path / "copy", file, **entries))
    assert "\n" not in str(caught.value)


def test_clip_that_is_not_there(checkpoint, tmp_path):
    entries = {"image_encoder": [None, None], "image_processor": [None, None]}
    with pytest.raises(InputError, match="needs an image_encoder"):
        load_reasoner(changed(checkpoint("wan21_i2v"), tmp_path / "copy", "model_index.json", **entries))
