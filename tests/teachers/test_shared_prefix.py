import types

import pytest
import torch
from torch import nn

from benchmarks.memory import saved_bytes
from tests.tiny_teacher import tiny_qwen3_vl
from vlmteacher.errors import InputError
from vlmteacher.ops.linear import is_plain
from vlmteacher.queries import QuerySet
from vlmteacher.teachers import load_teacher
from vlmteacher.teachers.shared_prefix import LLAMA, Keep, keep_level, kept_bytes


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tiny_qwen3_vl(tmp_path_factory.mktemp("teacher")))


def test_layers_keep_what_the_budget_allows(teacher):
    layers = teacher.language.layers
    levels = [keep_level(layers, 100, budget) for budget in (0, 300_000, 10**9)]
    assert levels == [Keep.INPUT, Keep.ATTENTION, Keep.ALL]
    assert [keep_level(layers, 100, size) for size in kept_bytes(layers, 100).values()] == [*Keep]


def test_less_is_saved_level_by_level(teacher):
    frames = torch.rand(4, 3, 32, 48, requires_grad=True)
    queries = QuerySet("Is it red?", ("Is it?",))
    sizes = []
    tokens = teacher.layout(teacher.clip(range(4), 8.0, 32, 48), queries).tokens
    for budget in (10**9, 2500 * tokens, 0):
        teacher.activation_bytes = budget
        size, _ = saved_bytes(lambda: teacher.losses(frames, range(4), 8.0, queries), list(teacher.model.parameters()))
        sizes.append(size)
    teacher.activation_bytes = None
    assert sizes[0] > sizes[1] > sizes[2]


class Quantised(nn.Linear):
    """A linear layer of another class, which computes its input's gradient itself."""

    def forward(self, x):
        return super().forward(x) + 0


def test_other_linear_layers_give_the_same_gradient(teacher, tmp_path):
    other = load_teacher(tiny_qwen3_vl(tmp_path))
    for module in other.model.model.language_model.modules():
        for child in list(module.children()):
            if is_plain(child):
                child.__class__ = Quantised
    assert type(other.model.model.language_model.layers[0].mlp.up_proj) is Quantised
    frames = torch.rand(3, 3, 32, 48, requires_grad=True)
    queries = QuerySet("Is it red?", ("Is it?",))
    a, b = (torch.autograd.grad(t.losses(frames, range(3), 8.0, queries).sum(), frames)[0] for t in (teacher, other))
    assert (a - b).norm() < 1e-5 * a.norm()


def test_torchs_attention_gives_the_same_gradient(teacher, monkeypatch):
    frames = torch.rand(4, 3, 32, 48, requires_grad=True)
    queries = QuerySet("Is it red?", ("Is it?", "Does the ball move?"))
    results = []
    for backend in (None, "sdpa"):
        monkeypatch.setattr(teacher, "attention_backend", backend)
        losses = teacher.losses(frames, range(4), 8.0, queries)
        results.append((losses.detach(), torch.autograd.grad(losses.sum(), frames)[0]))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 1e-5 * a.norm()
    monkeypatch.setattr(teacher, "attention_backend", "fast")
    with pytest.raises(InputError, match="unknown attention backend 'fast': choose from native, sdpa"):
        teacher.losses(frames, range(4), 8.0, queries)


def test_rotary_frequencies_stay_in_float32(tmp_path):
    moved = load_teacher(tiny_qwen3_vl(tmp_path))
    before = {name: value.clone() for name, value in moved.model.named_buffers() if "inv_freq" in name}
    moved.to(dtype=torch.bfloat16)
    after = {name: value for name, value in moved.model.named_buffers() if "inv_freq" in name}
    assert moved.model.dtype == torch.bfloat16 and before.keys() == after.keys() and before
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.float32 for name in before)


def test_other_language_models_are_refused(teacher):
    part = types.SimpleNamespace
    with pytest.raises(InputError, match=r"'other': its language model has no input_layernorm\.variance_epsilon"):
        LLAMA.check(part(layers=[nn.Identity()], config=part()), "other")
    sliding = part(layers=teacher.language.layers, config=part(layer_types=["full_attention", "sliding_attention"]))
    with pytest.raises(InputError, match="sliding windows"):
        LLAMA.check(sliding, "other")
