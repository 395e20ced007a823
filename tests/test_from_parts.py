"""Pipelines of models that somebody else has loaded: the same numbers, and no weight is copied."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.image_processing_base import ImageProcessingMixin

from tests.reasoners import tiny_checkpoints
from tests.reasoners.tiny_cogvideox import tiny_cogvideox_pipeline
from tests.reasoners.tiny_hunyuan import tiny_hunyuan_pipeline
from tests.reasoners.tiny_hunyuan_video import tiny_hunyuan_video_pipeline
from tests.reasoners.tiny_ltx import tiny_ltx_pipeline
from tests.reasoners.tiny_ltx2 import tiny_ltx2_pipeline
from vlmteacher import InputError, TeacherPipeline, packaged_example
from vlmteacher.pipeline import PACKAGED_PAIR
from vlmteacher.reasoners.loading import adopt_reasoner, load_reasoner

QUERIES = {"goal": "Is the blue ball inside the blue box at the end?", "process": ["Is there one blue ball?"]}


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    teacher = PACKAGED_PAIR / "teacher"
    processor = SimpleNamespace(  # AutoProcessor's needs torchvision, which nothing else here does
        tokenizer=AutoTokenizer.from_pretrained(teacher),
        image_processor=ImageProcessingMixin.from_pretrained(teacher),
        video_processor=ImageProcessingMixin(**json.loads((teacher / "video_preprocessor_config.json").read_text())),
    )
    return {
        "pipeline": DiffusionPipeline.from_pretrained(PACKAGED_PAIR / "reasoner", torch_dtype=torch.float32),
        "vlm": Qwen3VLForConditionalGeneration.from_pretrained(teacher, dtype=torch.float32),
        "processor": processor,
        "decoder": PACKAGED_PAIR / "decoder.safetensors",
    }


def pointers(*networks: nn.Module) -> list[int]:
    return [weight.untyped_storage().data_ptr() for network in networks for weight in network.parameters()]


def test_the_same_steps_and_no_copied_weight(parts: dict[str, Any]) -> None:
    pipeline, vlm = parts["pipeline"], parts["vlm"]
    networks = [pipeline.transformer, pipeline.vae, pipeline.text_encoder, vlm]
    before = pointers(*networks)
    pipe = TeacherPipeline.from_parts(**parts)
    assert pipe.reasoner.transformer is pipeline.transformer and pipe.teacher.model is vlm
    prompt, image, seed, _ = packaged_example()

    def solve(pipe: TeacherPipeline) -> Any:
        size = {"teacher_frames": 12, "max_steps": 2, "learning_rate": 6e-4, "final_samples": 1, "queries": QUERIES}
        return pipe(prompt, image, generator=torch.Generator().manual_seed(seed), progress=False, **size)

    out, other = solve(pipe), solve(TeacherPipeline.from_pretrained())
    assert [row["loss"] for row in out.history] == [row["loss"] for row in other.history] and out.updates == 2
    assert pointers(*networks) == before
    assert out.models["reasoner"].endswith("reasoner") and out.models["teacher"].endswith("teacher")


@pytest.mark.parametrize("family", ["wan 2.1", "wan 2.2 a14b", "ltx", "ltx2", "hunyuan", "hunyuan video", "cogvideox"])
def test_every_family_is_adopted(family: str, tmp_path: Path) -> None:
    make: Any = {
        "wan 2.1": tiny_checkpoints.wan21_t2v,
        "wan 2.2 a14b": tiny_checkpoints.wan22_t2v_a14b,
        "ltx": tiny_ltx_pipeline,
        "ltx2": tiny_ltx2_pipeline,
        "hunyuan": tiny_hunyuan_pipeline,
        "hunyuan video": lambda path: tiny_hunyuan_video_pipeline(path, "latent_concat"),
        "cogvideox": tiny_cogvideox_pipeline,
    }[family]
    path = make(tmp_path / "model")
    pipeline = DiffusionPipeline.from_pretrained(path)
    adopted, loaded = adopt_reasoner(pipeline), load_reasoner(path)
    assert type(adopted) is type(loaded) and adopted.settings == loaded.settings
    assert adopted.networks.keys() == loaded.networks.keys() and adopted.transformer is pipeline.transformer


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pipeline": "a/b"}, "pipeline must be a loaded pipeline of diffusers, not 'a/b'"),
        ({"vlm": 3}, "vlm must be a loaded model of transformers, not 3"),
        ({"processor": None}, "processor must be that of .*teacher, with its tokenizer, not None"),
        ({"decoder": 3}, "decoder must be a path"),
        ({"preset": "wan2.2-i2v-a14b"}, "preset wan2.2-i2v-a14b is for"),
        ({"preset": "none"}, "unknown preset 'none'"),
    ],
)
def test_parts_that_are_none(parts: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TeacherPipeline.from_parts(**{**parts, **changed})
