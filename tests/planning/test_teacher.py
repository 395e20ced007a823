from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.planning.counting import saved_bytes, stock_count
from tests.tiny_teacher import (
    tiny_glm4v,
    tiny_glm4v_moe,
    tiny_internvl,
    tiny_qwen3_5,
    tiny_qwen3_5_moe,
    tiny_qwen3_vl,
    tiny_qwen3_vl_moe,
    tiny_qwen25_vl,
    tiny_smolvlm,
)
from vlmteacher.planning.costs import measure
from vlmteacher.planning.models import PACKAGED, build_teacher, known_models
from vlmteacher.planning.teacher import (
    GOAL,
    Video,
    language_costs,
    query_set,
    stock_reader,
    stock_teacher_cost,
    vision_costs,
    visual_features,
)
from vlmteacher.teachers import load_teacher, shared_prefix
from vlmteacher.teachers.prompt import Clip
from vlmteacher.teachers.shared_prefix import Keep
from vlmteacher.teachers.visual_checkpoint import stream

FAMILIES = {
    "qwen3_vl": tiny_qwen3_vl,
    "qwen3_vl_moe": tiny_qwen3_vl_moe,
    "qwen3_5": tiny_qwen3_5,
    "qwen3_5_moe": tiny_qwen3_5_moe,
    "qwen2_5_vl": tiny_qwen25_vl,
    "internvl": tiny_internvl,
    "glm4v": tiny_glm4v,
    "glm4v_moe": tiny_glm4v_moe,
    "smolvlm": tiny_smolvlm,
}


def load(family: str, path: Path) -> Any:
    """The packaged Teacher, or a tiny one; with experts in bfloat16: on the meta device torch multiplies no others."""
    if family == "packaged":
        return load_teacher(str(PACKAGED / "teacher"))
    return load_teacher(FAMILIES[family](path), torch.bfloat16 if "moe" in family else torch.float32)


def on_meta(real: Any) -> Any:
    """The same Teacher, tokenizer included, without its weights' values."""
    return type(real)(copy.deepcopy(real.model).to("meta"), real.tokenizer, real.video)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["packaged", *FAMILIES])
def test_teacher_costs_are_those_of_the_real_teacher(family: str, tmp_path: Path) -> None:
    real = load(family, tmp_path)
    dtype = real.model.dtype
    real.attention_backend = "sdpa"  # as on a GPU
    video = Video(tuple(range(0, 16, 2)), 8.0, 64, 96)
    meta = build_teacher("packaged", torch.float32) if family == "packaged" else on_meta(real)
    size = real.resized(8, 64, 96)
    frames = torch.rand(8, 3, 64, 96, dtype=dtype).requires_grad_()

    whole = vision_costs(meta, video, [2, 8])
    forward = stock_count(lambda: real.encode(frames, size))
    both = stock_count(lambda: sum(t.sum() for t in real.encode(frames, size)).backward())
    assert (whole[8].forward, whole[8].forward + whole[8].backward) == (forward, both)
    saved, outputs = saved_bytes(lambda: real.encode(frames, size), real.model)
    assert saved <= whole[8].kept <= 1.1 * saved + sum(t.nbytes for t in outputs)
    assert whole[2].repeated == forward and whole[2].backward == whole[8].backward + forward
    assert family != "packaged" or whole[2].backward_bytes < whole[8].backward_bytes  # in tiny ones frames are most
    leaf = video.frames(dtype)
    streamed = measure(lambda: list(stream(lambda x: meta.encode(x, size), leaf, 2)), [meta.model], [leaf])
    assert (whole[2].forward, whole[2].backward) == (streamed.forward, streamed.backward)
    assert whole[2].kept == pytest.approx(streamed.kept, rel=0.01)
    assert streamed.backward_bytes <= whole[2].backward_bytes <= 1.2 * streamed.backward_bytes
    assert streamed.forward_bytes <= whole[2].forward_bytes <= 1.2 * streamed.forward_bytes

    costs = language_costs(meta, video, 3)
    clip = Clip(video.indices, video.fps, size)
    layout = real.layout(clip, query_set(3))
    features = [torch.randn_like(t, device="cpu").requires_grad_() for t in visual_features(meta, video)]

    def losses() -> Tensor:
        parts = real.language, real.model.get_output_embeddings(), layout, features[0], features[1:]
        return shared_prefix.answer_losses(*parts, Keep.ALL, "sdpa", real.decoder)

    everything = costs[Keep.ALL]
    assert everything.forward == stock_count(losses)
    saved, _ = saved_bytes(losses, real.model)
    # the CPU's attention keeps its masks, and keys and values repeated to the queries' heads: much in tiny models
    assert everything.kept == pytest.approx(saved, rel=0.1 if family == "packaged" else 0.4)
    assert costs[Keep.INPUT].kept < costs[Keep.ATTENTION].kept < everything.kept
    assert 0 == everything.repeated < costs[Keep.ATTENTION].repeated
    assert costs[Keep.ATTENTION].repeated < costs[Keep.INPUT].repeated <= everything.forward


@pytest.mark.parametrize("family", ["packaged", *FAMILIES])
def test_stock_costs_are_those_of_the_real_model(family: str, tmp_path: Path) -> None:
    real = load(family, tmp_path)
    dtype = real.model.dtype
    video = Video((0, 3, 6, 9, 12), 8.0, 64, 96)
    vision, language = stock_teacher_cost(on_meta(real), video)
    clip = video.clip(real)
    frames = torch.rand(5, 3, 64, 96, requires_grad=True)
    encode, read = real.stock_encoder(clip), stock_reader(real, clip, GOAL)
    features = encode(frames)
    for ours, stock in zip(real.encode(frames, clip.size), features, strict=True):
        close = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(ours, stock, atol=close, rtol=close)
    forward = stock_count(lambda: encode(frames))
    assert (vision.forward, vision.forward + vision.backward) == (
        forward,
        stock_count(lambda: sum(t.sum() for t in encode(frames)).backward()),
    )
    leaves = [t.detach().requires_grad_() for t in features]
    assert language.forward == stock_count(lambda: read(leaves))
    assert language.forward + language.backward == stock_count(lambda: read(leaves).sum().backward())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_of_each_family(family: str, tmp_path: Path) -> None:
    """Only its configs are read; the text is that of the packaged tokenizer."""
    path = FAMILIES[family](tmp_path)
    real: Any = load_teacher(path)
    (path / "model.safetensors").unlink()
    meta = build_teacher(str(path), torch.float32)
    shapes = [{name: p.shape for name, p in teacher.model.named_parameters()} for teacher in (real, meta)]
    assert shapes[0] == shapes[1] and meta.video == real.video
    clip = real.clip(range(5), 8.0, 64, 96)
    layouts = [teacher.layout(clip, query_set(3)) for teacher in (real, meta)]
    assert len(layouts[0].video) == len(layouts[1].video) > 0


# billions of parameters, of the published checkpoints
PUBLISHED = {
    "qwen3-vl-2b": 2.13,
    "qwen3-vl-4b": 4.44,
    "qwen3-vl-8b": 8.77,
    "qwen3-vl-32b": 33.36,
    "qwen3-vl-30b-a3b": 31.07,
    "qwen3.5-0.8b": 0.85,
    "qwen3.5-4b": 4.54,
    "qwen3.5-9b": 9.41,
    "qwen3.5-27b": 27.36,
    "qwen3.5-35b-a3b": 35.11,
    "qwen2.5-vl-3b": 3.75,
    "qwen2.5-vl-7b": 8.29,
    "qwen2.5-vl-32b": 33.45,
    "glm-4.1v-9b": 10.29,
    "glm-4.5v": 107.71,
    "internvl3-1b": 0.94,
    "internvl3-2b": 2.09,
    "internvl3-8b": 7.94,
    "internvl3-14b": 15.12,
    "internvl3.5-1b": 1.06,
    "internvl3.5-2b": 2.35,
    "internvl3.5-4b": 4.73,
    "internvl3.5-8b": 8.53,
    "internvl3.5-14b": 15.12,
    "internvl3.5-30b-a3b": 30.85,
    "smolvlm2-256m": 0.26,
    "smolvlm2-500m": 0.51,
    "smolvlm2-2.2b": 2.25,
}


def test_known_teachers_have_the_published_sizes() -> None:
    assert known_models("teacher") == sorted(PUBLISHED)
    for name, billions in PUBLISHED.items():
        teacher = build_teacher(name)
        assert sum(p.numel() for p in teacher.model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)
        sizes = ((704, 1280), (700, 1288), (448, 448), (512, 512), (378, 378))
        assert teacher.clip(range(24), 8.0, 704, 1280).size in sizes
