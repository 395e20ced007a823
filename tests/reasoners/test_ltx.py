"""The LTX-Video Reasoner against diffusers' own pipelines and scheduler."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
)
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.other_device import other_device
from tests.reasoners.checks import check_kept_levels, one_update
from tests.reasoners.tiny_ltx import SIZE, tiny_ltx_pipeline
from tests.tiny_pair import QUERIES, tiny_decoder
from tests.tiny_teacher import tiny_qwen3_vl
from vlmteacher import InputError, TeacherPipeline
from vlmteacher.decoders.taehv import load_decoder
from vlmteacher.lora.adapter import add_lora
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.reasoners.presets import PRESETS
from vlmteacher.reasoners.sampling import SamplerSettings

PROMPT = "Move the red ball to the green square."
STEPS = SamplerSettings(timesteps=(1000, 750, 500, 250), sampler="euler", fps=24.0, max_sequence_length=12)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_ltx_pipeline(tmp_path_factory.mktemp("ltx"))


@pytest.fixture()
def reasoner(directory):
    return with_settings(load_reasoner(directory))


def with_settings(reasoner, settings=STEPS):
    reasoner.settings = settings
    return reasoner


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))


def instance(reasoner, image=None, seed=0):
    condition = reasoner.encode(PROMPT, image, *SIZE)
    return condition, reasoner.noise(condition, torch.Generator().manual_seed(seed))


def tokens(latents):
    return latents.flatten(2).transpose(1, 2)


def stock(pipe, **given):
    pipe.set_progress_bar_config(disable=True)
    frames, height, width = SIZE
    same = {"num_frames": frames, "height": height, "width": width, "frame_rate": 24, "max_sequence_length": 12}
    return pipe(prompt=PROMPT, **({"guidance_scale": 1.0} | same | given)).frames


@pytest.mark.parametrize("kind", [LTXPipeline, LTXImageToVideoPipeline])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_same_video_as_the_older_pipelines(tmp_path, image, kind, guidance_scale):
    """Covers the prompt's mask, positions, a timestep per token, Euler, guidance, and a decoder with noise."""
    directory = tiny_ltx_pipeline(tmp_path, kind.__name__)
    reasoner = with_settings(load_reasoner(directory))
    guided = reasoner.with_sampling(guidance_scale=guidance_scale, negative_prompt="red")
    condition, noise = instance(guided, image if kind is LTXImageToVideoPipeline else None, seed=7)
    ours = guided.decode(guided.sample(condition, noise))

    start = noise.z1
    if condition.first_frame is not None:
        start = torch.cat([condition.first_frame, start[:, :, 1:]], 2)
    pipe = kind.from_pretrained(directory)
    torch.manual_seed(0)  # the decoder's noise
    theirs = stock(
        pipe,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        negative_prompt="red",
        latents=tokens(start),
        decode_timestep=0.05,
        decode_noise_scale=0.025,
        output_type="pt",
    )[0]
    assert ours.shape == (17, 3, 64, 96) and ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
def test_same_latents_as_the_condition_pipeline(directory, reasoner, image, with_image):
    """`LTXConditionPipeline`, of 0.9.8, gives the first latent frame another time."""
    given = image if with_image else None
    condition, noise = instance(reasoner, given, seed=7)
    theirs = stock(
        LTXConditionPipeline.from_pretrained(directory),
        image=given,
        image_cond_noise_scale=0.0,
        timesteps=[1000, 750, 500, 250],
        generator=torch.Generator().manual_seed(7),  # draws what `noise` drew
        output_type="latent",
    )
    ours = reasoner.sample(condition, noise)
    assert (ours - noise.z1).std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)

    reasoner.condition_pipeline = False
    assert not torch.allclose(reasoner.sample(condition, noise), theirs, atol=1e-3)


@pytest.mark.parametrize("with_image", [False, True], ids=["last", "both"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_same_latents_with_a_last_frame(directory, reasoner, image, with_image, guidance_scale):
    last = image.rotate(180)
    frames = [(image, 0)] * with_image + [(last, SIZE[0] - 1)]
    guided = reasoner.with_sampling(guidance_scale=guidance_scale, negative_prompt="red")
    condition = guided.encode(PROMPT, image if with_image else None, *SIZE, last_image=last)
    noise = guided.noise(condition, torch.Generator().manual_seed(7))
    theirs = stock(
        LTXConditionPipeline.from_pretrained(directory),
        conditions=[LTXVideoCondition(image=frame, frame_index=index) for frame, index in frames],
        guidance_scale=guidance_scale,
        negative_prompt="red",
        image_cond_noise_scale=0.0,
        timesteps=[1000, 750, 500, 250],
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    )
    ours = guided.sample(condition, noise)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    without = guided.sample(instance(guided, image if with_image else None, seed=7)[0], noise)
    assert not torch.allclose(ours, without, atol=1e-3)


def test_a_last_frame_is_part_of_the_run(directory, tmp_path, image):
    models = directory, tiny_qwen3_vl(tmp_path / "teacher"), ltx_decoder(tmp_path / "decoder.safetensors")
    pipe = TeacherPipeline.from_pretrained(*models)
    with_settings(pipe.reasoner)

    def call(last, **keywords):
        size = dict(zip(("num_frames", "height", "width"), SIZE, strict=True))
        same = {"queries": QUERIES, "rank": 2, "teacher_frames": 4, "before": False, "progress": False}
        generator = torch.Generator().manual_seed(0)
        return pipe(PROMPT, image, last_image=last, generator=generator, max_steps=1, **same, **size, **keywords)

    run = tmp_path / "run"
    with_last, without = call(image.rotate(180), run_dir=run), call(None)
    assert with_last.history[0]["grad_norm"] > 0 and with_last.history[0]["loss"] != without.history[0]["loss"]
    recorded = json.loads((run / "run.json").read_text())["config"]
    assert recorded["last_image"] not in (None, recorded["image"]) and without.config["last_image"] is None
    assert recorded["goal_image"] == recorded["last_image"]  # the Teacher sees it too
    for other in (image, None):
        with pytest.raises(InputError, match="holds a run with another last_image"):
            call(other, run_dir=run, resume=True)
    assert call(image.rotate(180), run_dir=run, resume=True).history == with_last.history
    with pytest.raises(InputError, match="the last_image is 64x64 pixels, the video 96x64"):
        call(image.crop((0, 0, 64, 64)))


def test_one_step_prediction_is_one_euler_step_to_zero(reasoner, image):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0])
    (t,) = scheduler.timesteps
    condition, noise = instance(reasoner)
    with torch.no_grad():
        u = reasoner.transformer(
            tokens(noise.z1),
            condition.prompt_embeds,
            t.expand(1),
            condition.inputs["encoder_attention_mask"],
            video_coords=reasoner._positions(3, 2, 3),
            return_dict=False,
        )[0]
        expected = scheduler.step(u, t, tokens(noise.z1), return_dict=False)[0]
        torch.testing.assert_close(tokens(reasoner.predict_clean(condition, noise)), expected)
        assert (expected - tokens(noise.z1)).abs().mean() > 0.01

        condition, noise = instance(reasoner, image)
        for z0 in (reasoner.predict_clean(condition, noise), reasoner.sample(condition, noise)):
            assert torch.equal(z0[:, :, :1], condition.first_frame)


def test_first_latent_frame_is_the_image(reasoner, image):
    condition, _ = instance(reasoner, image)
    frame = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, :, None] / 255 * 2 - 1
    latents = reasoner.vae.encode(frame).latent_dist.mode()
    mean, std = (getattr(reasoner.vae, f"latents_{name}").view(1, 8, 1, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(condition.first_frame, (latents - mean) / std)


def test_decoding_draws_its_noise_from_a_seed_of_its_own(reasoner):
    latents = torch.randn(1, 8, 3, 2, 3, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    first = reasoner.decode(latents)
    drawn = torch.rand(3)
    torch.manual_seed(6)
    assert torch.equal(reasoner.decode(latents), first)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)


def test_a_decoder_without_timestep_is_given_no_noise(tmp_path):
    reasoner = load_reasoner(tiny_ltx_pipeline(tmp_path, timestep_conditioning=False))
    latents = torch.randn(1, 8, 3, 2, 3, generator=torch.Generator().manual_seed(1))
    video = reasoner.vae.decode(latents * reasoner.latents_std + reasoner.latents_mean).sample[0]
    torch.testing.assert_close(reasoner.decode(latents), (video.transpose(0, 1) / 2 + 0.5).clamp(0, 1))


def test_gradient_reaches_every_lora_b(reasoner, image):
    add_lora(reasoner.transformer, rank=4, seed=0)
    condition, noise = instance(reasoner, image)
    (reasoner.predict_clean(condition, noise) ** 2).sum().backward()
    found = {n: p.grad for n, p in reasoner.transformer.named_parameters() if "lora_B" in n}
    assert len(found) >= 16 and all(grad.abs().max() > 0 for grad in found.values())


def test_batched_velocity_is_that_of_each(reasoner, image):
    from vlmteacher.reasoners.condition import collate

    conditions = [reasoner.encode(prompt, image, *SIZE) for prompt in (PROMPT, "the box")]
    latents, sigma = torch.randn(2, 8, 3, 2, 3), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        both = reasoner.velocity(collate(conditions), latents, sigma)
        for k, condition in enumerate(conditions):
            one = reasoner.velocity(condition, latents[k : k + 1], float(sigma[k]))
            torch.testing.assert_close(both[k : k + 1], one)


def ltx_decoder(path, **changes):
    return tiny_decoder(path, time_upscale=(True,) * 3, space_upscale=(True,) * 3, patch=4, **changes)


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


def test_one_update_of_the_whole_pipeline(directory, tmp_path, image):
    """On the CPU, and on another device with offloading."""
    models = directory, tiny_qwen3_vl(tmp_path / "teacher"), ltx_decoder(tmp_path / "decoder.safetensors")

    def update(pipe):
        pipe.reasoner.settings = STEPS
        return one_update(pipe, PROMPT, image, SIZE)

    out = update(TeacherPipeline.from_pretrained(*models))
    change = (out.frames - out.frames_before).abs().max()
    assert out.updates == 1 and out.history[0]["grad_norm"] > 0
    assert out.frames.shape == (17, 3, 64, 96) and change > 1e-3

    pipe = TeacherPipeline.from_pretrained(*models, offload=True)
    with other_device():
        pipe.to("meta")
        there = update(pipe).frames.to("cpu")
    assert (there - out.frames).abs().max() < 0.02 * change


@pytest.mark.parametrize(
    "size, said",
    [
        ((16, 64, 96), "num_frames must be 8k .* not 16: the nearest are 9 and 17"),
        ((17, 48, 96), "height must be a multiple of 32, not 48: the nearest are 32 and 64"),
        ((17, 64, 100), "width must be a multiple of 32, not 100: the nearest are 96 and 128"),
    ],
)
def test_sizes_it_cannot_take(reasoner, size, said):
    with pytest.raises(InputError, match=said):
        reasoner.encode(PROMPT, None, *size)


def test_bad_input(reasoner, directory, tmp_path, image):
    older = load_reasoner(tiny_ltx_pipeline(tmp_path / "older", "LTXImageToVideoPipeline"))
    with pytest.raises(InputError, match="takes no last frame: leave out last_image, or give a model"):
        older.encode(PROMPT, image, *SIZE, last_image=image)
    with pytest.raises(InputError, match="prompt is empty"):
        reasoner.encode(" ", None, *SIZE)
    copy = shutil.copytree(directory, tmp_path / "copy")
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({n: v for n, v in load_file(weights).items() if n != "latents_mean"}, weights)
    with pytest.raises(InputError, match=r"\(vae\) lacks 1 weights \(latents_mean"):
        load_reasoner(copy)
    shutil.rmtree(copy / "vae")
    with pytest.raises(InputError, match="is the copy complete"):
        load_reasoner(copy)
    AutoencoderKLLTXVideo(
        latent_channels=16, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    ).save_pretrained(copy / "vae")
    with pytest.raises(InputError, match="takes 8 channels, and its VAE makes 16"):
        load_reasoner(copy)


def test_a_single_file_and_a_few_step_lora(directory, tmp_path):
    """A single file in Lightricks' own names, as the 2B model is published."""
    from diffusers import LTXVideoTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        other = LTXVideoTransformer3DModel.from_config(
            LTXVideoTransformer3DModel.load_config(directory / "transformer")
        )
        a, b = torch.randn(2, 32), torch.randn(32, 2)
    names = {"proj_in.": "patchify_proj.", "time_embed.": "adaln_single.", "norm_q.": "q_norm.", "norm_k.": "k_norm."}
    state = {}
    for name, value in other.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[f"model.diffusion_model.{name}"] = value.contiguous()
    save_file(state | {"vae.decoder.conv_in.conv.weight": torch.zeros(1)}, tmp_path / "ltxv.safetensors")
    layer = "transformer_blocks.0.attn1.to_q"
    lora = {f"diffusion_model.{layer}.lora_A.weight": a, f"diffusion_model.{layer}.lora_B.weight": b}
    save_file(lora, tmp_path / "lora.safetensors")

    reasoner = load_reasoner(
        directory,
        transformer=str(tmp_path / "ltxv.safetensors"),
        few_step_lora=str(tmp_path / "lora.safetensors"),
        preset="ltx-0.9.8-distilled",
    )
    found, expected = reasoner.transformer.state_dict(), other.state_dict()
    expected[f"{layer}.weight"] = expected[f"{layer}.weight"] + b @ a
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert reasoner.settings.timesteps[:2] == (1000, 993.7) and reasoner.settings.sampler == "euler"


def test_a_checkpoint_of_unknown_name_is_taken_for_a_distilled_one(directory):
    assert load_reasoner(directory).settings == PRESETS["ltx-0.9.8-distilled"]


def test_the_decoder_of_ltx_2_is_refused(reasoner, tmp_path):
    with pytest.raises(InputError, match="of LTX-2, which are not those of LTX-Video"):
        load_decoder(ltx_decoder(tmp_path / "taeltx_2.safetensors"), reasoner)
    with pytest.raises(InputError, match="upscales 8x in time and 8x in space, but the Reasoner's VAE 8x and 32x"):
        load_decoder(tiny_decoder(tmp_path / "other.safetensors", time_upscale=(True,) * 3), reasoner)
    assert load_decoder(ltx_decoder(tmp_path / "own.safetensors"), reasoner).spatial_stride == 32


def test_a_decoder_can_be_distilled_from_its_vae(directory, reasoner):
    """`vlmteacher distill decoder` encodes and decodes as the Reasoner does."""
    from vlmteacher.distillation.decoder import VideoVAE

    vae = VideoVAE(str(directory), torch.device("cpu"))
    frames = np.random.default_rng(0).integers(0, 256, (17, 64, 96, 3), dtype=np.uint8)
    latents = vae.encode(frames)
    torch.testing.assert_close(latents, reasoner.encode_video(frames))
    theirs = torch.from_numpy(vae.decode(latents)).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(theirs, reasoner.decode(latents), atol=0.003, rtol=0)
