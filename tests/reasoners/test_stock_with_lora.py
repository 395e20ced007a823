"""A LoRA that was trained here, loaded by diffusers' own pipelines: the same video from the same latents."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.reasoners import tiny_checkpoints, tiny_hunyuan, tiny_hunyuan_video, tiny_ltx
from vlmteacher.lora.adapter import add_lora, export_lora, lora_parameters
from vlmteacher.lora.formats import read_lora
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.reasoners.sampling import SamplerSettings

PROMPT = "move the red ball to the box"
# family -> writer of its checkpoint, pipeline class, size, whether there is an image, key styles that diffusers reads
CASES = {
    "Wan 2.1 T2V": (tiny_checkpoints.wan21_t2v, "WanPipeline", tiny_checkpoints.SIZE, False, ("diffusers", "musubi")),
    "Wan 2.1 I2V": (
        *(tiny_checkpoints.wan21_i2v, "WanImageToVideoPipeline", tiny_checkpoints.SIZE, True),
        ("diffusers", "comfyui"),
    ),
    "Wan 2.2 TI2V": (
        *(tiny_checkpoints.wan22_ti2v, "WanImageToVideoPipeline", tiny_checkpoints.SIZE, True),
        ("diffusers", "musubi"),
    ),
    "Wan 2.2 A14B": (tiny_checkpoints.wan22_t2v_a14b, "WanPipeline", tiny_checkpoints.SIZE, False, ("diffusers",)),
    "Wan VACE": (tiny_checkpoints.wan_vace, "WanVACEPipeline", tiny_checkpoints.SIZE, False, ("diffusers",)),
    "Wan-like SkyReels-V2": (
        *(tiny_checkpoints.skyreels_t2v, "SkyReelsV2Pipeline", tiny_checkpoints.SIZE, False),
        ("diffusers", "comfyui"),
    ),
    "Wan-like ChronoEdit": (
        *(tiny_checkpoints.chronoedit, "ChronoEditPipeline", tiny_checkpoints.SIZE, True),
        ("diffusers",),
    ),
    "LTX-Video": (tiny_ltx.tiny_ltx_pipeline, "LTXConditionPipeline", tiny_ltx.SIZE, True, ("diffusers", "comfyui")),
    "HunyuanVideo-1.5": (
        *(tiny_hunyuan.tiny_hunyuan_pipeline, "HunyuanVideo15ImageToVideoPipeline", tiny_hunyuan.SIZE, True),
        ("diffusers",),
    ),
    "HunyuanVideo": (
        *(tiny_hunyuan_video.tiny_hunyuan_video_pipeline, "HunyuanVideoPipeline", tiny_hunyuan_video.SIZE, False),
        ("diffusers",),  # its loader splits joint layers for the published width only
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_stock_pipeline_makes_the_same_video(family, tmp_path):
    write, kind, (frames, height, width), with_image, styles = CASES[family]
    directory = write(tmp_path / "checkpoint")
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels) if with_image else None
    reasoner = load_reasoner(directory)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0 if family.startswith("Hunyuan") else 1.0)
    scheduler.set_timesteps(4)
    timesteps = scheduler.timesteps.tolist() if family.startswith("Wan") else (1000, 750, 500, 250)
    text = 512 if family.startswith("Wan") else 1000  # Wan 2.1 I2V counts on its own
    reasoner.settings = SamplerSettings(
        tuple(timesteps), shift=scheduler.config.shift, sampler="euler", fps=24.0, max_sequence_length=text
    )
    if family == "HunyuanVideo":
        reasoner.settings = replace(reasoner.settings, embedded_guidance=1.0)
    condition = reasoner.encode(PROMPT, image, frames, height, width)
    noise = reasoner.noise(condition, torch.Generator().manual_seed(7))
    base = reasoner.sample(condition, noise)
    add_lora(reasoner.transformer, rank=4, alpha=6.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(reasoner.transformer):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    ours = reasoner.sample(condition, noise)
    assert (ours - base).std() > 1e-3

    given = {"prompt": PROMPT, "num_frames": frames, "num_inference_steps": 4, "output_type": "latent"}
    given |= {"image": image} if with_image else {}
    if family != "HunyuanVideo-1.5":
        given |= {"height": height, "width": width, "guidance_scale": 1.0, "max_sequence_length": text}
    if family == "LTX-Video":
        given |= {"frame_rate": 24, "image_cond_noise_scale": 0.0, "timesteps": list(timesteps)}
    for style in styles:
        path = tmp_path / f"{style}.safetensors"
        path.write_bytes(read_lora(export_lora(reasoner.transformer)).to_bytes(style))
        pipe = getattr(diffusers, kind).from_pretrained(directory, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        if family == "HunyuanVideo-1.5":  # has no loader of its own
            pipe.transformer.load_lora_adapter(tmp_path, weight_name=path.name, prefix="transformer")
        else:
            pipe.load_lora_weights(tmp_path, weight_name=path.name)
        if family == "LTX-Video":  # draws what `noise` drew
            theirs = pipe(generator=torch.Generator().manual_seed(7), **given).frames
        else:
            theirs = pipe(latents=noise.z1.clone(), **given).frames
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
