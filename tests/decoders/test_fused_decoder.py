"""The fused decoder where it is used: in the optimisation of the packaged pair, and beside a training."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.decoders.test_taehv import PACKAGED, WAN22, random_decoder
from vlmteacher.decoders import SurrogateDecoder
from vlmteacher.lora.adapter import add_lora, remove_lora
from vlmteacher.microworld.example import packaged_example
from vlmteacher.ops.patchify import PatchLayout, PatchRows
from vlmteacher.optimization.loop import Optimization
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.queries import QuerySet
from vlmteacher.settings import Settings

LIKE_THE_DEMO = {"max_steps": 3, "threshold": 1e-6, "teacher_frames": 12, "learning_rate": 6e-4, "rank": 16}


class Plain:
    """The decoder as it was: the whole clip by the plain module, then the frames that are wanted."""

    def __init__(self, decoder: SurrogateDecoder) -> None:
        self.decoder, self.spatial_stride = decoder, decoder.spatial_stride

    def decode_rows(
        self, latents: Tensor, layout: PatchLayout, indices: list[int], *rest: Any, **how: Any
    ) -> PatchRows:
        frames = plain(self.decoder, latents, indices)
        return PatchRows(layout.of(frames), layout, len(frames), *frames.shape[-2:])


def plain(decoder: SurrogateDecoder, z: Tensor, indices: list[int] | None = None) -> Tensor:
    frames = decoder.decode_batch(z)[0]
    return frames if indices is None else frames[indices]


def test_follows_changed_weights_and_trains_by_the_plain_module() -> None:
    decoder = random_decoder(**PACKAGED)
    z = torch.randn(1, 24, 2, 2, 2, requires_grad=True)
    before = decoder.decode(z)
    with torch.no_grad():
        decoder.decoder[8].weight.mul_(2)
    after = decoder.decode(z)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, plain(decoder, z), atol=1e-5, rtol=0)
    decoder.requires_grad_(True)
    decoder.decode(z, [1]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def test_the_paper_s_size_without_data() -> None:
    """24 of 89 frames of 704x1280 on fake tensors: shapes, and a fiftieth of the 15 GB that the plain module keeps."""
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t
        return t

    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        decoder = SurrogateDecoder(**WAN22).requires_grad_(False)
        z = torch.empty(1, 48, 23, 44, 80, requires_grad=True)
        frames = decoder.decode(z, [round(k * 88 / 23) for k in range(24)])
        (grad,) = torch.autograd.grad(frames, z, torch.empty_like(frames))
    assert frames.shape == (24, 3, 704, 1280) and grad.shape == z.shape
    assert 0.2e9 < sum(t.untyped_storage().nbytes() for t in kept.values()) < 0.3e9


def test_the_packaged_pair_learns_the_same() -> None:
    """Three steps of the demo: losses and the LoRA's gradient as with the plain module."""
    pipe = TeacherPipeline.from_pretrained()
    prompt, image, *_ = packaged_example()
    queries = QuerySet.from_dict({"goal": "Did the ball reach the box?", "process": ["Is one ball shown?"]})
    condition = pipe.reasoner.encode(prompt, image, 13, 64, 64)
    noise = pipe.reasoner.noise(condition, torch.Generator().manual_seed(0))
    seen = []
    for decoder in (pipe.decoder, Plain(pipe.decoder)):
        add_lora(pipe.reasoner.transformer, 16, seed=0)
        loop = Optimization(pipe.reasoner, decoder, pipe.teacher, condition, noise, queries, Settings(**LIKE_THE_DEMO))
        seen.append([(row["loss"], row["grad_norm"]) for row in loop])
        remove_lora(pipe.reasoner.transformer)
    ours, theirs = seen
    assert len(ours) == 3 and ours[0][0] != ours[2][0]
    assert ours == [pytest.approx(row, abs=1e-4, rel=1e-4) for row in theirs]
