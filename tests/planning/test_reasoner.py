from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import Run
from tests.planning.counting import saved_bytes, stock_count
from tests.reasoners import (
    tiny_checkpoints,
    tiny_cogvideox,
    tiny_cosmos,
    tiny_hunyuan,
    tiny_hunyuan_video,
    tiny_ltx,
    tiny_ltx2,
)
from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher.checkpoints.pretrained import cast
from vlmteacher.errors import InputError
from vlmteacher.lora.adapter import add_lora, lora_parameters
from vlmteacher.planning.models import KNOWN, build_reasoner
from vlmteacher.planning.reasoner import ReasonerCosts, blank_instance, reasoner_cost
from vlmteacher.reasoners import checkpointing
from vlmteacher.reasoners.checkpointing import Keep, format_levels, keep_activations, parse_levels
from vlmteacher.reasoners.condition import Condition, Noise
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.reasoners.sampling import SamplerSettings

SIZE = (9, 64, 96)


def instance(reasoner: Any) -> tuple[Condition, Noise]:
    _, channels, _, h, w = shape = reasoner.latent_shape(*SIZE)
    generator = torch.Generator().manual_seed(0)
    text, first, z1 = (torch.randn(s, generator=generator) for s in ((1, 12, 32), (1, channels, 1, h, w), shape))
    return Condition(text, first, *SIZE), Noise(z1, ())


def test_reasoner_flops_and_saved_bytes_are_those_counted_on_real_tensors(models: dict[str, str]) -> None:
    real = load_reasoner(models["reasoner"])
    add_lora(real.transformer, 4, fused=False)
    condition, noise = instance(real)
    meta, _ = build_reasoner(models["reasoner"], torch.float32)
    add_lora(meta.transformer, 4, fused=False)
    planned = ReasonerCosts.of(meta, SIZE, ()).total([Keep.ALL] * 2)

    forward = stock_count(lambda: real.predict_clean(condition, noise))
    both = stock_count(lambda: real.predict_clean(condition, noise).sum().backward())
    assert (planned.forward, planned.forward + planned.backward) == (forward, both)
    saved, z0 = saved_bytes(lambda: real.predict_clean(condition, noise), real.transformer)
    # alive, but not saved: the result, and what is an input there and computed here (time embedding)
    assert saved <= planned.kept <= 1.05 * saved + z0.nbytes


FAMILIES = {
    "Wan 2.1 I2V": (tiny_checkpoints.wan21_i2v, tiny_checkpoints.SIZE),
    "Wan 2.2 A14B": (tiny_checkpoints.wan22_t2v_a14b, tiny_checkpoints.SIZE),
    "Wan VACE": (tiny_checkpoints.wan_vace, tiny_checkpoints.SIZE),
    "SkyReels-V2 DF": (tiny_checkpoints.skyreels_df, tiny_checkpoints.SIZE),
    "LTX-Video": (tiny_ltx.tiny_ltx_pipeline, tiny_ltx.SIZE),
    "LTX-2": (tiny_ltx2.tiny_ltx2_pipeline, tiny_ltx2.SIZE),
    "HunyuanVideo-1.5": (tiny_hunyuan.tiny_hunyuan_pipeline, tiny_hunyuan.SIZE),
    "HunyuanVideo": (tiny_hunyuan_video.tiny_hunyuan_video_pipeline, tiny_hunyuan_video.SIZE),
    "HunyuanVideo-I2V": (
        lambda path: tiny_hunyuan_video.tiny_hunyuan_video_pipeline(path, "token_replace"),
        tiny_hunyuan_video.SIZE,
    ),
    "Cosmos-Predict 2.5": (tiny_cosmos.tiny_cosmos_pipeline, tiny_cosmos.SIZE),
    "CogVideoX": (lambda path: tiny_cogvideox.tiny_cogvideox_pipeline(path, "1.5-i2v"), tiny_cogvideox.SIZE),
}


def real_instance(reasoner: Any, size: tuple[int, int, int]) -> tuple[Condition, Noise]:
    """`blank_instance` with values, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def fill(blank: torch.Tensor) -> torch.Tensor:
        return (
            torch.ones(blank.shape).bool()
            if blank.dtype == torch.bool
            else torch.randn(blank.shape, generator=generator)
        )

    blank, noise = blank_instance(reasoner, size)
    first = None if blank.first_frame is None else fill(blank.first_frame)
    inputs = {name: fill(value) for name, value in blank.inputs.items()}
    condition = replace(blank, prompt_embeds=fill(blank.prompt_embeds), first_frame=first, inputs=inputs, negative=None)
    if blank.negative is not None:
        condition = replace(condition, negative=condition)
    return condition, Noise(fill(noise.z1), ())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted_as_on_real_tensors_and_keeps_what_it_is_told(
    family: str, tmp_path: Path, narrow: None
) -> None:
    write, size = FAMILIES[family]
    directory = write(tmp_path)
    guidance_scale = 2.0 if "A14B" in family else 1.0
    real, (meta, _) = load_reasoner(directory), build_reasoner(str(directory), torch.float32)
    real.settings = meta.settings = SamplerSettings(max_sequence_length=12, guidance_scale=guidance_scale)
    for reasoner in (real, meta):
        add_lora(reasoner.transformer, 4, seed=0, fused=False)
    condition, noise = real_instance(meta, size)
    costs = ReasonerCosts.of(meta, size, ())
    planned = costs.total([Keep.ALL] * costs.blocks)
    forward = stock_count(lambda: real.predict_clean(condition, noise))
    both = stock_count(lambda: real.predict_clean(condition, noise).sum().backward())
    assert (planned.forward, planned.forward + planned.backward) == (forward, both)

    parameters = lora_parameters(real.transformer)
    for parameter in parameters:
        parameter.data.add_(0.01)
    found, saved = [], []
    for level in (Keep.ALL, Keep.ATTENTION, Keep.INPUT):
        keep_activations(real.transformer, level)
        kept, z0 = saved_bytes(lambda: real.predict_clean(condition, noise), real.transformer)
        saved.append(kept)
        found.append([z0, *torch.autograd.grad(z0.square().mean(), parameters, allow_unused=True)])
    assert saved[0] > 2 * max(saved[1:])
    for other in found[1:]:
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_fused_transformer_counts_as_stock_does_but_for_the_timesteps(models: dict[str, str]) -> None:
    meta, _ = build_reasoner(models["reasoner"])
    add_lora(meta.transformer, 4, fused=False)
    peft = reasoner_cost(meta, SIZE, Keep.ALL, 2)
    add_lora(meta.transformer, 4)
    ours = reasoner_cost(meta, SIZE, Keep.ALL, 2)
    embedder, (frames, height, width) = meta.transformer.condition_embedder, meta.latent_shape(*SIZE)[2:]
    layers = [m for part in (embedder.time_embedder, embedder.time_proj) for m in part.modules()]
    a_timestep = 2 * sum(m.weight.numel() for m in layers if isinstance(m, torch.nn.Linear))
    assert peft.forward - ours.forward == (frames * height * width // 4 - 2) * a_timestep
    assert ours.backward == pytest.approx(peft.backward, rel=1e-3)
    assert ours.kept < peft.kept / 2  # no float32 copies of the inputs, no table for every token


@pytest.mark.parametrize("fused", [True, False])
def test_levels_change_no_bit_of_the_gradients(models: dict[str, str], narrow: None, fused: bool) -> None:
    reasoner = load_reasoner(models["reasoner"])
    condition, noise = instance(reasoner)
    add_lora(reasoner.transformer, 4, seed=0, fused=fused)
    parameters = lora_parameters(reasoner.transformer)
    for parameter in parameters:
        parameter.data.add_(0.01)
    found, saved = [], []
    for level in Keep:
        keep_activations(reasoner.transformer, level)
        size, z0 = saved_bytes(lambda: reasoner.predict_clean(condition, noise), reasoner.transformer)
        saved.append(size)
        found.append([z0, *torch.autograd.grad(z0.square().mean(), parameters)])
    assert found[0][1].abs().sum() > 0
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_levels_trade_memory_for_flops_and_mix_as_the_plan_adds_them_up(models: dict[str, str], narrow: None) -> None:
    meta, _ = build_reasoner(models["reasoner"])
    add_lora(meta.transformer, 4)
    costs = ReasonerCosts.of(meta, SIZE)
    alone = [costs.total([level] * 2) for level in Keep]
    assert [c.repeated for c in alone] == sorted(c.repeated for c in alone)
    assert [c.kept for c in alone] == sorted((c.kept for c in alone), reverse=True)
    assert alone[Keep.ALL].repeated == alone[Keep.PRODUCTS].repeated == 0 < alone[Keep.LONG].repeated
    outside = costs.levels[0][Keep.INPUT][0].forward
    assert alone[Keep.INPUT].repeated == alone[Keep.ALL].forward - outside

    mixed = [Keep.INPUT, Keep.LONG]
    planned, run_block = costs.total(mixed), checkpointing.run_block
    blocks = list(meta.transformer.blocks)
    traced = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "run_block", lambda _, block, *a: run_block(mixed[blocks.index(block)], block, *a))
        traced = reasoner_cost(meta, SIZE, Keep.INPUT, 2)
    assert (planned.forward, planned.backward, planned.kept) == (traced.forward, traced.backward, traced.kept)
    assert traced.backward_bytes <= planned.backward_bytes <= 1.25 * traced.backward_bytes


def test_levels_as_text() -> None:
    levels = parse_levels("input:2,attention:3", 5)
    assert levels == [Keep.INPUT] * 2 + [Keep.ATTENTION] * 3
    assert format_levels(levels) == "input:2,attention:3"
    assert parse_levels("long", 4) == [Keep.LONG] * 4
    for bad, said in (("much", "the levels are all, products"), ("input:x", "LEVEL"), ("input:2", "2 blocks")):
        with pytest.raises(InputError, match=said):
            parse_levels(bad, 5)
    with pytest.raises(InputError, match="3 activation levels for 2 blocks"):
        keep_activations(type("T", (), {"blocks": nn.ModuleList([nn.Identity(), nn.Identity()])})(), [Keep.ALL] * 3)


def test_solve_takes_the_plans_levels(models: dict[str, str], tmp_path: Path, run: Run) -> None:
    queries = tmp_path / "queries.json"
    queries.write_text(json.dumps(QUERIES))
    given = [f"--{name}={value}" for name, value in models.items()]
    rest = [
        f"--prompt={PROMPT}",
        f"--queries={queries}",
        "--max-steps=1",
        "--rank=2",
        "--teacher-frames=4",
        "--lr=0.03",
    ]
    found = []
    for name, more in (("plain", []), ("kept", ["--activations", "input:1,attention:1"])):
        assert run("solve", *given, *rest, *more, "--out", tmp_path / name)[0] == 0
        found.append((tmp_path / name / "lora.safetensors").read_bytes())
    assert found[0] == found[1]
    status, _, err = run("solve", *given, *rest, "--activations", "input:3", "--out", tmp_path / "bad")
    assert status == 2 and "the transformer has 2" in err and not (tmp_path / "bad" / "run.json").exists()


MID = {
    "transformer": {
        "num_layers": 8,
        "num_attention_heads": 8,
        "attention_head_dim": 64,
        "ffn_dim": 2048,
        "in_channels": 48,
        "out_channels": 48,
        "text_dim": 512,
        "freq_dim": 128,
        "cross_attn_norm": True,
    },
    "text_encoder": {"vocab_size": 32, "d_model": 512, "d_kv": 64, "d_ff": 512, "num_layers": 1, "num_heads": 8},
    "vae": json.loads((KNOWN / "wan2.2-ti2v-5b.json").read_text())["vae"],
}


@pytest.mark.slow
def test_saved_bytes_at_the_benchmarks_mid_size(tmp_path: Path) -> None:
    """The Reasoner of `benchmarks.step --preset mid`, 33 frames of 384x384, bfloat16, our LoRA."""
    from diffusers import WanTransformer3DModel

    for name, config in MID.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    index = {"_class_name": "WanImageToVideoPipeline", "expand_timesteps": True}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    meta, _ = build_reasoner(str(tmp_path))
    add_lora(meta.transformer)
    size = (33, 384, 384)
    costs = ReasonerCosts.of(meta, size, (Keep.INPUT,))

    real = copy.copy(meta)
    real.transformer = cast(WanTransformer3DModel(**MID["transformer"]).requires_grad_(False), torch.bfloat16)
    real.device = torch.device("cpu")
    add_lora(real.transformer)
    _, channels, _, h, w = shape = real.latent_shape(*size)
    first = torch.randn(1, channels, 1, h, w)
    condition = Condition(torch.randn(1, 512, 512, dtype=torch.bfloat16), first, *size)
    noise = Noise(torch.randn(shape), ())
    for level, beyond in ((Keep.ALL, 1.03), (Keep.INPUT, 1.25)):  # a checkpoint holds its arguments, which no hook sees
        keep_activations(real.transformer, level)
        saved, _ = saved_bytes(lambda: real.predict_clean(condition, noise), real.transformer)
        assert saved <= costs.total([level] * 8).kept <= beyond * saved


@pytest.mark.parametrize("value", [None, "x", [1], {}])
def test_configs_of_wrong_types_are_one_line(value: Any, models: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(models["reasoner"], tmp_path / "reasoner")
    file = tmp_path / "reasoner/text_encoder/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "d_kv": value}))
    with pytest.raises(InputError, match="make no model") as error:
        build_reasoner(str(tmp_path / "reasoner"))
    assert "\n" not in str(error.value)
