"""The LTX-2 Reasoner against diffusers' own pipelines and scheduler."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LTX2ConditionPipeline,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.other_device import other_device
from tests.reasoners.checks import check_kept_levels
from tests.reasoners.tiny_ltx import tiny_ltx_pipeline
from tests.reasoners.tiny_ltx2 import SIZE, tiny_ltx2_pipeline
from tests.tiny_pair import QUERIES, tiny_decoder
from tests.tiny_teacher import tiny_qwen3_vl
from vlmteacher import InputError, QuerySet, TeacherPipeline
from vlmteacher.decoders.find import known_decoder
from vlmteacher.decoders.taehv import load_decoder
from vlmteacher.lora.adapter import add_lora, export_lora, lora_parameters, remove_lora
from vlmteacher.lora.formats import read_lora
from vlmteacher.reasoners.condition import Noise, collate
from vlmteacher.reasoners.frozen_front import FrozenFront
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.reasoners.many_step import sample_many
from vlmteacher.reasoners.presets import PRESETS
from vlmteacher.reasoners.sampling import SamplerSettings

PROMPT = "Move the red ball to the green square."
STEPS = SamplerSettings(timesteps=(1000, 750, 500, 250), sampler="euler", fps=24.0, max_sequence_length=12)
PLAIN = {  # no guidance but that by the prompt
    f"{of}{name}": value
    for of in ("", "audio_")
    for name, value in {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}.items()
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {version: tiny_ltx2_pipeline(tmp_path_factory.mktemp("ltx2"), version=version) for version in ("2", "2.3")}


@pytest.fixture(scope="module")
def loaded(directories):
    return {version: load_reasoner(directory) for version, directory in directories.items()}


@pytest.fixture(params=["2", "2.3"])
def reasoner(request, loaded):
    return fresh(loaded[request.param])


def fresh(reasoner):
    remove_lora(reasoner.transformer)
    reasoner.settings = STEPS
    return reasoner


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))


def instance(reasoner, image=None, seed=0):
    condition = reasoner.encode(PROMPT, image, *SIZE)
    return condition, reasoner.noise(condition, torch.Generator().manual_seed(seed))


class LastFramePipeline(LTX2ConditionPipeline):
    """diffusers' pipeline with an image at the last frame, as the authors' takes it: diffusers places it 7 earlier."""

    def _prepare_keyframe_coords(self, *args, **given):
        return super()._prepare_keyframe_coords(*args, **given | {"pixel_frame_idx": given["pixel_frame_idx"] + 7})


def stock(kind, directory, image=None, lora=None, last_image=None, **given):
    pipe = kind.from_pretrained(directory)
    if lora:
        pipe.load_lora_weights(lora, weight_name="lora.safetensors")
    pipe.set_progress_bar_config(disable=True)
    frames, height, width = SIZE
    given |= {"num_frames": frames, "height": height, "width": width, "frame_rate": 24}
    given |= {"max_sequence_length": 12, "output_type": "pt"}
    if kind is LTX2ImageToVideoPipeline:
        given |= {"image": image, "image_crf": 0}  # the image as it is, without compression by H.264
    elif issubclass(kind, LTX2ConditionPipeline):
        images = {0: image, -1: last_image}
        given["conditions"] = [
            LTX2VideoCondition(frames=each, index=index, strength=1.0, crf=0)
            for index, each in images.items()
            if each is not None
        ]
    seven = torch.Generator().manual_seed(7)  # draws what `noise` drew: the video's latents, then the audio's
    return pipe(prompt=PROMPT, sigmas=[1.0, 0.75, 0.5, 0.25], num_inference_steps=4, generator=seven, **PLAIN, **given)


@pytest.mark.parametrize(
    ("kind", "version", "guidance_scale"),
    [
        (LTX2Pipeline, "2", 3.0),
        (LTX2Pipeline, "2.3", 1.0),
        (LTX2ImageToVideoPipeline, "2", 1.0),
        (LTX2ImageToVideoPipeline, "2.3", 3.0),
        (LTX2ConditionPipeline, "2", 1.0),
    ],
)
def test_same_video_as_the_stock_pipeline(directories, loaded, image, kind, version, guidance_scale):
    """Covers the text and its connectors, positions, a timestep per token, the audio's latents, Euler, guidance."""
    reasoner = fresh(loaded[version]).with_sampling(guidance_scale=guidance_scale, negative_prompt="red")
    given = None if kind is LTX2Pipeline else image
    condition, noise = instance(reasoner, given, seed=7)
    if kind is LTX2ConditionPipeline:  # which draws latents in the order of the tokens
        generator = torch.Generator().manual_seed(7)
        video, audio = (torch.randn(1, 18, 8, generator=generator) for _ in range(2))
        noise = Noise(reasoner._join(video.transpose(1, 2).unflatten(2, (3, 2, 3)), audio), ())
    ours = reasoner.decode(reasoner.sample(condition, noise))
    theirs = stock(
        kind,
        directories[version],
        given,
        guidance_scale=guidance_scale,
        audio_guidance_scale=guidance_scale,
        negative_prompt="red",
    )
    assert ours.shape == (17, 3, 64, 96) and ours.std() > 0.01
    torch.testing.assert_close(ours, theirs.frames[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("with_first", [True, False])
def test_a_last_frame_is_the_condition_pipelines(directories, loaded, image, with_first):
    reasoner, last = fresh(loaded["2.3"]), image.rotate(180)
    first = image if with_first else None
    condition = reasoner.encode(PROMPT, first, *SIZE, last_image=last)
    generator = torch.Generator().manual_seed(7)
    video, audio = (torch.randn(1, tokens, 8, generator=generator) for tokens in (18 + 6, 18))  # and the last frame's
    noise = Noise(reasoner._join(video[:, :18].transpose(1, 2).unflatten(2, (3, 2, 3)), audio), ())
    ours = reasoner.sample(condition, noise)
    theirs = stock(
        LastFramePipeline,
        directories["2.3"],
        first,
        last_image=last,
        guidance_scale=1.0,
        audio_guidance_scale=1.0,
    )
    torch.testing.assert_close(reasoner.decode(ours), theirs.frames[0], atol=2e-5, rtol=0)
    without = reasoner.sample(reasoner.encode(PROMPT, first, *SIZE), noise)
    assert (without - ours).abs().max() > 1e-3


def test_one_step_prediction_is_one_euler_step_to_zero(reasoner, image):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0])
    (t,) = scheduler.timesteps
    condition, noise = instance(reasoner)
    tokens = noise.z1[:, :, :3].flatten(2).transpose(1, 2)
    generator = torch.Generator().manual_seed(0)
    torch.randn(1, 8, 3, 2, 3, generator=generator)
    audio = torch.randn(1, 2, 18, 4, generator=generator).transpose(1, 2).flatten(2)
    with torch.no_grad():
        u, _ = reasoner.transformer(
            tokens,
            audio,
            condition.prompt_embeds,
            condition.inputs["audio_encoder_hidden_states"],
            t.expand(1),
            sigma=t.expand(1),
            num_frames=3,
            height=2,
            width=3,
            fps=24.0,
            audio_num_frames=18,
            use_cross_timestep=True,
            return_dict=False,
        )
        expected = scheduler.step(u, t, tokens, return_dict=False)[0]
        found = reasoner.predict_clean(condition, noise)
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected)
        assert (expected - tokens).abs().mean() > 0.01

        condition, noise = instance(reasoner, image)
        for z0 in (reasoner.predict_clean(condition, noise), reasoner.sample(condition, noise)):
            assert torch.equal(z0[:, :, :1], condition.first_frame)


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_the_audio_takes_part_and_is_fixed_for_the_instance(loaded, sampler):
    """Other draws of the audio alone make another video."""
    reasoner = fresh(loaded["2.3"]).with_sampling(sampler=sampler)
    samples = 2 if sampler == "renoise" else 1
    condition = reasoner.encode(PROMPT, None, *SIZE)
    noise, same, other = (reasoner.noise(condition, torch.Generator().manual_seed(seed), samples) for seed in (0, 0, 1))
    assert len(noise.steps) == (3 if sampler == "renoise" else 0) and len(noise.samples()) == samples
    for draw in (noise.z1, *noise.steps):
        assert draw.shape == (1, 8, 3 + 3, 2, 3)  # 18 x 8 values of audio in frames of 8 x 2 x 3
    videos = [reasoner.sample(condition, each) for each in (*noise.samples(), same)]
    assert videos[0].shape == (1, 8, 3, 2, 3) and torch.equal(videos[0], videos[-1])
    assert samples == 1 or not torch.equal(videos[0], videos[1])
    swapped = torch.cat([noise.z1[:, :, :3], other.z1[:, :, 3:]], 2)
    for predict in (reasoner.predict_clean, reasoner.sample):
        with torch.no_grad():
            found, changed = predict(condition, noise), predict(condition, Noise(swapped, noise.steps))
        assert (found - changed).abs().max() > 1e-5
    with torch.no_grad():
        for target in ("last_step", "full"):
            assert torch.equal(reasoner.predict_target(condition, noise, target), videos[0])
    if sampler == "euler":
        many = sample_many(reasoner, condition, None, noise, steps=4, guidance=1.0)
        torch.testing.assert_close(many, videos[0])


def test_values_of_the_audio_fill_whole_frames(loaded):
    reasoner = fresh(loaded["2"])
    video, audio = torch.randn(2, 8, 3, 2, 3), torch.randn(2, 19, 8)
    joined = reasoner._join(video, audio)
    assert joined.shape == (2, 8, 3 + 4, 2, 3) and not joined.transpose(1, 2).flatten(1)[:, -40:].any()
    condition, _ = instance(reasoner.with_sampling(fps=17 * 25 / 19))  # 19 latent frames of audio
    reasoner = reasoner.with_sampling(fps=17 * 25 / 19)
    assert all(torch.equal(a, b) for a, b in zip(reasoner._split(joined, condition), (video, audio), strict=True))


def test_the_presets_levels_are_the_published_ones():
    assert PRESETS["ltx-2-distilled"].sigmas == tuple(DISTILLED_SIGMA_VALUES)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)  # of LTX-2's pipeline
    for name, steps in (("ltx-2", 40), ("ltx-2.3", 30)):
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)], mu=2.05)  # the authors', of 4096 tokens
        torch.testing.assert_close(torch.tensor((*PRESETS[name].sigmas, 0.0)), scheduler.sigmas)
        assert PRESETS[name].sigmas[-1] == pytest.approx(0.1)


def test_first_latent_frame_is_the_image(reasoner, image):
    condition, _ = instance(reasoner, image)
    frame = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, :, None] / 255 * 2 - 1
    latents = reasoner.vae.encode(frame).latent_dist.mode()
    mean, std = (getattr(reasoner.vae, f"latents_{name}").view(1, 8, 1, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(condition.first_frame, (latents - mean) / std)


def test_gradient_reaches_every_lora_b_of_the_video_and_no_other_layer_has_one(reasoner, image):
    add_lora(reasoner.transformer, rank=4, seed=0)
    condition, noise = instance(reasoner, image)
    (reasoner.predict_clean(condition, noise) ** 2).sum().backward()
    found = {n: p.grad for n, p in reasoner.transformer.named_parameters() if "lora_B" in n}
    assert len(found) == 2 * (4 + 4 + 2) and not any("audio" in name for name in found)
    assert all(grad.abs().max() > 0 for grad in found.values())


def test_stock_pipeline_makes_the_same_video_with_our_lora(directories, loaded, tmp_path):
    reasoner = fresh(loaded["2.3"])
    condition, noise = instance(reasoner, seed=7)
    before = reasoner.sample(condition, noise)
    add_lora(reasoner.transformer, rank=4, alpha=6.0, seed=0)
    with torch.no_grad():
        for parameter in lora_parameters(reasoner.transformer):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    ours = reasoner.sample(condition, noise)
    assert (ours - before).std() > 1e-3
    (tmp_path / "lora.safetensors").write_bytes(export_lora(reasoner.transformer))
    theirs = stock(LTX2Pipeline, directories["2.3"], guidance_scale=1.0, audio_guidance_scale=1.0, lora=tmp_path)
    torch.testing.assert_close(reasoner.decode(ours), theirs.frames[0], atol=1e-4, rtol=1e-4)


def test_batched_velocity_is_that_of_each(reasoner, image):
    conditions = [reasoner.encode(prompt, image, *SIZE) for prompt in (PROMPT, "the box")]
    latents, sigma = torch.randn(2, 8, 6, 2, 3), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        both = reasoner.velocity(collate(conditions), latents, sigma)
        for k, condition in enumerate(conditions):
            one = reasoner.velocity(condition, latents[k : k + 1], float(sigma[k]))
            torch.testing.assert_close(both[k : k + 1], one)


def test_what_the_blocks_keep_changes_no_bit(reasoner, image):
    check_kept_levels(reasoner, *instance(reasoner, image))


def test_a_frozen_front_changes_no_bit(loaded):
    """Its blocks return the video's tokens and the audio's."""
    reasoner = fresh(loaded["2"])
    condition, noise = instance(reasoner)
    add_lora(reasoner.transformer, 2, seed=0, blocks="last:1")
    parameters, front, found = lora_parameters(reasoner.transformer), FrozenFront(reasoner.transformer, 1), []
    for inside in (False, True, True):
        if inside:
            with front:
                z0 = reasoner.predict_clean(condition, noise)
        else:
            z0 = reasoner.predict_clean(condition, noise)
        found.append([z0, *torch.autograd.grad(z0.square().sum(), parameters)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_bfloat16(directories, loaded, image):
    """Latents and LoRA stay float32."""
    low = fresh(load_reasoner(directories["2.3"], torch.bfloat16))
    add_lora(low.transformer, rank=2, seed=0)
    condition, noise = instance(low, image)
    z0 = low.predict_clean(condition, noise)
    z0.square().mean().backward()
    with torch.no_grad():
        reasoner = fresh(loaded["2.3"])
        expected = reasoner.predict_clean(*instance(reasoner, image))
    assert z0.dtype == torch.float32 and (z0 - expected).abs().mean() < 0.02
    assert all(p.grad is None or p.grad.isfinite().all() for p in low.transformer.parameters())


def ltx2_decoder(path, **changes):
    return tiny_decoder(path, time_upscale=(True,) * 3, space_upscale=(True,) * 3, patch=4, **changes)


@pytest.mark.slow
def test_updates_of_the_whole_pipeline_resumed_to_the_bit(directories, tmp_path, image):
    """On the CPU, and on another device with offloading."""
    models = directories["2.3"], tiny_qwen3_vl(tmp_path / "teacher"), ltx2_decoder(tmp_path / "decoder.safetensors")
    size = dict(zip(("num_frames", "height", "width"), SIZE, strict=True))

    def update(pipe, max_steps, **options):
        pipe.reasoner.settings = STEPS
        return pipe(
            PROMPT,
            image,
            **size,
            generator=torch.Generator().manual_seed(0),
            queries=QuerySet.from_dict(QUERIES),
            max_steps=max_steps,
            rank=2,
            teacher_frames=4,
            learning_rate=0.03,
            pull=0.1,
            progress=False,
            output_type="pt",
            **options,
        )

    pipe = TeacherPipeline.from_pretrained(*models)
    out = update(pipe, 2)
    change = (out.frames - out.frames_before).abs().max()
    assert out.updates == 2 and out.history[0]["grad_norm"] > 0
    assert out.frames.shape == (17, 3, 64, 96) and change > 1e-3
    assert b"audio" not in out.lora

    part = update(pipe, 1, run_dir=tmp_path / "run")
    resumed = update(pipe, 2, run_dir=tmp_path / "run", resume=True)
    assert part.lora != resumed.lora == out.lora and torch.equal(resumed.frames, out.frames)

    pipe = TeacherPipeline.from_pretrained(*models, offload=True)
    with other_device():
        pipe.to("meta")
        there = update(pipe, 2).frames.to("cpu")
    assert (there - out.frames).abs().max() < 0.02 * change


def test_bad_input(reasoner, loaded, directories, tmp_path):
    with pytest.raises(InputError, match="prompt is empty"):
        reasoner.encode(" ", None, *SIZE)
    with pytest.raises(InputError, match=r"num_frames must be 8k .* not 16: the nearest are 9 and 17"):
        reasoner.encode(PROMPT, None, 16, 64, 96)
    with pytest.raises(InputError, match="width must be a multiple of 32, not 100: the nearest are 96 and 128"):
        reasoner.encode(PROMPT, None, 17, 64, 100)
    with pytest.raises(InputError, match="max_sequence_length must be a multiple of 4 for LTX-2, not 10"):
        reasoner.with_sampling(max_sequence_length=10).encode(PROMPT, None, *SIZE)
    copy = shutil.copytree(directories["2"], tmp_path / "copy")
    index = (copy / "model_index.json").read_text()
    (copy / "model_index.json").write_text(index.replace("Gemma3For", "Gemma4For"))
    with pytest.raises(InputError, match=r"is a Gemma4ForConditionalGeneration: only LTX-2 and 2.3, with Gemma 3, are"):
        load_reasoner(copy)
    (copy / "model_index.json").write_text(index)
    shutil.rmtree(copy / "connectors")
    shutil.copytree(directories["2.3"] / "connectors", copy / "connectors")
    with pytest.raises(
        InputError, match="takes 32 values per word for the audio, and the connectors make 16: they bel"
    ):
        load_reasoner(copy)
    shutil.rmtree(copy / "audio_vae")
    with pytest.raises(InputError, match=r"has no audio_vae/config.json: is the copy complete"):
        load_reasoner(copy)


def test_parts_of_the_audio_alone_are_refused(directories, loaded, tmp_path):
    with pytest.raises(InputError, match="is a AutoencoderKLLTX2Audio: a LTX2VideoTransformer3DModel is needed"):
        load_reasoner(directories["2"], transformer=str(directories["2"] / "audio_vae"))
    state = loaded["2"].transformer.state_dict()
    audio = {f"model.diffusion_model.{name}": value for name, value in state.items() if "audio" in name}
    save_file(audio, tmp_path / "audio.safetensors")
    with pytest.raises(InputError, match=r"as LTX2VideoTransformer3DModel lacks \d+ weights .av_cross_attn_video"):
        load_reasoner(directories["2"], transformer=str(tmp_path / "audio.safetensors"))
    lora = {
        f"diffusion_model.transformer_blocks.0.audio_attn1.to_q.lora_{part}.weight": torch.ones(4, 4) for part in "AB"
    }
    lora = {name: value.new_ones(2, 16) if "lora_A" in name else value.new_ones(16, 2) for name, value in lora.items()}
    save_file(lora, tmp_path / "lora.safetensors")
    reasoner = fresh(loaded["2"])
    with pytest.raises(
        InputError, match=r"has no layer that is optimised here .transformer_blocks.0.audio_attn1.to_q is"
    ):
        add_lora(reasoner.transformer, start=read_lora(tmp_path / "lora.safetensors"))


def test_transformers_of_the_other_ltx_family_are_refused(directories, tmp_path):
    older = tiny_ltx_pipeline(tmp_path / "older")
    for pipeline, other, said in (
        (directories["2"], older, "is a LTXVideoTransformer3DModel: a LTX2VideoTransformer3DModel is needed"),
        (older, directories["2"], "is a LTX2VideoTransformer3DModel: a LTXVideoTransformer3DModel is needed"),
    ):
        with pytest.raises(InputError, match=said):
            load_reasoner(pipeline, transformer=str(other))
        weights = other / "transformer" / "diffusion_pytorch_model.safetensors"
        with pytest.raises(
            InputError, match=r"as LTX2?VideoTransformer3DModel (lacks|has, unlike its class,) \d+ weights"
        ):
            load_reasoner(pipeline, transformer=str(weights))


def test_a_single_file_and_a_few_step_lora_of_video_and_audio(directories, tmp_path):
    """In Lightricks' own names, as the distilled model and its LoRA are published."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        other = LTX2VideoTransformer3DModel.from_config(
            LTX2VideoTransformer3DModel.load_config(directories["2"] / "transformer")
        )
    names = {
        "audio_proj_in.": "audio_patchify_proj.",
        "proj_in.": "patchify_proj.",
        "audio_time_embed.": "audio_adaln_single.",
        "time_embed.": "adaln_single.",
        "av_cross_attn_video_scale_shift.": "av_ca_video_scale_shift_adaln_single.",
        "av_cross_attn_audio_scale_shift.": "av_ca_audio_scale_shift_adaln_single.",
        "av_cross_attn_video_a2v_gate.": "av_ca_a2v_gate_adaln_single.",
        "av_cross_attn_audio_v2a_gate.": "av_ca_v2a_gate_adaln_single.",
        "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
        "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
        "norm_q.": "q_norm.",
        "norm_k.": "k_norm.",
    }

    def theirs(name):
        for ours, authors in names.items():
            if ours in name:
                return name.replace(ours, authors)
        return name

    state = {f"model.diffusion_model.{theirs(name)}": value for name, value in other.state_dict().items()}
    state["model.diffusion_model.video_embeddings_connector.learnable_registers"] = torch.zeros(4, 32)
    save_file(state | {"vae.decoder.conv_in.conv.weight": torch.zeros(1)}, tmp_path / "ltx-2.safetensors")
    linear = {name: each for name, each in other.named_modules() if isinstance(each, torch.nn.Linear)}
    generator, lora, expected = torch.Generator().manual_seed(0), {}, other.state_dict()
    for name, layer in linear.items():
        a = torch.randn(2, layer.in_features, generator=generator)
        b = torch.randn(layer.out_features, 2, generator=generator)
        expected[f"{name}.weight"] = layer.weight + b @ a
        lora |= {
            f"diffusion_model.{theirs(name + '.')}lora_{part}.weight": value for part, value in (("A", a), ("B", b))
        }
    save_file(lora, tmp_path / "lora.safetensors")

    reasoner = load_reasoner(
        directories["2"],
        transformer=str(tmp_path / "ltx-2.safetensors"),
        few_step_lora=str(tmp_path / "lora.safetensors"),
        preset="ltx-2-distilled",
    )
    found = reasoner.transformer.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert reasoner.settings == PRESETS["ltx-2-distilled"]

    pipe = LTX2Pipeline.from_pretrained(directories["2"])  # diffusers reads the same names
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    own = load_file(directories["2"] / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, value in pipe.transformer.state_dict().items():
        torch.testing.assert_close(value - own[name], found[name] - other.state_dict()[name], atol=1e-5, rtol=1e-5)


def test_surrogate_decoders(loaded, tmp_path):
    """LTX-2's and LTX-2.3's have the same channels and strides."""
    assert known_decoder(loaded["2"]) == "Kijai/LTXV2_comfy/VAE/taeltx_2.safetensors"
    assert known_decoder(loaded["2.3"]) == "Kijai/LTX2.3_comfy/vae/taeltx2_3.safetensors"
    for version, name in (("2", "taeltx_2"), ("2.3", "taeltx2_3")):
        decoder = load_decoder(ltx2_decoder(tmp_path / f"{name}.safetensors"), loaded[version])
        assert (decoder.temporal_stride, decoder.spatial_stride) == (8, 32)


def test_a_decoder_can_be_distilled_from_its_vae(directories, loaded):
    """`vlmteacher distill decoder` encodes and decodes as the Reasoner does."""
    from vlmteacher.distillation.decoder import VideoVAE

    vae, reasoner = VideoVAE(str(directories["2.3"]), torch.device("cpu")), loaded["2.3"]
    frames = np.random.default_rng(0).integers(0, 256, (17, 64, 96, 3), dtype=np.uint8)
    latents = vae.encode(frames)
    torch.testing.assert_close(latents, reasoner.encode_video(frames))
    theirs = torch.from_numpy(vae.decode(latents)).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(theirs, reasoner.decode(latents), atol=0.003, rtol=0)
