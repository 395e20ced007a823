import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import saved_bytes
from benchmarks.teacher import Flops
from tests.tiny_teacher import tiny_qwen3_vl
from vlmteacher.ops.elementwise import rotate
from vlmteacher.queries import QuerySet
from vlmteacher.teachers import load_teacher
from vlmteacher.teachers.preprocessing import preprocess_video
from vlmteacher.teachers.visual_checkpoint import attend, attend_segments, stream


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    vision = {"depth": 12, "hidden_size": 128, "intermediate_size": 256, "num_heads": 2}
    path = tiny_qwen3_vl(tmp_path_factory.mktemp("deep"), vision=vision)
    return load_teacher(path, dtype=torch.bfloat16)


class Calls(TorchDispatchMode):
    """Counts the runs of an operator."""

    def __init__(self, name):
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ == self.name
        return func(*args, **(kwargs or {}))


def gradients(teacher, frames, step, size):
    frames = frames.detach().requires_grad_()
    outputs = stream(lambda chunk: teacher.encode(chunk, size), frames, step)
    (gradient,) = torch.autograd.grad(outputs, frames, [torch.ones_like(x) for x in outputs])
    return *outputs, gradient


@pytest.mark.parametrize("count", [2, 5, 8])
def test_a_stream_equals_the_whole(teacher, count):
    frames = torch.rand(count, 3, 32, 48)
    whole = gradients(teacher, frames, 100, (32, 48))
    for step in (2, 4):
        for a, b in zip(gradients(teacher, frames, step, (32, 48)), whole, strict=True):
            assert (a - b).norm() <= 0.02 * b.norm()  # bfloat16: a product's rounding depends on its rows


def test_the_encoder_keeps_at_most_an_eighth_of_what_stock_keeps(teacher):
    size = (32, 48)
    frames = torch.rand(24, 3, *size, requires_grad=True)
    pixels, grid = preprocess_video(frames, teacher.video)
    weights = list(teacher.model.parameters())
    visual = teacher.visual
    stock, out = saved_bytes(lambda: visual(pixels.bfloat16(), grid_thw=grid, return_dict=True), weights)
    ours, outputs = saved_bytes(lambda: stream(lambda x: teacher.encode(x, size), frames, 2), weights)
    stock += out.pooler_output.nbytes + sum(x.nbytes for x in out.deepstack_features)
    ours += sum(x.nbytes for x in outputs)
    assert frames.nbytes < ours < stock / 8


def test_without_gradients_nothing_is_kept(teacher):
    frames = torch.rand(6, 3, 32, 48)
    kept, outputs = saved_bytes(lambda: stream(lambda x: teacher.encode(x, (32, 48)), frames, 2), [])
    assert kept == 0 and not outputs[0].requires_grad


def test_rotation_equals_the_formula_and_saves_no_input():
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64, requires_grad=True).float().detach().requires_grad_()
    angle = torch.randn(7, 1, 4)
    cos, sin = (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))
    a, b = x.chunk(2, -1)
    want = x * cos + torch.cat([-b, a], -1) * sin
    kept, got = saved_bytes(lambda: rotate(x, angle.cos(), angle.sin()), [])
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(got, x, grad)[0], torch.autograd.grad(want, x, grad)[0])
    assert kept <= 2 * angle.nbytes


def test_segments_of_all_lengths_attend_to_themselves():
    lengths = [3, 3, 5, 2, 2, 2, 3]
    q, k, v = (torch.randn(2, sum(lengths), 2, 8) for _ in range(3))
    pieces = zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)
    want = torch.cat([attend(*piece) for piece in pieces], 1)
    torch.testing.assert_close(attend_segments(q, k, v, lengths), want)
    with Calls("_scaled_dot_product_flash_attention_for_cpu") as calls:
        attend_segments(q, k, v, lengths, "sdpa")
    assert calls.count == 4


def test_it_works_under_compile(teacher):
    frames = torch.rand(6, 3, 32, 48)
    queries = QuerySet("Is it red?", ("Is it?",))

    def loss(x):
        return teacher.losses((x * 2).clamp(0, 1), range(6), 8.0, queries).sum() * 3

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        x = frames.clone().requires_grad_()
        value = function(x)
        results.append((value.detach(), torch.autograd.grad(value, x)[0]))
    torch.testing.assert_close(*[value for value, _ in results])
    torch.testing.assert_close(*[gradient for _, gradient in results])


def test_a_compiled_encoder_can_be_streamed(tmp_path):
    teacher = load_teacher(tiny_qwen3_vl(tmp_path))
    frames = torch.rand(4, 3, 32, 48)
    want = gradients(teacher, frames, 2, (32, 48))
    encode = torch.compile(lambda chunk: teacher.encode(chunk, (32, 48)), backend="aot_eager")
    x = frames.clone().requires_grad_()
    outputs = stream(encode, x, 2)
    (gradient,) = torch.autograd.grad(outputs, x, [torch.ones_like(t) for t in outputs])
    for a, b in zip((*outputs, gradient), want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_flops_are_counted_in_backward_passes_too():
    x, w = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7)
    with Flops() as counter:
        torch.autograd.grad(F.linear(x, w).sum(), x)
    assert counter.total == 2 * 2 * 5 * 7 * 3
