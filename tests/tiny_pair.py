"""Random models of the real classes that fit together, as the files that `--reasoner` and the like take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny_models import tiny_wan_pipeline
from tests.tiny_teacher import tiny_qwen3_vl
from vlmteacher.decoders.taehv import SurrogateDecoder

PROMPT = "move the red ball to the green square"
QUERIES = {"goal": "Is the ball on the square?", "process": ["Is there one ball?", "Does it move?"]}


def tiny_decoder(path: Path, latent_channels: int = 8, **layout: Any) -> Path:
    """Save a random decoder, of the tiny Wan's latents if `layout` does not say otherwise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = SurrogateDecoder(
            latent_channels, (16, 16, 8, 8), **({"patch": 2, "space_upscale": (True, True, False)} | layout)
        )
        with torch.no_grad():
            decoder.decoder[-1].bias.fill_(0.5)  # mid grey: away from the clamp, where gradients would be lost
            decoder.decoder[-1].weight.mul_(30)
    decoder.save(path)
    return path


def tiny_pair(path: Path) -> dict[str, str]:
    """Write the three models under `path`; keywords of `TeacherPipeline.from_pretrained`."""
    return {
        "reasoner": str(tiny_wan_pipeline(path / "reasoner")),
        "teacher": str(tiny_qwen3_vl(path / "teacher")),
        "decoder": str(tiny_decoder(path / "decoder.safetensors")),
    }
