from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.planning.counting import saved_bytes, stock_count
from vlmteacher.planning.costs import measure
from vlmteacher.planning.models import PACKAGED, build_teacher
from vlmteacher.planning.teacher import Video, language_costs, query_set, vision_costs, visual_features
from vlmteacher.teachers import load_teacher, shared_prefix
from vlmteacher.teachers.prompt import Clip
from vlmteacher.teachers.visual_checkpoint import stream


def test_teacher_costs_are_those_of_the_real_teacher() -> None:
    real: Any = load_teacher(str(PACKAGED / "teacher"))
    real.attention_backend = "sdpa"  # as on a GPU
    video = Video(tuple(range(0, 16, 2)), 8.0, 64, 96)
    meta = build_teacher("packaged", torch.float32)
    size = real.resized(8, 64, 96)
    frames = torch.rand(8, 3, 64, 96).requires_grad_()

    whole = vision_costs(meta, video, [2, 8])
    forward = stock_count(lambda: real.encode(frames, size))
    both = stock_count(lambda: sum(t.sum() for t in real.encode(frames, size)).backward())
    assert (whole[8].forward, whole[8].forward + whole[8].backward) == (forward, both)
    saved, outputs = saved_bytes(lambda: real.encode(frames, size), real.model)
    assert saved <= whole[8].kept <= 1.1 * saved + sum(t.nbytes for t in outputs)
    assert whole[2].repeated == forward and whole[2].backward == whole[8].backward + forward
    assert whole[2].backward_bytes < whole[8].backward_bytes
    leaf = video.frames(torch.float32)
    streamed = measure(lambda: list(stream(lambda x: meta.encode(x, size), leaf, 2)), [meta.model], [leaf])
    assert (whole[2].forward, whole[2].backward) == (streamed.forward, streamed.backward)
    assert whole[2].kept == pytest.approx(streamed.kept, rel=0.01)
    assert streamed.backward_bytes <= whole[2].backward_bytes <= 1.2 * streamed.backward_bytes
    assert streamed.forward_bytes <= whole[2].forward_bytes <= 1.2 * streamed.forward_bytes

    costs = language_costs(meta, video, 3)
    clip = Clip(video.indices, video.fps, size)
    layout = real.layout(clip, query_set(3))
    features = [torch.randn(t.shape).requires_grad_() for t in visual_features(meta, video)]

    def losses() -> Tensor:
        head = real.model.get_output_embeddings()
        return shared_prefix.answer_losses(real.language, head, layout, features[0], features[1:], 2**62, "sdpa")

    everything = costs[shared_prefix.Keep.ALL]
    assert everything.forward == stock_count(losses)
    saved, _ = saved_bytes(losses, real.model)
    assert everything.kept == pytest.approx(saved, rel=0.1)  # the CPU's attention keeps repeated keys and values
    assert costs[shared_prefix.Keep.INPUT].kept < costs[shared_prefix.Keep.ATTENTION].kept < everything.kept
    assert 0 == everything.repeated < costs[shared_prefix.Keep.ATTENTION].repeated
    assert costs[shared_prefix.Keep.ATTENTION].repeated < costs[shared_prefix.Keep.INPUT].repeated <= everything.forward
