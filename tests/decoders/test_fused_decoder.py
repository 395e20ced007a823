"""`TinyVideoDecoder.decode` against the plain module: the same frames and gradients, for a part of the work."""

import itertools
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.decoders.test_taehv import HUNYUAN15, LTX, NARROW, PACKAGED, WAN21, WAN22, random_decoder
from vlmteacher.decoders import TinyVideoDecoder
from vlmteacher.errors import InputError
from vlmteacher.lora import add_lora, remove_lora
from vlmteacher.microworld.world import Scene, render
from vlmteacher.optimization import Optimization, Settings
from vlmteacher.pipeline import TeacherPipeline, TeacherPipelineOutput, read_pair
from vlmteacher.queries import QuerySet

LEAKY = HUNYUAN15 | {"slope": 0.2, "signed": True}
FAMILIES = {
    "taew2_1": WAN21 | NARROW,
    "taew2_2": WAN22 | NARROW,
    "taehv1_5": HUNYUAN15 | NARROW,
    "lighttaehy1_5": LEAKY | NARROW,
    "taeltx": LTX,
    "packaged": PACKAGED,
}


LIKE_THE_DEMO = {"max_steps": 3, "threshold": 1e-6, "teacher_frames": 12, "learning_rate": 6e-4, "rank": 16}


class Plain:
    """The decoder as it was: the whole clip by the plain module, then the frames that are wanted."""

    def __init__(self, decoder: TinyVideoDecoder) -> None:
        self.decoder = decoder

    def decode(self, latents: Tensor, indices: list[int]) -> Tensor:
        return plain(self.decoder, latents, indices)


def render_first(scene: dict[str, object]) -> Image.Image:
    frames = render(Scene.from_json(scene))
    return Image.fromarray(TeacherPipelineOutput.uint8(frames[:1])[0])


def frozen(dtype: torch.dtype = torch.float32, **config: object) -> TinyVideoDecoder:
    """Untrained, scaled so that a part of its values is clamped."""
    decoder = random_decoder(**config).requires_grad_(False)
    head = decoder.decoder[22]
    spread = decoder.decode_batch(clip(decoder, 2, 2, 3).detach(), clamp=False).std().item()
    head.weight.mul_((0.8 if decoder.config["signed"] else 0.4) / spread)
    head.bias.fill_(0.0 if decoder.config["signed"] else 0.5)
    return decoder.to(dtype)


def clip(decoder: TinyVideoDecoder, t: int, h: int, w: int, dtype: torch.dtype = torch.float32) -> Tensor:
    z = torch.randn(
        1, decoder.latent_channels, t, h, w, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return z.to(dtype).requires_grad_()


def plain(decoder: TinyVideoDecoder, z: Tensor, indices: list[int] | None = None) -> Tensor:
    frames = decoder.decode_batch(z)[0]
    return frames if indices is None else frames[indices]


def gradient(frames: Tensor, z: Tensor) -> Tensor:
    weights = torch.randn(frames.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return torch.autograd.grad(frames, z, weights.to(frames.dtype))[0]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("sparse", [False, True], ids=["all", "some"])
def test_frames_and_gradients_are_those_of_the_plain_module(config: dict[str, object], sparse: bool) -> None:
    decoder = frozen(**config)
    z = clip(decoder, 3, 3, 5)
    indices = [7, 2, 7, 0, 3] if sparse else None  # unsorted, and one of them twice
    ours, theirs = decoder.decode(z, indices), plain(decoder, z, indices)
    assert 0.1 < theirs.gt(0).logical_and(theirs.lt(1)).float().mean() < 0.95  # the clamp acts, and not everywhere
    assert (ours - theirs).abs().max() < 1e-5
    expected = gradient(theirs, z)
    assert rms(gradient(ours, z) - expected) < 1e-4 * rms(expected)


@pytest.mark.parametrize("config", [WAN22 | NARROW, LTX, LEAKY | NARROW], ids=["taew2_2", "taeltx", "lighttaehy1_5"])
def test_chunks_change_nothing(config: dict[str, object]) -> None:
    decoder = frozen(torch.float64, **config)
    z = clip(decoder, 4, 2, 3, torch.float64)
    indices = [0, 1, 2, 6, 7, 12]
    whole = decoder.decode(z, indices, chunk=len(indices))
    expected = gradient(whole, z)
    torch.testing.assert_close(whole, plain(decoder, z, indices), atol=1e-12, rtol=0)
    for chunk in (1, 2, 4, None):
        frames = decoder.decode(z, indices, chunk=chunk)
        torch.testing.assert_close(frames, whole, atol=1e-13, rtol=0)
        torch.testing.assert_close(gradient(frames, z), expected, atol=1e-12, rtol=1e-10)


def test_every_choice_of_frames() -> None:
    """Each subset of the frames of two latents, each chunk: what is carried from chunk to chunk suffices."""
    decoder = frozen(torch.float64, **PACKAGED)
    z = clip(decoder, 2, 1, 2, torch.float64)
    frames = plain(decoder, z)
    for count, chunk in itertools.product(range(1, 6), (1, 2)):
        for indices in itertools.combinations(range(5), count):
            ours, theirs = decoder.decode(z, indices, chunk=chunk), frames[list(indices)]
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
            expected = torch.autograd.grad(theirs.sin().sum(), z, retain_graph=True)[0]
            torch.testing.assert_close(torch.autograd.grad(ours.sin().sum(), z)[0], expected, atol=1e-11, rtol=0)


def test_gradcheck() -> None:
    decoder = frozen(torch.float64, latent_channels=3, widths=(4, 3, 3, 2), patch=1, slope=0.2)
    z = clip(decoder, 2, 1, 1, torch.float64)
    frames = decoder.decode(z, [4, 0, 2])
    down = torch.randn(4, frames.numel(), dtype=torch.float64) / 10  # a few sums instead of every pixel
    assert torch.autograd.gradcheck(lambda z: down @ decoder.decode(z, [4, 0, 2], chunk=2).flatten(), z)


@pytest.mark.parametrize("config", [WAN22, PACKAGED], ids=["taew2_2", "packaged"])
def test_bfloat16_errs_no_more_than_the_plain_module(config: dict[str, object]) -> None:
    exact = frozen(**config).bfloat16().double()
    decoder = frozen(**config).bfloat16()
    z = clip(exact, 2, 3, 4, torch.bfloat16)
    wide = z.detach().double().requires_grad_()
    indices = [4, 1, 0]
    truth = plain(exact, wide, indices)
    ours, theirs = decoder.decode(z, indices), plain(decoder, z, indices)
    eps = torch.finfo(torch.bfloat16).eps
    assert rms(ours - truth) <= 1.5 * rms(theirs - truth) + 1e-2 * eps
    dz = gradient(truth, wide)
    assert rms(gradient(ours, z) - dz) <= 1.5 * rms(gradient(theirs, z) - dz) + 1e-2 * eps * rms(dz)


def test_computes_what_is_wanted() -> None:
    """24 of 89 frames of 704x1280: multiply-adds against those that torch counts in the plain decoder."""
    with torch.device("meta"):
        stock = TinyVideoDecoder(**WAN22).requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            stock.decode_batch(torch.empty(1, 48, 23, 44, 80))
    plain_count = counter.get_total_flops() // 2
    decoder = frozen(**WAN22)
    layers, sampled = decoder.layers(), [round(i * 88 / 23) for i in range(24)]
    some, every = (decoder.plan((44, 80), wanted).multiply_adds(layers, 44, 80) for wanted in (sampled, range(89)))
    assert some < 0.83 * every and every < 0.8 * plain_count
    assert some <= 0.66 * plain_count
    chunked = [decoder.plan((44, 80), sampled, chunk).multiply_adds(layers, 44, 80) for chunk in (1, 5)]
    assert chunked == [some, some]  # nothing is computed twice


def test_keeps_one_bit_for_each_activation() -> None:
    decoder = frozen(**WAN22 | NARROW)
    z = clip(decoder, 3, 4, 4)
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}

    def saved(run: Callable[[Tensor], Tensor]) -> int:
        found: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            kept.append(t)  # an address is not given out again
            return t

        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run(z)
        return sum(found.values())

    assert 0 < saved(decoder.decode) <= 0.05 * saved(decoder.decode_batch)


def test_follows_changed_weights_and_trains_by_the_plain_module() -> None:
    decoder = frozen(**PACKAGED)
    z = clip(decoder, 2, 2, 2)
    before = decoder.decode(z)
    with torch.no_grad():
        decoder.decoder[8].weight.mul_(2)
    after = decoder.decode(z)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, plain(decoder, z), atol=1e-5, rtol=0)
    decoder.requires_grad_(True)
    decoder.decode(z, [1]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def test_bad_input() -> None:
    decoder = frozen(**PACKAGED)
    z = clip(decoder, 2, 2, 2).detach()
    with pytest.raises(InputError, match="16 channels for a decoder of 24"):
        decoder.decode(z[:, :16])
    with pytest.raises(InputError, match="one clip"):
        decoder.decode(z[0])
    with pytest.raises(InputError, match="NaN"):
        decoder.decode(z.where(z < 1, torch.nan))
    for indices, named in (([0, 5], 5), ([-1], -1)):
        with pytest.raises(InputError, match=f"frame {named} is not there: .* frames 0 to 4"):
            decoder.decode(z, indices)
    with pytest.raises(InputError, match="empty"):
        decoder.decode(z, [])
    with pytest.raises(InputError, match="chunk"):
        decoder.decode(z, chunk=0)
    with pytest.raises(InputError, match="floating-point"):
        decoder.decode(z.long())


def test_the_packaged_pair_learns_the_same() -> None:
    """Three steps of the demo: losses and the LoRA's gradient as with the plain module."""
    pipe = TeacherPipeline.from_pretrained()
    example = read_pair()[1]["example"]
    queries = QuerySet.from_dict({"goal": "Did the ball reach the box?", "process": ["Is one ball shown?"]})
    condition = pipe.reasoner.encode(example["prompt"], render_first(example["scene"]), 13, 64, 64)
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
