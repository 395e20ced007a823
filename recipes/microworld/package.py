"""Stage ``package``: the pair's directory, which `TeacherPipeline.from_pretrained` opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import Qwen3VLForConditionalGeneration, UMT5EncoderModel

from recipes.microworld.reasoner import save_pipeline
from recipes.microworld.teacher.writer import attach
from recipes.microworld.training import Run, forget_origins
from vlmteacher.checkpoints.pretrained import load_network, load_tokenizer
from vlmteacher.decoders.taehv import SurrogateDecoder
from vlmteacher.microworld import world

DEFAULTS = {
    "max_steps": 60,
    "threshold": 0.03,
    "learning_rate": 1.3e-3,
    "rank": 16,
    "teacher_frames": 12,
    "final_samples": 5,
}
EXAMPLE = 192  # index of the demo's instance in the held-out split 0


def package(run: Run) -> None:
    """Write the pair's directory in half precision: the Reasoner with its refined VAE, the decoder, the Teacher."""
    half, pair, source = torch.float16, run.out, run.path("distil/pipeline")
    pair.mkdir(parents=True, exist_ok=True)

    def halved(network: type, path: Path) -> Any:
        return load_network(network, path, dtype=torch.float32).to(half)

    save_pipeline(
        pair / "reasoner",
        halved(WanTransformer3DModel, source / "transformer"),
        halved(UMT5EncoderModel, source / "text_encoder"),
        load_tokenizer(source / "tokenizer"),
        halved(AutoencoderKLWan, run.path("vae_decoder/vae")),
    )
    many_step = halved(WanTransformer3DModel, run.path("reasoner/reasoner") / "transformer")
    many_step.save_pretrained(pair / "many_step")
    decoder = SurrogateDecoder.from_checkpoint(run.path("decoder/decoder.safetensors"))
    decoder.to(half).save(pair / "decoder.safetensors")
    teacher = run.path("point/teacher")
    shutil.copytree(teacher, pair / "teacher", dirs_exist_ok=True)
    load_network(Qwen3VLForConditionalGeneration, teacher, dtype=half).save_pretrained(pair / "teacher")
    attach(run.path("writer/writer"), pair / "teacher")
    forget_origins(pair)
    scene, prompt = world.instance(EXAMPLE, seed=0)
    description = {
        "reasoner": "reasoner",
        "teacher": "teacher",
        "decoder": "decoder.safetensors",
        "many_step": "many_step",
        "defaults": DEFAULTS,
        "example": {"prompt": prompt, "scene": scene.to_json(), "seed": 0},
    }
    (pair / "pair.json").write_text(json.dumps(description, indent=2) + "\n")
