"""`decode` with frozen weights against the plain modules: frames, latent gradients, bytes kept, work done."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.decoders.test_taehv import HUNYUAN15, LTX, NARROW, PACKAGED, WAN21, WAN22, random_decoder
from vlmteacher.decoders import SurrogateDecoder
from vlmteacher.errors import InputError
from vlmteacher.ops import surrogate_decoder
from vlmteacher.ops.patchify import PatchLayout

LEAKY = HUNYUAN15 | NARROW | {"slope": 0.2, "signed": True}
FAMILIES = {"packaged": PACKAGED, "wan21": WAN21 | NARROW, "hunyuan15": LEAKY, "ltx": LTX}


def frozen(dtype: torch.dtype = torch.float32, **config) -> SurrogateDecoder:
    return random_decoder(**config).to(dtype).requires_grad_(False)


def latents(decoder: SurrogateDecoder, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)  # no activation within a rounding of zero, which may fall on either side in either
    return torch.randn(1, decoder.latent_channels, *size, dtype=dtype).requires_grad_()


def both(decoder: SurrogateDecoder, z: Tensor, indices: list[int] | None, chunk: int | None = None):
    """(frames, latent gradient) of ours, then of the plain modules."""
    frames = decoder.decode(z, indices, chunk)
    plain = decoder.decode_batch(z)[0]
    plain = plain if indices is None else plain[indices]
    grad = torch.randn(plain.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(plain.dtype)
    return [(y.detach(), torch.autograd.grad(y, z, grad)[0]) for y in (frames, plain)]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


INDICES = {
    "all": None,
    "one": [7],
    "first": [0],
    "last, first": [-1, 0],
    "unsorted, twice": [5, 2, 9, 2, 0, 5],
    "even": [0, 3, 6, 9, 12],
}


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 1, 2, 5])
@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_choice_of_frames_in_any_chunks(family, indices, chunk):
    """In float64: the same sums in another order, so that the plan cannot be wrong anywhere."""
    decoder = frozen(torch.float64, **FAMILIES[family])
    z = latents(decoder, 4, 2, 3, dtype=torch.float64)
    count = decoder.temporal_stride * 3 + 1
    wanted = INDICES[indices] and [i % count for i in INDICES[indices]]
    (ours, grad), (plain, expected) = both(decoder, z, wanted, chunk)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)
    torch.testing.assert_close(grad, expected, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("family", [*FAMILIES, "wan22"])
def test_float32_is_the_reference_class(family):
    """Against it in float64. A ReLU whose input lies within a rounding of zero may have either slope: latents that are
    a hundred roundings away, where a hundred times as many do, tell what that may do to the gradient."""
    config = (FAMILIES | {"wan22": WAN22})[family]
    decoder = frozen(**config)
    z = latents(decoder, 3, 4, 6)
    (ours, grad), _ = both(decoder, z, [0, 3, 4, 8])
    truth, exact_grad = reference(config, z.detach().double())
    moves = torch.randn(3, *z.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 1e-5
    near = max(relative(reference(config, z.detach() + move)[1], exact_grad) for move in moves)
    assert (ours - truth).abs().max() <= 1e-5
    assert near < 0.02 and relative(grad, exact_grad) <= max(1e-5, 2 * near)


def reference(config: dict, z: Tensor) -> tuple[Tensor, Tensor]:
    """The frames and the latent gradient of the plain class in float64."""
    return both(frozen(**config).double(), z.requires_grad_(), [0, 3, 4, 8])[1]


@pytest.mark.parametrize("family", ["packaged", pytest.param("wan22", marks=pytest.mark.slow)])
def test_bfloat16_errs_no_more_than_the_plain_class(family):
    config = (FAMILIES | {"wan22": WAN22})[family]
    exact, low = frozen(torch.bfloat16, **config).double(), frozen(torch.bfloat16, **config)
    errors = []
    for seed in range(3):  # one draw of the plain class's rounding may be a lucky one
        z16 = (latents(low, 3, 4, 6) + 0.1 * seed).bfloat16().detach().requires_grad_()
        _, truth = both(exact, z16.detach().double().requires_grad_(), [0, 3, 4, 8])
        found = both(low, z16, [0, 3, 4, 8])
        errors.append([[relative(a, b) for a, b in zip(each, truth, strict=True)] for each in found])
    ours, plain = torch.tensor(errors).square().mean(0).sqrt()
    assert (ours <= 2 * plain).all()


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_patch_rows_right_from_the_decoder(family, indices, dtype, chunk):
    """The bits of `patchify` after `decode`, odd K and all; latent gradients as its frames' give them."""
    decoder = frozen(dtype, **FAMILIES[family])
    z = latents(decoder, 4, 2, 4, dtype=dtype)
    count = decoder.temporal_stride * 3 + 1
    wanted = INDICES[indices] and [i % count for i in INDICES[indices]]
    side = decoder.spatial_stride
    layout = PatchLayout(side // 2, 2, 2, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7), torch.float32)
    frames = decoder.decode(z, wanted, chunk)
    expected, ours = layout.of(frames), decoder.decode_rows(z, layout, wanted, chunk)
    assert ours.shape == frames.shape and torch.equal(ours.rows, expected)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (found,), (truth,) = (torch.autograd.grad(rows, z, grad) for rows in (ours.rows, expected))
    # the frames' gradient is rounded for a frame that stands in the rows several times, theirs once
    assert relative(found, truth) <= (1e-6 if dtype == torch.float32 else 0.02)


def test_patch_rows_are_made_without_the_frames():
    decoder = frozen(**WAN22 | NARROW)
    z = latents(decoder, 3, 4, 4)
    layout = PatchLayout(16, 2, 2, (0.5,) * 3, (0.5,) * 3, torch.float32)
    with torch.profiler.profile() as profile:
        rows = decoder.decode_rows(z, layout, [0, 4, 8], chunk=1).rows
        torch.autograd.grad(rows, z, torch.ones_like(rows))
    calls = {event.key for event in profile.key_averages()}
    assert not calls & {"aten::pixel_shuffle", "aten::pixel_unshuffle", "vlmteacher::patchify"}
    assert any(name.endswith("::shuffle_to_rows") for name in calls)


def test_patch_rows_of_a_decoder_in_training():
    decoder = frozen(**PACKAGED).requires_grad_(True)
    z = latents(decoder, 2, 4, 4)
    layout = PatchLayout(8, 2, 2, (0.5,) * 3, (0.5,) * 3, torch.float32)
    rows = decoder.decode_rows(z, layout, [1, 4]).rows
    torch.testing.assert_close(rows, layout.of(decoder.decode(z, [1, 4])))
    rows.sum().backward()
    assert all(p.grad is not None for p in decoder.parameters())


def test_patch_rows_of_frames_that_do_not_split():
    decoder = frozen(**PACKAGED)
    layout = PatchLayout(7, 2, 2, (0.5,) * 3, (0.5,) * 3, torch.float32)
    with pytest.raises(InputError, match="2 frames of 32x32 do not split into blocks of 14x14"):
        decoder.decode_rows(latents(decoder, 2, 4, 4), layout, [1, 4])


def test_gradcheck():
    decoder = frozen(torch.float64, latent_channels=3, widths=(4, 3, 2, 2), patch=2, space_upscale=(True, False, False))
    z = latents(decoder, 2, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: decoder.decode(z, [4, 0, 4], 2), (z,), fast_mode=True)


def kept_bytes(function) -> int:
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, torch.nn.Parameter):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    del y
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_keeps_a_twentieth(dtype):
    decoder = frozen(dtype, **WAN22)
    z = latents(decoder, 3, 4, 4, dtype=dtype)
    ours, plain = kept_bytes(lambda: decoder.decode(z)), kept_bytes(lambda: decoder.decode_batch(z))
    assert 0 < ours <= 0.05 * plain
    with torch.no_grad():
        assert kept_bytes(lambda: decoder.decode(z)) == 0


def test_it_computes_what_the_frames_need():
    """K = 24 of 89 frames at 704x1280."""
    decoder = frozen(**WAN22)
    layers = decoder.layers()

    def work(indices: list[int]) -> int:
        return decoder.plan((44, 80), indices).multiply_adds(layers, 44, 80)

    pixels = 44 * 80
    table = 23 * pixels * 9 * (48 * 256 + 3 * 4 * 256**2)  # the published layers, all 92 frames
    table += 23 * 4 * pixels * (256**2 + 9 * (256 * 128 + 3 * 4 * 128**2))
    table += 16 * pixels * (23 * 128 * 256 + 46 * 9 * (128 * 64 + 3 * 4 * 64**2))
    table += 64 * pixels * (46 * 64 * 128 + 92 * 9 * (64 * 64 + 64 * 12))
    some, full = work([round(k * 88 / 23) for k in range(24)]), work(list(range(89)))
    print(f"24 of 89 frames: {some / 1e9:.0f} G multiply-adds, all {full / 1e9:.0f}, layer by layer {table / 1e9:.0f}")
    assert some <= 0.75 * table and some < 0.85 * full


def test_frames_before_the_last_memory_block_are_computed_once():
    decoder = frozen(**WAN22)
    for chunk in (1, 3, 100):
        plan = decoder.plan((2, 2), [10, 11, 30], chunk)
        counts = [sum(len(t) for steps in plan.steps for t in steps[i].taps) for i in range(len(decoder.layers()))]
        # frames 13, 14 and 33 of all 92; 6, 7 and 16 of 46 before the last doubling, with their predecessors
        assert counts[-2:] == [3, 3]
        assert counts[-5:-2] == [3] * 3  # the last block
        assert counts[-8:-5] == [5] * 3  # and what it sees: 5, 6, 7, 15, 16
        assert counts[-11:-8] == [7] * 3
        assert counts[0] <= 9


def test_checkpointing_and_no_grad():
    decoder = frozen(**PACKAGED)
    z = latents(decoder, 3, 2, 2)
    frames = decoder.decode(z, [1, 8])
    (expected,) = torch.autograd.grad(frames.square().sum(), z)
    again = checkpoint(lambda z: decoder.decode(z, [1, 8]), z, use_reentrant=False)
    assert torch.equal(again, frames)
    assert torch.equal(torch.autograd.grad(again.square().sum(), z)[0], expected)
    with torch.no_grad():
        assert torch.equal(decoder.decode(z, [1, 8]), frames)


def test_changed_weights_are_seen():
    """What was made from the weights is made again: after loading, after a cast, after an update in place."""
    decoder, other = frozen(**PACKAGED), frozen(**PACKAGED)
    z = latents(decoder, 2, 2, 2).detach()
    before = decoder.decode(z)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    assert not torch.equal(other.decode(z), before)
    changed = other.decode(z)
    decoder.load_state_dict(other.state_dict())
    assert torch.equal(decoder.decode(z), changed)
    assert decoder.bfloat16().decode(z).dtype == torch.bfloat16


def test_it_equals_the_definition_without_the_cpp_backend(monkeypatch):
    decoder = frozen(**PACKAGED)
    z = latents(decoder, 3, 3, 5)
    (ours, grad), _ = both(decoder, z, [0, 4])
    monkeypatch.setattr(surrogate_decoder, "_fast", lambda *work: None)
    (plain, expected), _ = both(decoder, z, [0, 4])
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)
    assert relative(grad, expected) < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(1, 23, 2, 2, 2)}, "latents of 23 channels for a decoder of 24"),
        ({"latents": torch.zeros(2, 24, 2, 2, 2)}, r"the latents \(1, C, T, h, w\) of one clip"),
        ({"latents": torch.zeros(24, 2, 2, 2)}, "of one clip"),
        ({"latents": torch.zeros(1, 24, 0, 2, 2)}, "of one clip"),
        ({"latents": torch.full((1, 24, 2, 2, 2), torch.nan)}, "hold NaN"),
        ({"latents": torch.zeros(1, 24, 2, 2, 2, dtype=torch.int64)}, "floating-point"),
        ({"frame_indices": [0, 5]}, "frame 5 does not exist: these latents decode to frames 0 to 4"),
        ({"frame_indices": [-1]}, "frame -1 does not exist"),
        ({"frame_indices": []}, "frame_indices is empty"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(InputError, match=message):
        frozen(**PACKAGED).decode(**{"latents": torch.zeros(1, 24, 2, 2, 2)} | change)
