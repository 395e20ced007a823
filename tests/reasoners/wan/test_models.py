"""Each Wan model in its hub layout: the same video as its own diffusers pipeline, and a LoRA that can be trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

from tests.reasoners.tiny_checkpoints import FRAMES, HEIGHT, SIZE, WIDTH, changed
from vlmteacher.errors import InputError
from vlmteacher.lora.adapter import add_lora
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.reasoners.sampling import SamplerSettings
from vlmteacher.reasoners.wan.reasoner import WanReasoner

PROMPT, NEGATIVE = "move the red ball to the box", "green square"
FAMILIES = {  # and the images that they are given
    "wan21_t2v": "",
    "wan21_i2v": "image",
    "wan21_flf2v": "image last_image",
    "wan22_ti2v": "image",
    "wan22_t2v_a14b": "",
    "wan22_i2v_a14b": "image",
    "wan_vace": "image last_image",
    "skyreels_t2v": "",
    "skyreels_i2v": "image",
    "skyreels_df": "image last_image",
    "chronoedit": "image",
}
VIDEOS = [  # family, images, sampler
    *((family, given, sampler) for family, given in FAMILIES.items() for sampler in ("renoise", "euler")),
    *(("wan22_ti2v", "", sampler) for sampler in ("renoise", "euler")),
    ("wan22_i2v_a14b", "image last_image", "euler"),
    *(("wan_vace", given, "euler") for given in ("", "image", "last_image")),
    *(("skyreels_df", given, "euler") for given in ("", "image")),
]
VIDEOS.remove(("skyreels_df", "image last_image", "renoise"))  # diffusers draws for each latent frame by itself


def load(directory: Path, **settings: Any) -> WanReasoner:
    reasoner = load_reasoner(directory)
    reasoner.settings = SamplerSettings(**settings)
    return reasoner


@pytest.fixture(scope="module")
def images(image):
    """The images of these names."""
    pair = {"image": image, "last_image": image.rotate(180)}
    return lambda names: {name: pair[name] for name in names.split()}


def instance(reasoner, images=None, seed=0):
    given = {"image": None, **(images or {})}
    condition = reasoner.encode(PROMPT, given.pop("image"), *SIZE, **given)
    return condition, reasoner.noise(condition, torch.Generator().manual_seed(seed))


class WholeTimesteps(FlowMatchEulerDiscreteScheduler):
    """Takes timesteps that are cut to whole numbers, as UniPC does and pipelines of diffusion forcing need."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.set_begin_index(0)

    def step(self, output, timestep, sample, **kwargs):
        return super().step(output, timestep.float(), sample, **kwargs)


def control(images: dict[str, Image.Image]) -> dict[str, np.ndarray]:
    """A VACE pipeline's arguments for the first and the last frame: a video and the mask of what is to be made."""
    video, mask = (np.full((1, FRAMES, HEIGHT, WIDTH, c), v, np.float32) for c, v in ((3, 0.5), (1, 1.0)))
    for name, place in (("image", 0), ("last_image", -1)):
        if name in images:
            video[0, place], mask[0, place] = np.float32(images[name]) / 255, 0
    return {"video": video, "mask": mask} if images else {}


def diffusers_video(directory: Path, scheduler: Any, images: dict[str, Any], shape: Any, seed: int, **call: Any):
    """Frames (F, 3, H, W) of the checkpoint's own pipeline class; an image needs another class where it is optional.

    The scheduler draws from the global generator, as z1 of `shape` is drawn here.
    """
    own = json.loads((directory / "model_index.json").read_text())["_class_name"]
    to_video = {"WanPipeline": "WanImageToVideoPipeline"}
    to_video["SkyReelsV2DiffusionForcingPipeline"] = "SkyReelsV2DiffusionForcingImageToVideoPipeline"
    pipe = getattr(diffusers, to_video.get(own, own) if images else own).from_pretrained(directory, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(seed)
    start = {"latents": torch.randn(shape)}
    if own == "SkyReelsV2DiffusionForcingPipeline" and not images:  # fails where latents are given
        start = {"generator": torch.Generator().manual_seed(seed)}
    return pipe(
        **start,
        **(control(images) if own == "WanVACEPipeline" else images),
        prompt=PROMPT,
        num_frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        output_type="pt",
        **call,
    ).frames[0]


@pytest.mark.slow
@pytest.mark.parametrize("family, given, sampler", VIDEOS)
def test_same_video_as_the_diffusers_pipeline(checkpoint, images, family, given, sampler):
    """Covers text, images as channels and as frames, CLIP's features, experts and guidance, sampler and VAE at once."""
    kind = WholeTimesteps if family == "skyreels_df" else FlowMatchEulerDiscreteScheduler
    scheduler = kind(stochastic_sampling=sampler == "renoise", shift=3.0)
    scheduler.set_timesteps(4)
    guidance = {"guidance_scale": 3.0, "negative_prompt": NEGATIVE} if sampler == "euler" else {"guidance_scale": 1.0}
    if "a14b" in family and sampler == "euler":
        guidance["guidance_scale_2"] = 2.0
    reasoner = load(checkpoint(family), timesteps=tuple(scheduler.timesteps.tolist()), sampler=sampler, **guidance)
    if "a14b" in family:
        levels = [sigma >= reasoner.boundary_ratio for sigma in reasoner.settings.sigmas]
        assert any(levels) and not all(levels)  # both experts have something to do
    condition, noise = instance(reasoner, images(given), seed=7)
    assert len(noise.steps) == (3 if sampler == "renoise" else 0)
    ours = reasoner.decode(reasoner.sample(condition, noise))

    shape = noise.z1.shape
    call = {"num_inference_steps": 4, **guidance}
    theirs = diffusers_video(checkpoint(family), scheduler, images(given), shape, seed=7, **call)
    assert ours.shape == (FRAMES, 3, HEIGHT, WIDTH) and ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_prediction_is_a_step_of_its_own_scheduler_to_zero(checkpoint, images, family, guidance_scale):
    """The hub's UniPC begins at 1 - 1e-6, FlowMatchEuler exactly at 1."""
    reasoner = load(checkpoint(family), guidance_scale=guidance_scale, negative_prompt=NEGATIVE)
    condition, noise = instance(reasoner, images(FAMILIES[family]))
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
def test_gradient_reaches_every_lora_b_of_the_taught_transformer(checkpoint, images, family):
    reasoner = load(checkpoint(family), guidance_scale=2.0)
    add_lora(reasoner.transformer, rank=2, seed=0)
    condition, noise = instance(reasoner, images(FAMILIES[family]))
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
        condition, noise = instance(reasoner, {"image": image})
        assert condition.first_frame is None
        latents = condition.inputs["image_latents"]
        assert latents.shape == (1, 4 + 8, 2, 4, 6)
        assert torch.equal(latents[:, :4, 0], torch.ones(1, 4, 4, 6)) and not latents[:, :4, 1:].any()
        other, _ = instance(reasoner, {"image": image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)})
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
    condition, noise = instance(reasoner)
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
    condition, noise = instance(reasoner)
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
    condition, noise = instance(other)
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
        ("model_index.json", {"_class_name": "WanAnimatePipeline"}, "is a WanAnimatePipeline: the known Reasoners are"),
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
