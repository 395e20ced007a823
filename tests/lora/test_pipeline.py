"""LoRAs and the pipeline: continuing one, fusing one, its model card, stock diffusers with it."""

import warnings

import numpy as np
import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load, save_file

from tests.test_pipeline import call, seed
from tests.tiny_transformers import tiny_transformer
from vlmteacher import InputError, TeacherPipeline
from vlmteacher.errors import Notice
from vlmteacher.lora.adapter import add_lora, export_lora, lora_parameters
from vlmteacher.lora.formats import read_lora
from vlmteacher.pipeline import PACKAGED_PAIR

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


@pytest.fixture
def pipe(models):
    return TeacherPipeline.from_pretrained(**models)


def test_a_call_goes_on_from_a_loaded_lora(pipe, tmp_path):
    whole = call(pipe, max_steps=2, output_type="pt")
    whole.save(tmp_path / "run")
    pipe.load_lora(tmp_path / "run" / "lora.safetensors")
    more = call(pipe, max_steps=2, output_type="pt", rank=None)
    assert torch.equal(more.frames_before, whole.frames) and more.p_yes_before == whole.p_yes_after
    assert not torch.equal(more.frames, whole.frames) and more.config["rank"] == 2
    first, second = (read_lora(out.lora).layers for out in (whole, more))
    assert first.keys() == second.keys() and not torch.equal(*(x["blocks.0.attn1.to_q"].b for x in (first, second)))
    with pytest.raises(InputError, match="of rank 2: it cannot go on with rank 4"):
        call(pipe, rank=4)
    pipe.load_lora(None)
    assert call(pipe, max_steps=2).lora == whole.lora


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_a_lora_of_any_dtype_is_trained_in_float32(pipe, tmp_path, dtype):
    tensors = {name: value.to(dtype) for name, value in load(call(pipe, max_steps=2).lora).items()}
    save_file(tensors, tmp_path / "given.safetensors")
    save_file({name: value.float() for name, value in tensors.items()}, tmp_path / "plain.safetensors")
    outputs = []
    for name in ("given", "plain"):
        pipe.load_lora(tmp_path / f"{name}.safetensors")
        outputs.append(call(pipe, max_steps=2, rank=None, output_type="pt"))
    assert torch.equal(*(out.frames for out in outputs)) and outputs[0].lora == outputs[1].lora


def test_a_resumed_run_needs_the_same_lora(pipe, tmp_path):
    pipe.load_lora(call(pipe, max_steps=2))
    call(pipe, run_dir=tmp_path / "run")
    pipe.load_lora(None)
    with pytest.raises(InputError, match="another lora"):
        call(pipe, run_dir=tmp_path / "run", resume=True)


def test_a_fused_lora_stays_and_bfloat16_warns(pipe, models):
    out = call(pipe, max_steps=2, output_type="pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.fuse(out)
    fused = call(pipe, max_steps=0, output_type="pt")
    torch.testing.assert_close(fused.frames, out.frames, atol=2e-5, rtol=1e-4)
    assert (fused.frames - out.frames_before).abs().max() > 1e-3
    assert fused.models["fused"].startswith("the output's LoRA (") and "fused" not in out.models
    half = TeacherPipeline.from_pretrained(**models, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"rounding to bfloat16 lost \d+% of the update"):
        half.fuse(out)


def test_what_is_assumed_of_loras_stands_in_the_record(models, tmp_path):
    """run.json has the source of the scale of a merged LoRA and of a continued one."""
    pipe = TeacherPipeline.from_pretrained(**models)
    add_lora(pipe.reasoner.transformer, 2, seed=0)
    with torch.no_grad():
        for parameter in lora_parameters(pipe.reasoner.transformer):
            parameter += 0.05
    tensors = load(export_lora(pipe.reasoner.transformer))
    tensors["text_encoder.x.lora_A.weight"] = torch.ones(2, 2)
    save_file(tensors, path := tmp_path / "lora.safetensors")
    with pytest.warns(Notice, match="1 of 41 tensors stay unused: text_encoder"):
        merged = TeacherPipeline.from_pretrained(**models, few_step_lora=str(path), lora_partial=True)
    assert merged.models["few_step_lora_scale"] == "assumed: alpha = rank"
    assert merged.models["few_step_lora_unused"] == "text_encoder.x.lora_A.weight"
    with pytest.raises(InputError, match=r"is of a text encoder .* --lora-partial"):
        merged.load_lora(path)
    with pytest.warns(Notice, match="alpha = rank is assumed"):
        merged.load_lora(path, partial=True)
    out = call(merged, max_steps=1)
    assert out.config["lora_scale"] == "assumed: alpha = rank" and out.record()["models"] == merged.models
    merged.load_lora(out)
    assert call(merged, max_steps=1).config["lora_scale"] == "metadata lora_adapter_metadata"


def test_a_lora_for_another_model_is_refused(pipe, tmp_path):
    ltx = tiny_transformer("ltx")
    add_lora(ltx, 2)
    path = tmp_path / "ltx.safetensors"
    path.write_bytes(export_lora(ltx))
    before = call(pipe, max_steps=0, output_type="pt").frames
    for use in (pipe.load_lora, pipe.fuse):
        with pytest.raises(InputError, match=r"ltx\.safetensors is a LoRA for another model"):
            use(path)
    assert pipe.lora is None and torch.equal(call(pipe, max_steps=0, output_type="pt").frames, before)


class PutsNoiseBack(FlowMatchEulerDiscreteScheduler):
    """Give diffusers' stochastic scheduler the levels of a few-step model, which the pipelines do not take."""

    def __init__(self, levels: tuple[float, ...]) -> None:
        super().__init__(stochastic_sampling=True)
        self.levels = levels

    def set_timesteps(self, *_, **__) -> None:
        super().set_timesteps(sigmas=list(self.levels))


@pytest.mark.parametrize("with_image", [True, False])
def test_stock_diffusers_makes_the_same_video_of_the_packaged_pair(with_image, tmp_path):
    pipe = TeacherPipeline.from_pretrained()
    reasoner, prompt = pipe.reasoner, "Move the yellow ball into the purple box."
    picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(picture) if with_image else None
    add_lora(reasoner.transformer, 4, alpha=6.0, seed=0)
    with torch.no_grad():
        for parameter in lora_parameters(reasoner.transformer):
            parameter += 0.03 * torch.randn(parameter.shape, generator=seed())
    (tmp_path / "lora.safetensors").write_bytes(export_lora(reasoner.transformer))
    condition = reasoner.encode(prompt, image, 13, 64, 64)
    noise = reasoner.noise(condition, seed(2))
    ours = reasoner.decode(reasoner.sample(condition, noise))

    kind = WanImageToVideoPipeline if with_image else WanPipeline
    stock = kind.from_pretrained(PACKAGED_PAIR / "reasoner")
    stock.scheduler = PutsNoiseBack(reasoner.settings.sigmas)
    stock.set_progress_bar_config(disable=True)
    arguments = {"prompt": prompt, "num_frames": 13, "height": 64, "width": 64, "guidance_scale": 1.0}
    arguments |= {"max_sequence_length": reasoner.settings.max_sequence_length, "output_type": "pt"}
    arguments |= {"image": image} if with_image else {}

    def video() -> torch.Tensor:
        draws = iter([*noise.steps, torch.zeros(())])  # at the end it puts back nothing
        with pytest.MonkeyPatch.context() as patch:  # its draws are those of the instance
            module = "diffusers.schedulers.scheduling_flow_match_euler_discrete.randn_tensor"
            patch.setattr(module, lambda *_, **__: next(draws))
            return stock(latents=noise.z1.clone(), num_inference_steps=4, **arguments).frames[0]

    base = video()
    stock.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    torch.testing.assert_close(video(), ours, atol=1e-3, rtol=1e-3)
    assert (base - ours).abs().max() > 0.05


def test_the_card_says_what_the_lora_is_for(pipe, tmp_path):
    prompt = "move | the *ball*\n```\n<script>to</script> the green square"
    out = call(pipe, image=IMAGE, prompt=prompt)
    fast = f"lightx2v/fast, {tmp_path / 'low_noise.safetensors'}"
    out.models = {**out.models, "reasoner": "quanhaol/Wan2.2-TI2V-5B-Turbo", "few_step_lora": fast}
    out.save(tmp_path / "run")
    card = (tmp_path / "run" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["base_model"] == "quanhaol/Wan2.2-TI2V-5B-Turbo" and front["library_name"] == "diffusers"
    assert front["instance_prompt"] == prompt and front["pipeline_tag"] == "image-to-video" and "lora" in front["tags"]
    assert f"````text\n{prompt}\n````" in body
    for question, before, after in zip(out.queries.questions, out.p_yes_before, out.p_yes_after, strict=True):
        assert f"| {question} | {before:.2f} | {after:.2f} |" in body
    assert 'pipe.load_lora_weights(".", weight_name="lora.safetensors")' in body and "| seed | 0 |" in body
    assert r"needed too: the few-step LoRA lightx2v/fast, low\_noise.safetensors." in body
    assert str(tmp_path.parent) not in card and "/home" not in card  # where the other models lie


def test_the_card_of_a_local_model_has_no_base_model(pipe, tmp_path):
    call(pipe, max_steps=0).save(tmp_path)
    front = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n", 2)[1])
    assert "base_model" not in front and front["pipeline_tag"] == "text-to-video"


def test_the_usage_in_the_card_runs(pipe, models, tmp_path, monkeypatch):
    out = call(pipe, max_steps=2)
    out.save(tmp_path)
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(code.replace("DIRECTORY OF THE BASE MODEL", models["reasoner"]), space)
    theirs = get_peft_model_state_dict(space["pipe"].transformer, adapter_name="default_0")
    ours = read_lora(out.lora).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value.to(theirs[name].dtype), theirs[name]) for name, value in ours.items())


def test_a_readme_of_somebody_else_is_not_overwritten(pipe, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"already holds a run \(README.md\)"):
        call(pipe, run_dir=tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
