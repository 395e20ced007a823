"""The demo gives the same losses through the fused decoder as through the plain modules."""

from __future__ import annotations

import torch
from PIL import Image

from vlmteacher import TeacherPipeline
from vlmteacher.decoders import TinyVideoDecoder
from vlmteacher.microworld.world import Scene, render
from vlmteacher.ops import tiny_decoder
from vlmteacher.pipeline import TeacherPipelineOutput, read_pair


def test_the_demo_losses_are_those_of_the_plain_decoder(monkeypatch):
    example = read_pair()[1]["example"]
    image = Image.fromarray(TeacherPipelineOutput.uint8(render(Scene.from_json(example["scene"]))[:1])[0])
    pipe = TeacherPipeline.from_pretrained()

    def run() -> list[dict]:
        generator = torch.Generator().manual_seed(example["seed"])
        return pipe(example["prompt"], image, generator=generator, max_steps=3, progress=False).history

    calls = []
    inner = tiny_decoder.decode
    monkeypatch.setattr(tiny_decoder, "decode", lambda *given: calls.append(given) or inner(*given))
    ours = run()
    assert len(calls) == len(ours) == 3
    monkeypatch.setattr(
        TinyVideoDecoder, "decode", lambda self, latents, indices: self.decode_batch(latents)[0][list(indices)]
    )
    plain = run()
    assert len(calls) == 3
    for a, b in zip(ours, plain, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-4
        assert abs(a["grad_norm"] - b["grad_norm"]) <= 1e-3 * b["grad_norm"]
