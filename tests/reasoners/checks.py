"""Checks that the tests of several Reasoner families share."""

from __future__ import annotations

import torch

from vlmteacher.lora.adapter import add_lora
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.checkpointing import Keep, keep_activations
from vlmteacher.reasoners.condition import Condition, Noise


def check_kept_levels(reasoner: Reasoner, condition: Condition, noise: Noise) -> None:
    """Check that the LoRA's gradient has the same bits at every activation level."""
    add_lora(reasoner.transformer, rank=2, seed=0)
    gradients = []
    for level in Keep:
        keep_activations(reasoner.transformer, level)
        reasoner.predict_clean(condition, noise).square().sum().backward()
        found = [p for n, p in reasoner.transformer.named_parameters() if "lora_B" in n and p.grad is not None]
        gradients.append(torch.cat([p.grad.flatten() for p in found]))
        reasoner.transformer.zero_grad()
    assert gradients[0].abs().max() > 0 and all(torch.equal(g, gradients[0]) for g in gradients[1:])
