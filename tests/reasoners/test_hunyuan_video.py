"""The HunyuanVideo Reasoner against diffusers' own pipelines and scheduler."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from PIL import Image

from tests.other_device import other_device
from tests.reasoners.checks import check_kept_levels, one_update
from tests.reasoners.tiny_hunyuan_video import SIZE, tiny_hunyuan_video_pipeline
from tests.tiny_pair import QUERIES, tiny_decoder
from tests.tiny_teacher import tiny_qwen3_vl
from vlmteacher import InputError, QuerySet, TeacherPipeline
from vlmteacher.decoders.find import known_decoder
from vlmteacher.decoders.taehv import SurrogateDecoder
from vlmteacher.lora.adapter import add_lora, export_lora, lora_parameters
from vlmteacher.lora.formats import read_lora
from vlmteacher.optimization.loop import Optimization
from vlmteacher.reasoners.attention import check_backward
from vlmteacher.reasoners.checkpointing import block_list, block_names
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.reasoners.presets import PRESETS
from vlmteacher.reasoners.sampling import SamplerSettings
from vlmteacher.settings import Settings

PROMPT = "Move the red ball to the box."
STEPS = SamplerSettings((1000, 500), shift=7.0, sampler="euler", embedded_guidance=6.0, max_sequence_length=64)
KINDS = (None, "token_replace", "latent_concat")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("hunyuan_video")
    return {kind: tiny_hunyuan_video_pipeline(root / str(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def load(directory, **changes):
    reasoner = load_reasoner(directory)
    reasoner.settings = replace(STEPS, **changes)
    return reasoner


def instance(reasoner, image, prompt=PROMPT):
    given = None if reasoner.condition_type is None else image
    condition = reasoner.encode(prompt, given, *SIZE)
    return condition, reasoner.noise(condition, torch.Generator().manual_seed(7))


def stock(directory, kind, image, *, guidance_scale=6.0, **given):
    pipe = (HunyuanVideoPipeline if kind is None else HunyuanVideoImageToVideoPipeline).from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    frames, height, width = SIZE
    return pipe(
        prompt=PROMPT,
        num_frames=frames + (4 if kind == "latent_concat" else 0),
        height=height,
        width=width,
        num_inference_steps=2,
        guidance_scale=guidance_scale,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(7),  # draws what `noise` drew
        **({} if kind is None else {"image": image}),
        **given,
    ).frames


@pytest.mark.parametrize("guided", [False, True], ids=["embedded", "negative"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_video_as_the_diffusers_pipeline(directories, image, kind, guided):
    """Covers texts without padding, LLaVA's image tokens, z1 with a share of the image, and the frames that are cut."""
    changes = {"guidance_scale": 3.0, "negative_prompt": "blurred"} if guided else {}
    reasoner = load(directories[kind], **changes)
    condition, noise = instance(reasoner, image)
    ours = reasoner.decode(reasoner.sample(condition, noise))
    given = {"true_cfg_scale": 3.0, "negative_prompt": "blurred"} if guided else {}
    theirs = stock(directories[kind], kind, image, output_type="pt", **given)[0]
    assert ours.shape == (5, 3, 64, 64) and ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_prompts_that_are_cut_are_those_of_the_pipeline(directories, image):
    """The assistant's turn, which is cut out of the text, is then not there."""
    long = "Move the red ball to the box. " * 9
    with pytest.warns(UserWarning, match="the prompt has .* text encoder takes 64"):
        condition, _ = instance(load(directories["token_replace"]), image, long)
    pipe = HunyuanVideoImageToVideoPipeline.from_pretrained(directories["token_replace"])
    embeds, pooled, mask = pipe.encode_prompt(image, long, max_sequence_length=64, image_embed_interleave=4)
    assert mask.all() and condition.prompt_embeds.shape == embeds.shape and condition.cut["prompt"] > 0
    torch.testing.assert_close(condition.prompt_embeds, embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(condition.inputs["pooled_projections"], pooled)


def test_embedded_guidance_is_an_input(directories, image):
    reasoner = load(directories[None])
    condition, noise = instance(reasoner, image)
    one = reasoner.with_sampling(embedded_guidance=1.0)
    theirs = stock(directories[None], None, image, guidance_scale=1.0, output_type="latent")
    torch.testing.assert_close(one.sample(condition, noise), theirs, atol=2e-5, rtol=0)
    assert not torch.allclose(reasoner.sample(condition, noise), theirs, atol=1e-4)
    own = replace(STEPS, embedded_guidance=None)
    reasoner.settings = own
    six = reasoner.sample(condition, noise)
    assert torch.equal(reasoner.with_sampling(embedded_guidance=6.0).sample(condition, noise), six)
    with pytest.raises(InputError, match=r"embedded_guidance must be 1 .* not 0\.5"):
        reasoner.with_sampling(embedded_guidance=0.5)
    assert "embedded_guidance" not in own.sampling and STEPS.sampling["embedded_guidance"] == 6.0


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_prediction_is_one_euler_step_to_zero(directories, image, kind):
    """Against the stock transformer with stock attention and padded text."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(sigmas=[1.0])
    (t,) = scheduler.timesteps
    reasoner = load(directories[kind])
    condition, noise = instance(reasoner, image)
    inputs = dict(condition.inputs)
    x = noise.z1
    if kind == "token_replace":
        x = torch.cat([condition.first_frame, x[:, :, 1:]], 2)
    if kind == "latent_concat":
        x = torch.cat([x, inputs.pop("known_latents")], 1)
    else:
        inputs["guidance"] = torch.tensor([6000.0])
    transformer = HunyuanVideoTransformer3DModel.from_pretrained(directories[kind] / "transformer")
    padding = torch.randn(1, 9, 32)
    inputs["encoder_attention_mask"] = torch.cat([inputs["encoder_attention_mask"].float(), torch.zeros(1, 9)], 1)
    with torch.no_grad():
        embeds = torch.cat([condition.prompt_embeds, padding], 1)
        u = transformer(x, t.expand(1), embeds, return_dict=False, **inputs)[0]
        expected = scheduler.step(u, t, noise.z1, return_dict=False)[0]
        ours = reasoner.predict_clean(condition, noise)
    if kind == "token_replace":
        assert torch.equal(ours[:, :, :1], condition.first_frame)
        ours, expected = ours[:, :, 1:], expected[:, :, 1:]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert (ours - noise.z1[:, :, -ours.shape[2] :]).abs().mean() > 0.01


def test_how_the_image_comes_in(directories, image):
    frame = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, :, None] / 255 * 2 - 1
    for kind in KINDS[1:]:
        reasoner = load(directories[kind])
        condition, noise = instance(reasoner, image)
        expected = reasoner.vae.encode(frame).latent_dist.mode() * reasoner.vae.config.scaling_factor
        plain = torch.randn(noise.z1.shape, generator=torch.Generator().manual_seed(7))
        torch.testing.assert_close(noise.z1, 0.999 * plain + 0.001 * expected)
        if kind == "token_replace":
            torch.testing.assert_close(condition.first_frame, expected)
            assert noise.z1.shape[2] == 2
        else:
            known = condition.inputs["known_latents"]
            torch.testing.assert_close(known[:, :-1, :1], expected)
            assert known[:, -1, 0].eq(1).all() and known[:, :, 1:].eq(0).all() and known.shape[2] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_lora_b_with_the_same_bits_at_every_level(directories, image, kind):
    reasoner = load(directories[kind])
    given = instance(reasoner, image)
    check_kept_levels(reasoner, *given)
    reasoner.predict_clean(*given).square().sum().backward()
    found = {n: p.grad for n, p in reasoner.transformer.named_parameters() if "lora_B" in n}
    assert len(found) == 2 * 12 + 2 * 5 and all(grad.abs().max() > 0 for grad in found.values())


def test_both_lists_of_blocks(directories):
    """The LoRA of the last n blocks counts both lists."""
    transformer = load(directories[None]).transformer
    names = ["transformer_blocks.0", "transformer_blocks.1"]
    names += ["single_transformer_blocks.0", "single_transformer_blocks.1"]
    assert block_names(transformer) == names
    assert [*block_list(transformer)] == [transformer.get_submodule(name) for name in names]
    add_lora(transformer, 2, blocks="last:3")
    adapted = {".".join(n.split(".")[:2]) for n, _ in transformer.named_parameters() if "lora_B" in n}
    assert adapted == set(names[1:])


@pytest.mark.slow
def test_updates_of_the_whole_pipeline(directories, tmp_path, image):
    """On the CPU and, with offloading, on another device; of a model whose first frames are cut.

    The Teacher is shown the video's own frames. Frozen first blocks of both lists change no bit.
    """
    decoder = tiny_decoder(tmp_path / "decoder.safetensors", 4)
    models = directories["latent_concat"], tiny_qwen3_vl(tmp_path / "teacher"), decoder

    def update(pipe):
        pipe.reasoner.settings = STEPS
        return one_update(pipe, PROMPT, image, SIZE)

    pipe = TeacherPipeline.from_pretrained(*models)
    out = update(pipe)
    change = (out.frames - out.frames_before).abs().max()
    assert out.updates == 1 and out.history[0]["grad_norm"] > 0
    assert out.frames.shape == (5, 3, 64, 64) and change > 1e-3
    moved = TeacherPipeline.from_pretrained(*models, offload=True)
    with other_device():
        moved.to("meta")
        there = update(moved).frames.to("cpu")
    assert (there - out.frames).abs().max() < 0.02 * change

    reasoner = pipe.reasoner
    condition, noise = instance(reasoner, image)
    losses = []
    for remembered in (True, False):
        add_lora(reasoner.transformer, 2, seed=0, blocks="last:1")
        settings = Settings(2, 1e-6, teacher_frames=5, rank=2, learning_rate=1e-2, lora_blocks="last:1")
        parts = (reasoner, pipe.decoder, pipe.teacher, condition, noise)
        loop = Optimization(*parts, QuerySet.from_dict(QUERIES), replace(settings, frame_statistics=1e-3))
        if not remembered:
            loop.objective._front = nullcontext()
        losses.append([row["loss"] for row in loop])
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]
    latents = reasoner.predict_clean(condition, noise)
    frames = pipe.decoder.decode(latents)
    assert len(frames) == 9  # of which the first 4 are none of the video
    torch.testing.assert_close(loop.objective._decode(latents), frames[4:])


def test_bfloat16(directories, image):
    """Latents and LoRA stay float32."""
    low = load_reasoner(directories[None], torch.bfloat16)
    low.settings = STEPS
    add_lora(low.transformer, rank=2, seed=0)
    z0 = low.predict_clean(*instance(low, image))
    z0.square().mean().backward()
    reasoner = load(directories[None], embedded_guidance=6.016)  # 6000 as bfloat16 has it
    with torch.no_grad():
        expected = reasoner.predict_clean(*instance(reasoner, image))
    assert z0.dtype == torch.float32 and (z0 - expected).abs().mean() < 0.02
    assert all(p.grad is None or p.grad.isfinite().all() for p in low.transformer.parameters())


@pytest.mark.parametrize("style", ["diffusers", "comfyui", "musubi"])
def test_a_few_step_lora_is_in_the_weights(directories, image, tmp_path, style):
    reasoner = load(directories[None])
    add_lora(reasoner.transformer, rank=4, alpha=2.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(reasoner.transformer):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    lora = read_lora(export_lora(reasoner.transformer))
    assert lora.family.name == "HunyuanVideo"
    file = tmp_path / "few_step.safetensors"
    file.write_bytes(lora.to_bytes(style))
    merged = load_reasoner(directories[None], few_step_lora=str(file), preset="fasthunyuan-t2v")
    assert (len(merged.settings.timesteps), merged.settings.shift, merged.num_frames) == (6, 17.0, 125)
    condition, noise = instance(reasoner, image)
    with torch.no_grad():
        ours, expected = (each.velocity(condition, noise.z1, 1.0) for each in (merged, reasoner))
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


def test_the_backend_of_the_blocks_is_checked_for_a_backward(directories, monkeypatch):
    """Not that of the text refiner, which comes first and takes no backend."""
    transformer, name = load(directories[None]).transformer, AttentionBackendName.NATIVE
    run = _AttentionBackendRegistry._backends[name]
    check_backward(transformer)
    transformer.set_attention_backend("native")
    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, lambda query, **given: run(query, **given).detach())
    with pytest.raises(InputError, match="the attention backend native has no backward"):
        check_backward(transformer)


def test_presets_and_settings(directories, tmp_path):
    for kind, preset in zip(KINDS, ("t2v", "i2v", "i2v-33ch"), strict=True):
        assert load_reasoner(directories[kind]).settings == PRESETS[f"hunyuan-video-{preset}"]
    i2v, channels = directories["token_replace"], directories["latent_concat"]
    assert load_reasoner(i2v, preset="hunyuan-video-i2v").notes == {}
    for directory, preset, said in (
        (i2v, "hunyuan-video-i2v-33ch", "an image as further channels"),
        (channels, "hunyuan-video-i2v", "an image as clean first latent frame"),
        (directories[None], "hunyuan-video-i2v-33ch", "for models that are given an image"),
    ):
        with pytest.raises(InputError, match=said):
            load_reasoner(directory, preset=preset)
    named = shutil.copytree(directories[None], tmp_path / "FastHunyuan-diffusers")
    assert load_reasoner(named).settings == PRESETS["fasthunyuan-t2v"]


def test_its_decoder_is_not_wans(directories, tmp_path):
    """Whose latents have as many channels and the same strides at full size."""
    reasoner = load(directories[None])
    reasoner.latent_channels = 16
    assert known_decoder(reasoner) == "madebyollin/taehv/taehv.safetensors"
    decoder = SurrogateDecoder.from_checkpoint(tiny_decoder(tmp_path / "taehv.safetensors", 16))
    assert (decoder.temporal_stride, decoder.spatial_stride) == (reasoner.temporal_stride, reasoner.spatial_stride)


def changed(directory: Path, to: Path, part: str, **entries: object) -> Path:
    copy = Path(shutil.copytree(directory, to))
    file = copy / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return copy


def test_bad_input(directories, image, tmp_path):
    text, pictures = load(directories[None]), load(directories["token_replace"])
    with pytest.raises(InputError, match="prompt is empty"):
        text.encode("", None, *SIZE)
    with pytest.raises(InputError, match="takes no image"):
        text.encode(PROMPT, image, *SIZE)
    with pytest.raises(InputError, match="give the first frame"):
        pictures.encode(PROMPT, None, *SIZE)
    for size, said in (
        ((6, 64, 64), "num_frames must be 4k .* not 6: the nearest are 5 and 9"),
        ((5, 72, 64), "height must be a multiple of 16, not 72: the nearest are 64 and 80"),
    ):
        with pytest.raises(InputError, match=said):
            text.encode(PROMPT, None, *size)
    other = changed(directories["token_replace"], tmp_path / "a", "transformer", image_condition_type=None)
    with pytest.raises(InputError, match="and its transformer takes no image by its image_condition_type"):
        load_reasoner(other)
    other = Path(shutil.copytree(directories[None], tmp_path / "b"))
    shutil.rmtree(other / "text_encoder_2")
    with pytest.raises(InputError, match="is the copy complete"):
        load_reasoner(other)
    wrong = HunyuanVideoTransformer3DModel.from_config(
        HunyuanVideoTransformer3DModel.load_config(directories["latent_concat"] / "transformer") | {"in_channels": 4}
    )
    wrong.save_pretrained(tmp_path / "wrong")
    with pytest.raises(InputError, match="takes 4 channels, with its VAE it would be given 9"):
        load_reasoner(directories["latent_concat"], transformer=str(tmp_path / "wrong"))
