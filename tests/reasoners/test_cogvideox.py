"""The CogVideoX Reasoner against diffusers' own pipelines and scheduler."""

import functools
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.reasoners.checks import check_kept_levels, one_update
from tests.reasoners.tiny_cogvideox import KINDS, SIZE, TEXT_LENGTH, tiny_cogvideox_pipeline
from tests.tiny_pair import tiny_decoder
from tests.tiny_teacher import tiny_qwen3_vl
from vlmteacher import InputError, TeacherPipeline
from vlmteacher.lora.adapter import add_lora, export_lora, lora_parameters, remove_lora
from vlmteacher.reasoners.cogvideox import ddim_timesteps, noise_levels
from vlmteacher.reasoners.condition import collate
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.reasoners.presets import PRESETS

PROMPT = "Move the red ball to the green square."


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {kind: tiny_cogvideox_pipeline(tmp_path_factory.mktemp("cogvideox") / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE[1:], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def loaded(directories):
    """Loads the Reasoner of a kind once; tests get it without a LoRA (`load`)."""
    return functools.cache(lambda kind, dtype: load_reasoner(directories[kind], dtype))


@pytest.fixture()
def load(loaded):
    """(kind, dtype, steps, settings of the sampler) -> a Reasoner for short prompts."""
    taken = []

    def load(kind, dtype=torch.float32, steps=4, **sampling):
        taken.append(loaded(kind, dtype))
        sampling = {"guidance_scale": 1.0, "max_sequence_length": TEXT_LENGTH} | sampling
        return taken[-1].with_sampling(steps, **sampling)

    yield load
    for reasoner in taken:
        remove_lora(reasoner.transformer)


def instance(reasoner, image, seed=7):
    condition = reasoner.encode(PROMPT, image if reasoner.needs_image else None, *SIZE)
    return condition, reasoner.noise(condition, torch.Generator().manual_seed(seed))


def stock(directory):
    pipe = diffusers.DiffusionPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_stock(pipe, noise, image, steps=4, **given):
    with_image = {"image": image} if "ImageToVideo" in type(pipe).__name__ else {}
    frames, height, width = SIZE
    return pipe(
        prompt=PROMPT,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=steps,
        latents=noise.z1.transpose(1, 2).clone(),
        max_sequence_length=TEXT_LENGTH,
        **({"guidance_scale": 1.0, "output_type": "pt"} | with_image | given),
    ).frames[0]


@pytest.mark.parametrize("snr_shift", [1.0, 3.0])
def test_noise_levels_are_those_of_the_scheduler(snr_shift):
    scheduler = diffusers.CogVideoXDDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=snr_shift
    )
    a, b = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    levels = noise_levels(snr_shift)
    torch.testing.assert_close(torch.from_numpy(levels), b / (a + b))
    assert levels[-1] == 1 and (np.diff(levels) > 0).all()
    for steps in (1, 4, 50, 1000):
        scheduler.set_timesteps(steps)
        sigmas = np.array(ddim_timesteps(steps, levels)) / 1000
        np.testing.assert_allclose(sigmas, levels[scheduler.timesteps], rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_same_video_as_the_stock_pipeline(load, directories, image, kind, guidance_scale):
    """Covers both schedules and scales, all kinds of positions, the image, and the padding of 1.5."""
    sampling = {"guidance_scale": guidance_scale, "negative_prompt": "red"}
    reasoner = load(kind, **sampling)
    condition, noise = instance(reasoner, image)
    ours = reasoner.decode(reasoner.sample(condition, noise))
    theirs = run_stock(stock(directories[kind]), noise, image, **sampling)
    assert ours.shape == (9, 3, 32, 48) and ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["5b", "1.5-i2v"])
def test_one_step_prediction_is_a_step_of_the_scheduler(load, directories, image, kind):
    """At the last timestep, which has no signal, it is -v."""
    reasoner, pipe = load(kind), stock(directories[kind])
    condition, noise = instance(reasoner, image)
    z0 = reasoner.predict_clean(condition, noise)
    theirs = run_stock(pipe, noise, image, steps=1, output_type="latent").transpose(0, 1)[None]
    torch.testing.assert_close(z0, theirs[:, :, -3:], atol=1e-5, rtol=1e-5)
    assert z0.shape == reasoner.latent_shape(*SIZE) and (z0 - noise.z1[:, :, -3:]).abs().mean() > 0.1

    predicted = []
    hook = reasoner.transformer.register_forward_hook(lambda *call: predicted.append(call[2][0]))
    again = reasoner.predict_clean(condition, noise)
    hook.remove()
    assert torch.equal(reasoner.timestep(1.0, 1), torch.tensor([999.0]))
    torch.testing.assert_close(again, -predicted[0].transpose(1, 2)[:, :, -3:], atol=1e-5, rtol=1e-5)


def test_clean_prediction_at_every_level_is_the_schedulers(load, directories, image):
    reasoner, scheduler = load("2b"), stock(directories["2b"]).scheduler
    scheduler.set_timesteps(4)
    condition, noise = instance(reasoner, image)
    sigmas = torch.tensor(reasoner.settings.sigmas)
    with torch.no_grad():
        for sigma, t in zip(reasoner.settings.sigmas, scheduler.timesteps, strict=True):
            assert torch.equal(reasoner.timestep(sigma, 1), t[None].float())
            x = noise.z1 / (1 - 2 * sigma + 2 * sigma**2) ** 0.5  # the scale of the scheduler's latents
            v = reasoner.transformer(x.transpose(1, 2), condition.prompt_embeds, t[None], return_dict=False)[0]
            _, expected = scheduler.step(v.transpose(1, 2), t, x, return_dict=False)
            found = reasoner.predict_clean_at(condition, noise.z1, sigma)
            torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
        both = reasoner.velocity(collate([condition] * 4), noise.z1.expand(4, -1, -1, -1, -1), sigmas)
        each = [reasoner.velocity(condition, noise.z1, sigma) for sigma in reasoner.settings.sigmas]
    torch.testing.assert_close(both, torch.cat(each), atol=1e-4, rtol=1e-4)


def test_levels_between_timesteps(load):
    """A shift, or other steps than DDIM's, lead between trained timesteps."""
    reasoner = load("5b")
    between = (reasoner.levels[300] + reasoner.levels[301]) / 2
    assert reasoner.timestep(between, 2).tolist() == pytest.approx([300.5] * 2)
    assert reasoner.timestep(0.0, 1).item() == 0


@pytest.mark.parametrize("kind", ["2b", "1.5-i2v"])
def test_gradient_reaches_every_lora_b(load, image, kind):
    reasoner = load(kind)
    add_lora(reasoner.transformer, rank=4, seed=0)
    (reasoner.predict_clean(*instance(reasoner, image)) ** 2).sum().backward()
    found = {n: p.grad for n, p in reasoner.transformer.named_parameters() if "lora_B" in n}
    assert len(found) == 2 * 6 and all(grad.abs().max() > 0 for grad in found.values())


def test_what_the_blocks_keep_changes_no_bit(load, image):
    reasoner = load("5b")
    check_kept_levels(reasoner, *instance(reasoner, image))


def test_bfloat16(load, image):
    """Latents and LoRA stay float32."""
    reasoner = load("1.5-i2v", torch.bfloat16)
    add_lora(reasoner.transformer, rank=2, seed=0)
    z0 = reasoner.predict_clean(*instance(reasoner, image))
    z0.square().mean().backward()
    full = load("1.5-i2v")
    expected = full.predict_clean(*instance(full, image)).detach()
    assert z0.dtype == torch.float32 and (z0 - expected).abs().mean() < 0.02
    assert all(p.grad is None or p.grad.isfinite().all() for p in reasoner.transformer.parameters())


def test_a_lora_in_the_stock_pipeline(load, directories, image, tmp_path):
    reasoner, pipe = load("5b"), stock(directories["5b"])
    condition, noise = instance(reasoner, image)
    base = reasoner.sample(condition, noise)
    add_lora(reasoner.transformer, rank=4, alpha=6.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(reasoner.transformer):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    ours = reasoner.sample(condition, noise)
    (tmp_path / "lora.safetensors").write_bytes(export_lora(reasoner.transformer))
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    theirs = run_stock(pipe, noise, image, output_type="latent").transpose(0, 1)[None]
    assert (ours - base).std() > 1e-2
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_one_update_of_the_whole_pipeline(load, directories, tmp_path, image):
    """The Teacher's loss through the surrogate decoder to the LoRA, and videos of the padded model."""
    decoder = tiny_decoder(tmp_path / "decoder.safetensors")
    pipe = TeacherPipeline.from_pretrained(directories["1.5-i2v"], tiny_qwen3_vl(tmp_path / "teacher"), decoder)
    pipe.reasoner = load("1.5-i2v", steps=2)
    out = one_update(pipe, PROMPT, image, SIZE)
    assert out.updates == 1 and out.history[0]["grad_norm"] > 0
    assert out.frames.shape == (9, 3, 32, 48) and (out.frames - out.frames_before).abs().max() > 1e-3


def test_a_decoder_can_be_distilled_from_its_vae(load, directories):
    """`vlmteacher distill decoder` encodes and decodes as the Reasoner does."""
    from vlmteacher.distillation.decoder import VideoVAE

    reasoner, vae = load("2b"), VideoVAE(str(directories["2b"]), torch.device("cpu"))
    frames = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    latents = vae.encode(frames)
    torch.testing.assert_close(latents, reasoner.encode_video(frames))
    theirs = torch.from_numpy(vae.decode(latents)).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(theirs, reasoner.decode(latents), atol=0.003, rtol=0)


def test_unknown_names_follow_the_configs(loaded):
    for kind, name in (("2b", "cogvideox-2b"), ("5b-i2v", "cogvideox-5b"), ("1.5", "cogvideox1.5-5b")):
        assert loaded(kind, torch.float32).settings == PRESETS[name]


@pytest.mark.parametrize(
    ("kind", "size", "said"),
    [
        ("5b", (5, 32, 48), r"num_frames must be 8k \+ 1, k at least 1, not 5: the nearest are 9 and 17"),
        ("5b", (9, 40, 48), "height must be a multiple of 16, not 40: the nearest are 32 and 48"),
        (
            "5b-i2v",
            (9, 32, 64),
            "learned the positions of 9 frames of 48x32 pixels: it makes no video of 9 frames of 64x32",
        ),
        ("1.5", (9, 96, 96), "height and width must be at most 80 and 96, not 96 and 96"),
    ],
)
def test_sizes_it_cannot_make(load, kind, size, said):
    with pytest.raises(InputError, match=said):
        load(kind).encode(PROMPT, None, *size)


def test_bad_input(load, directories, image, tmp_path):
    with pytest.raises(InputError, match=r"takes no image \(it is CogVideoX T2V\)"):
        load("5b").encode(PROMPT, image, *SIZE)
    with pytest.raises(InputError, match=r"makes videos of an image \(it is CogVideoX I2V\)"):
        load("1.5-i2v").encode(PROMPT, None, *SIZE)
    with pytest.raises(InputError, match="max_sequence_length must be 12, not 226"):
        load("2b", max_sequence_length=226).encode(PROMPT, None, *SIZE)
    with pytest.raises(InputError, match=r"cogvideox1.5-5b is for another version of CogVideoX than .*2b"):
        load_reasoner(directories["2b"], preset="cogvideox1.5-5b")
    copy = shutil.copytree(directories["5b"], tmp_path / "copy")
    file = copy / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    for entry, value in (("prediction_type", "epsilon"), ("rescale_betas_zero_snr", False), ("snr_shift_scale", 0)):
        file.write_text(json.dumps(config | {entry: value}))
        with pytest.raises(
            InputError, match=rf"the scheduler of .*copy: {entry} (is '?{value}|must be greater than 0)"
        ):
            load_reasoner(copy)
