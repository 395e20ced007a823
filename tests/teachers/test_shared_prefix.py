import types

import pytest
import torch
from torch import nn

from benchmarks.memory import saved_bytes
from tests.tiny_teacher import tiny_qwen3_vl
from vlmteacher.errors import InputError
from vlmteacher.queries import QuerySet
from vlmteacher.teachers import load_teacher
from vlmteacher.teachers.shared_prefix import Keep, check_language, how_much, lay_out, shared_length
from vlmteacher.teachers.vlm import LAYOUTS_KEPT, Clip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tiny_qwen3_vl(tmp_path_factory.mktemp("teacher")))


def angles(ids):
    """Not angles: what position it is, so that the test can read it back."""
    places = torch.arange(ids.shape[1]).float()[:, None].expand(-1, 4)
    return places, -places


@pytest.mark.parametrize(
    ("rows", "length"), [([[1, 2, 3], [1, 2, 4], [1, 2, 3, 9]], 2), ([[5]], 1), ([[1], [2]], 0), ([[1, 2], [1, 2]], 2)]
)
def test_shared_length(rows, length):
    assert shared_length(rows) == length


def test_a_layout_is_the_agreed_one():
    chats = [([9, 7, 7, 1, 2], [50]), ([9, 7, 7, 3], [50, 51])]
    layout = lay_out(chats, 7, angles, CPU)
    assert layout.ids.tolist() == [9, 7, 7, 1, 2, 3, 50] and layout.prefix == 3 and layout.questions == 2
    assert layout.cos[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 3, 4]  # positions restart after the prefix
    assert layout.video.tolist() == [1, 2]
    assert layout.answers.tolist() == [4, 5, 6] and layout.targets.tolist() == [50, 50, 51]
    assert layout.owners.tolist() == [0, 1, 1]
    assert layout.sees.rest.int().tolist() == [
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 0],
        [1, 1, 1, 0, 0, 1, 1],
    ]
    assert torch.equal(layout.sees.mask()[:3], torch.ones(3, 7).tril().bool())
    assert torch.equal(layout.answers_see.mask(), layout.sees.rest[[1, 2, 3]])


def test_one_question_is_all_prefix_and_equal_ones_keep_a_position_each():
    one = lay_out([([9, 7, 1], [50])], 7, angles, CPU)
    assert one.prefix == 3 and len(one.sees.rest) == 0 and one.answers.tolist() == [2]
    same = lay_out([([9, 7, 1], [50])] * 2, 7, angles, CPU)
    assert same.ids.tolist() == [9, 7, 1, 1] and same.answers.tolist() == [2, 3]


def test_layers_keep_what_the_budget_allows(teacher):
    layers = teacher.language.layers
    levels = [how_much(layers, 100, budget, CPU) for budget in (0, 300_000, 10**9)]
    assert levels == [Keep.INPUT, Keep.ATTENTION, Keep.ALL]
    assert how_much(layers, 100, None, CPU) == Keep.ALL


def test_less_is_saved_level_by_level(teacher):
    frames = torch.rand(4, 3, 32, 48, requires_grad=True)
    queries = QuerySet("Is it red?", ("Is it?",))
    sizes = []
    tokens = len(teacher._layout(Clip((0, 1, 2, 3), 8.0, (32, 48)), queries).ids)
    for budget in (10**9, 2500 * tokens, 0):
        teacher.activation_bytes = budget
        size, _ = saved_bytes(lambda: teacher.losses(frames, range(4), 8.0, queries), list(teacher.model.parameters()))
        sizes.append(size)
    teacher.activation_bytes = None
    assert sizes[0] > sizes[1] > sizes[2]


class Quantised(nn.Linear):
    """Any other linear layer than torch's own is asked for its input's gradient."""

    def forward(self, x):
        return super().forward(x) + 0


def test_other_linear_layers_give_the_same_gradient(teacher, tmp_path):
    other = load_teacher(tiny_qwen3_vl(tmp_path))
    for module in other.model.model.language_model.modules():
        for child in list(module.children()):
            if type(child) is nn.Linear:
                child.__class__ = Quantised
    frames = torch.rand(3, 3, 32, 48, requires_grad=True)
    queries = QuerySet("Is it red?", ("Is it?",))
    a, b = (torch.autograd.grad(t.losses(frames, range(3), 8.0, queries).sum(), frames)[0] for t in (teacher, other))
    assert (a - b).norm() < 1e-5 * a.norm()


def test_torchs_attention_gives_the_same_gradient(teacher, monkeypatch):
    frames = torch.rand(4, 3, 32, 48, requires_grad=True)
    queries = QuerySet("Is it red?", ("Is it?", "Does the ball move?"))
    found = []
    for backend in (None, "sdpa"):
        monkeypatch.setattr(teacher, "attention_backend", backend)
        losses = teacher.losses(frames, range(4), 8.0, queries)
        found.append((losses.detach(), torch.autograd.grad(losses.sum(), frames)[0]))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < 1e-5 * a.norm()
    monkeypatch.setattr(teacher, "attention_backend", "fast")
    with pytest.raises(InputError, match="'fast' is none of native, sdpa"):
        teacher.losses(frames, range(4), 8.0, queries)


def test_layouts_are_kept_but_not_all(teacher):
    frames = torch.rand(2, 3, 32, 32)
    for index in range(LAYOUTS_KEPT + 2):
        teacher.losses(frames, range(2), 8.0, QuerySet(f"Is it {index}?"))
    assert len(teacher._layouts) == LAYOUTS_KEPT
    clip = Clip((0, 1), 8.0, (32, 32))
    queries = QuerySet(f"Is it {LAYOUTS_KEPT + 1}?")
    assert teacher._layout(clip, queries) is teacher._layout(clip, queries)


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
        check_language(part(layers=[nn.Identity()], config=part()), "other")
    sliding = part(layers=teacher.language.layers, config=part(layer_types=["full_attention", "sliding_attention"]))
    with pytest.raises(InputError, match="sliding windows"):
        check_language(sliding, "other")
