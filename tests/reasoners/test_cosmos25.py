"""The Reasoner of Cosmos-Predict 2.5 against diffusers' own pipeline and schedulers.

Where torchvision is missing, as in the tests' environment, the stock pipeline runs a transformer that does without it.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.reasoners.checks import check_kept_levels, one_update
from tests.reasoners.tiny_cosmos import SIZE, TEXT_LENGTH, Checker, tiny_cosmos_pipeline
from tests.tiny_pair import tiny_decoder
from tests.tiny_teacher import tiny_qwen3_vl
from vlmteacher import InputError, TeacherPipeline
from vlmteacher.lora.adapter import add_lora, export_lora, lora_parameters, remove_lora
from vlmteacher.lora.formats.names import ours
from vlmteacher.reasoners.condition import collate
from vlmteacher.reasoners.cosmos25 import BASE, CosmosReasoner, add_padding_mask, karras_timesteps
from vlmteacher.reasoners.loading import adopt_reasoner, load_reasoner

PROMPT = "Move the red ball to the green square."


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_cosmos_pipeline(tmp_path_factory.mktemp("cosmos"))


@pytest.fixture(scope="module")
def loaded(directory):
    return load_reasoner(directory)


@pytest.fixture(scope="module")
def scheduler():
    """Euler's steps in the place of UniPC's, as for the other families."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    return scheduler


@pytest.fixture()
def reasoner(loaded, scheduler):
    given = {"guidance_scale": 1.0, "max_sequence_length": TEXT_LENGTH, "negative_prompt": "red"}
    yield loaded.with_sampling(timesteps=tuple(scheduler.timesteps.tolist()), **given)
    remove_lora(loaded.transformer)


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE[1:], 3), dtype=np.uint8))


def instance(reasoner, image=None):
    condition = reasoner.encode(PROMPT, image, *SIZE)
    return condition, reasoner.noise(condition, torch.Generator().manual_seed(7))


def run_stock(directory, reasoner, scheduler, noise, image=None, guidance_scale=0.0, **given):
    pipe = diffusers.Cosmos2_5_PredictBasePipeline.from_pretrained(
        directory, transformer=reasoner.transformer, scheduler=scheduler, safety_checker=Checker()
    )
    pipe.set_progress_bar_config(disable=True)
    frames, height, width = SIZE
    # As `image`, for which the pipeline asks torchvision: the first latent frame of a video of it.
    with_image = {"video": [image] * frames, "num_latent_conditional_frames": 1} if image else {}
    size = {"num_frames": frames, "height": height, "width": width, "max_sequence_length": TEXT_LENGTH}
    same = {"prompt": PROMPT, "negative_prompt": "red", "num_inference_steps": 4, "latents": noise.z1.clone()}
    return pipe(guidance_scale=guidance_scale, **same, **size, **with_image, **given).frames


@pytest.mark.parametrize("guidance_scale", [1.0, 8.0])
@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
def test_same_video_as_the_stock_pipeline(directory, reasoner, scheduler, image, with_image, guidance_scale):
    """Covers the chat, all hidden states, a timestep per latent frame, both masks, Euler and the other guidance."""
    given = image if with_image else None
    guided = reasoner.with_sampling(guidance_scale=guidance_scale)
    condition, noise = instance(guided, given)
    latents = guided.sample(condition, noise)
    theirs = run_stock(directory, guided, scheduler, noise, given, guidance_scale=guidance_scale - 1, output_type="pt")[
        0
    ]
    torch.testing.assert_close(guided.decode(latents), theirs, atol=2e-5, rtol=0)
    if guidance_scale > 1:
        assert (latents - reasoner.sample(replace(condition, negative=None), noise)).abs().mean() > 1e-3


def test_the_levels_are_those_of_the_published_scheduler(directory):
    """But for the first, which is 200 / 201 there; the one-step prediction at that level is the scheduler's."""
    for steps in (1, 4, 36):
        unipc = diffusers.UniPCMultistepScheduler.from_pretrained(directory, subfolder="scheduler")
        unipc.set_timesteps(steps)
        ours = torch.tensor(karras_timesteps(steps)) / 1000
        torch.testing.assert_close(ours[1:], unipc.sigmas[1:-1], atol=1e-6, rtol=1e-6)
        assert ours[0] == 1 and unipc.sigmas[0].item() == pytest.approx(200 / 201)


@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
def test_one_step_prediction_is_a_step_of_the_scheduler(directory, reasoner, image, with_image):
    given = image if with_image else None
    condition, noise = instance(reasoner, given)
    euler = diffusers.FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(sigmas=[1.0])
    euler.set_timesteps = lambda *_, **__: None  # the pipeline's call would ask for other levels
    theirs = run_stock(directory, reasoner, euler, noise, given, output_type="latent")
    z0 = reasoner.predict_clean(condition, noise)
    torch.testing.assert_close(z0, theirs, atol=1e-5, rtol=1e-5)
    if with_image:
        assert torch.equal(z0[:, :, :1], condition.first_frame)

    unipc = diffusers.UniPCMultistepScheduler.from_pretrained(directory, subfolder="scheduler")
    unipc.set_timesteps(4)
    unipc.set_begin_index(0)
    unipc._init_step_index(unipc.timesteps[0])
    first = unipc.sigmas[0].item()
    with torch.no_grad():
        velocity = reasoner.velocity(condition, noise.z1, first)
        expected = unipc.convert_model_output(velocity, sample=noise.z1)[:, :, with_image:]
        found = reasoner.predict_clean_at(condition, noise.z1, first)[:, :, with_image:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_batched_velocity_is_that_of_each(reasoner, image):
    conditions = [reasoner.encode(prompt, image, *SIZE) for prompt in (PROMPT, "the box")]
    latents, sigma = torch.randn(2, *reasoner.latent_shape(*SIZE)[1:]), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        both = reasoner.velocity(collate(conditions), latents, sigma)
        for k, condition in enumerate(conditions):
            one = reasoner.velocity(condition, latents[k : k + 1], float(sigma[k]))
            torch.testing.assert_close(both[k : k + 1], one)


def test_gradient_reaches_every_lora_b(reasoner, image):
    add_lora(reasoner.transformer, rank=4, seed=0)
    (reasoner.predict_clean(*instance(reasoner, image)) ** 2).sum().backward()
    found = {n: p.grad for n, p in reasoner.transformer.named_parameters() if "lora_B" in n}
    assert len(found) == 2 * 10 and all(grad.abs().max() > 0 for grad in found.values())


def test_what_the_blocks_keep_changes_no_bit(reasoner, image):
    check_kept_levels(reasoner, *instance(reasoner, image))


def test_bfloat16(directory, reasoner, image):
    """Latents and LoRA stay float32."""
    low = load_reasoner(directory, torch.bfloat16)
    low.settings = reasoner.settings
    add_lora(low.transformer, rank=2, seed=0)
    z0 = low.predict_clean(*instance(low, image))
    z0.square().mean().backward()
    expected = reasoner.predict_clean(*instance(reasoner, image)).detach()
    assert z0.dtype == torch.float32 and (z0 - expected).abs().mean() < 0.02
    assert all(p.grad is None or p.grad.isfinite().all() for p in low.transformer.parameters())


def test_a_lora_in_the_stock_pipeline(directory, reasoner, scheduler, tmp_path):
    condition, noise = instance(reasoner)
    base = reasoner.sample(condition, noise)
    add_lora(reasoner.transformer, rank=4, alpha=6.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(reasoner.transformer):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    ours = reasoner.sample(condition, noise)
    (tmp_path / "lora.safetensors").write_bytes(export_lora(reasoner.transformer))
    remove_lora(reasoner.transformer)
    kind = diffusers.Cosmos2_5_PredictBasePipeline
    state, metadata = kind.lora_state_dict(tmp_path, weight_name="lora.safetensors", return_lora_metadata=True)
    kind.load_lora_into_transformer(state, reasoner.transformer, metadata=metadata)
    theirs = run_stock(directory, reasoner, scheduler, noise, output_type="latent")
    reasoner.transformer.delete_adapters(list(reasoner.transformer.peft_config))
    assert (ours - base).std() > 1e-2
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_names_of_its_authors_are_read():
    names = {
        "self_attn.q_proj": "attn1.to_q",
        "cross_attn.output_proj": "attn2.to_out.0",
        "mlp.layer1": "ff.net.0.proj",
    }
    for theirs, own in names.items():
        assert ours(f"blocks.1.{theirs}") == f"transformer_blocks.1.{own}"


def test_one_update_of_the_whole_pipeline(directory, reasoner, tmp_path, image):
    decoder = tiny_decoder(tmp_path / "decoder.safetensors")
    pipe = TeacherPipeline.from_pretrained(directory, tiny_qwen3_vl(tmp_path / "teacher"), decoder)
    pipe.reasoner.settings = reasoner.settings
    out = one_update(pipe, PROMPT, image, SIZE)
    assert out.updates == 1 and out.history[0]["grad_norm"] > 0
    assert out.frames.shape == (5, 3, 32, 48) and (out.frames - out.frames_before).abs().max() > 1e-3


def test_the_masks_are_joined_as_the_stock_forward_does(reasoner):
    """Of any padding mask, at the resolution of the latents."""
    mask = torch.arange(8.0).view(1, 1, 2, 4)
    inputs = {"hidden_states": torch.ones(2, 8, 3, 4, 8), "condition_mask": torch.zeros(2, 1, 3, 4, 8)}
    _, joined = add_padding_mask(reasoner.transformer, (), {**inputs, "padding_mask": mask, "timestep": 1})
    hidden = joined["hidden_states"]
    assert joined.keys() == {"hidden_states", "timestep"} and hidden.shape == (2, 10, 3, 4, 8)
    assert torch.equal(hidden[1, 9, 2, ::2, ::2], mask[0, 0]) and torch.equal(hidden[:, 8], torch.zeros(2, 3, 4, 8))


def test_the_safety_checker(directory, reasoner, monkeypatch):
    """It is asked for, unless the user turns it off; it sees the prompt and the video."""
    monkeypatch.delenv("VLMTEACHER_COSMOS_GUARDRAIL")
    monkeypatch.setitem(sys.modules, "cosmos_guardrail", None)
    with pytest.raises(InputError, match=r"pip install .vlmteacher\[cosmos\]., or set VLMTEACHER_COSMOS_GUARDRAIL=0"):
        load_reasoner(directory)
    monkeypatch.setitem(sys.modules, "cosmos_guardrail", SimpleNamespace(CosmosSafetyChecker=Checker))
    checked = load_reasoner(directory)
    checked.settings = reasoner.settings
    with pytest.raises(InputError, match="safety checker refuses the prompt"):
        checked.encode("an unsafe box", None, *SIZE)
    condition, noise = instance(checked)
    latents = checked.predict_clean(condition, noise)
    torch.testing.assert_close(checked.decode(latents), reasoner.decode(latents), atol=1 / 255, rtol=0)
    monkeypatch.setattr(checked.checker, "check_video_safety", lambda frames: 0 * frames, raising=False)
    assert not checked.decode(latents).any()


def test_adopted(directory, reasoner):
    """With the pipeline's own safety checker."""
    pipe = diffusers.Cosmos2_5_PredictBasePipeline.from_pretrained(
        directory, transformer=reasoner.transformer, safety_checker=Checker()
    )
    adopted = adopt_reasoner(pipe)
    assert isinstance(adopted, CosmosReasoner) and adopted.settings == BASE
    assert adopted.checker is pipe.safety_checker and adopted.transformer is reasoner.transformer


def test_bad_input(directory, reasoner, image):
    with pytest.raises(InputError, match="takes no last frame"):
        reasoner.encode(PROMPT, image, *SIZE, last_image=image)
    with pytest.raises(InputError, match="width is 112, 14 latent cells, and the transformer has room for 12"):
        reasoner.encode(PROMPT, None, 5, 32, 112)
    other = diffusers.CosmosTransformer3DModel.from_config(reasoner.transformer.config, in_channels=16)
    with pytest.raises(InputError, match="takes 16 channels, and with its VAE's and a mask it is given 9"):
        CosmosReasoner(other, reasoner.vae, reasoner.text_encoder, reasoner.tokenizer)
