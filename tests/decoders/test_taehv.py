"""The decoder against an independent reading of the published layer table, frame by frame."""

import pickle
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vlmteacher.decoders import SurrogateDecoder, check_decoder, load_decoder
from vlmteacher.decoders.taehv import MemBlock, SuperVideoDecoder
from vlmteacher.errors import InputError
from vlmteacher.state import fingerprint

WAN21 = {"latent_channels": 16, "patch": 1}
WAN22 = {"latent_channels": 48, "patch": 2}
HUNYUAN15 = {"latent_channels": 32, "patch": 2}
PACKAGED = {"latent_channels": 24, "widths": (16, 12, 8, 8), "patch": 2, "space_upscale": (True, True, False)}
LTX = {"latent_channels": 128, "widths": (16, 8, 8, 8), "patch": 4, "time_upscale": (True, True, True)}
NARROW = {"widths": (16, 12, 8, 8)}


def random_decoder(**config):
    torch.manual_seed(0)
    decoder = SurrogateDecoder(**config)
    with torch.no_grad():
        decoder.decoder[22].bias.fill_(0.5)  # the middle of the range, so that clamping hides little
        decoder.decoder[22].weight.mul_(10)
    return decoder.requires_grad_(False)


def by_the_table(w, latents, patch, space):
    """Streams latent frames (C, h, w) through the 23 layers with one remembered frame per MemBlock."""
    memory = {}

    def conv(x, i):
        return F.conv2d(x, w[f"decoder.{i}.weight"], w.get(f"decoder.{i}.bias"), padding=1)

    def block(x, i):
        past = memory.get(i, torch.zeros_like(x))
        memory[i] = x
        y = torch.cat([x, past], 1)
        for j in (0, 2, 4):
            y = F.conv2d(y, w[f"decoder.{i}.conv.{j}.weight"], w[f"decoder.{i}.conv.{j}.bias"], padding=1)
            y = y.relu() if j < 4 else y
        return (y + x).relu()

    def grow(x, i):
        kernel = w[f"decoder.{i}.conv.weight"]
        y = torch.einsum("oi,bihw->bohw", kernel[:, :, 0, 0], x)
        return y.split(kernel.shape[1], 1)

    def stage(x, start, doubled):
        for i in range(start, start + 3):
            x = block(x, i)
        if doubled:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        for y in grow(x, start + 4):
            yield conv(y, start + 5)

    frames = []
    for z in latents:
        x = conv(3 * torch.tanh(z[None] / 3), 1).relu()
        for a in stage(x, 3, space[0]):
            for b in stage(a, 9, space[1]):
                for c in stage(b, 15, space[2]):
                    y = conv(c.relu(), 22)[0]
                    height, width = y.shape[1:]
                    y = y.view(3, patch, patch, height, width).permute(0, 3, 1, 4, 2)
                    frames.append(y.reshape(3, height * patch, width * patch).clamp(0, 1))
    grown = len(frames) // len(latents)
    return torch.stack(frames[grown - 1 :])


@pytest.mark.parametrize(
    "config, latents",
    [(WAN22, (3, 2, 3)), (WAN21, (2, 2, 1)), (HUNYUAN15 | NARROW, (2, 1, 3)), (PACKAGED, (4, 3, 2)), (LTX, (2, 1, 2))],
    ids=["wan22", "wan21", "hunyuan15", "packaged", "ltx"],
)
def test_follows_the_layer_table(config, latents):
    decoder = random_decoder(**config)
    frames_t, h, w = latents
    z = torch.randn(1, config["latent_channels"], frames_t, h, w)
    space = config.get("space_upscale", (True, True, True))
    with torch.no_grad():
        ours = decoder.decode(z)
        expected = by_the_table(decoder.state_dict(), z[0].transpose(0, 1), config["patch"], space)
    assert ours.shape == expected.shape
    assert ours.shape[0] == decoder.temporal_stride * (frames_t - 1) + 1
    assert ours.shape[2:] == (h * decoder.spatial_stride, w * decoder.spatial_stride)
    assert ours.std() > 0.02
    torch.testing.assert_close(ours, expected, atol=5e-6, rtol=0)


def test_full_width_wan22_has_the_published_size():
    assert sum(p.numel() for p in SurrogateDecoder(**WAN22).parameters()) == 9_923_532


def test_frame_indices_select_and_carry_gradient():
    decoder = random_decoder(**PACKAGED)
    z = torch.randn(1, 24, 3, 2, 2, requires_grad=True)
    frames = decoder.decode(z, [8, 0, 3])
    torch.testing.assert_close(frames, decoder.decode(z)[[8, 0, 3]], atol=1e-6, rtol=0)
    (grad,) = torch.autograd.grad(frames[1].sum(), z)
    assert grad[:, :, 0].abs().sum() > 0
    assert grad[:, :, 1:].abs().sum() == 0  # causal: frame 0 sees the first latent frame only


def test_decode_batch_is_decode_of_each_clip_and_unclamped_on_request():
    decoder = random_decoder(**PACKAGED)
    z = torch.randn(2, 24, 2, 2, 2) * 3
    with torch.no_grad():
        decoder.decoder[22].bias.fill_(0.99)
        batch, free = decoder.decode_batch(z), decoder.decode_batch(z, clamp=False)
        torch.testing.assert_close(batch[1], decoder.decode(z[1:]))
    assert free.max() > 1
    torch.testing.assert_close(free.clamp(0, 1), batch)


@pytest.mark.parametrize("config", [WAN21, WAN22, HUNYUAN15], ids=["wan21", "wan22", "hunyuan15"])
def test_loads_upstream_files(tmp_path, config):
    """A .pth as upstream writes it (encoder beside the decoder, no metadata) and the same as safetensors."""
    decoder = random_decoder(**config, **NARROW).requires_grad_(False)
    state = decoder.state_dict() | {"encoder.0.weight": torch.zeros(3)}
    torch.save(state, tmp_path / "tae.pth")
    save_file(state, tmp_path / "tae.safetensors")
    z = torch.randn(1, config["latent_channels"], 2, 2, 2)
    for name in ("tae.pth", "tae.safetensors"):
        loaded = SurrogateDecoder.from_checkpoint(tmp_path / name)
        assert loaded.config == decoder.config
        assert torch.equal(loaded.decode(z), decoder.decode(z))
        assert not any(p.requires_grad for p in loaded.parameters())


def test_save_keeps_the_layout(tmp_path):
    decoder = random_decoder(**PACKAGED)
    decoder.save(tmp_path / "decoder.safetensors")
    loaded = SurrogateDecoder.from_checkpoint(tmp_path / "decoder.safetensors")
    assert loaded.config == decoder.config
    assert [p.name for p in tmp_path.iterdir()] == ["decoder.safetensors"]


def reasoner(channels, space=8):
    return types.SimpleNamespace(
        latent_channels=channels,
        temporal_stride=4,
        spatial_stride=space,
        device=torch.device("cpu"),
        latents_mean=torch.linspace(-1, 1, channels).view(1, -1, 1, 1, 1),
        latents_std=torch.linspace(1, 3, channels).view(1, -1, 1, 1, 1),
    )


def test_lighttae_gets_denormalised_latents(tmp_path):
    plain = random_decoder(**WAN21, **NARROW).requires_grad_(False)
    torch.save(plain.state_dict(), tmp_path / "lighttaew2_1.pth")
    wan = reasoner(16)
    z = torch.randn(1, 16, 2, 2, 2)
    light = load_decoder(tmp_path / "lighttaew2_1.pth", wan)
    assert torch.equal(light.decode(z), plain.decode(z * wan.latents_std + wan.latents_mean))
    assert not torch.equal(light.decode(z), plain.decode(z))


def test_hunyuan15_of_lightx2v(tmp_path):
    """Keys as its wrapper saves them; latents divided by the scale, LeakyReLU, [-1, 1] to [0, 1], by hand."""
    plain = random_decoder(**HUNYUAN15, **NARROW)
    state = {f"taehv.{name}": value for name, value in plain.state_dict().items()}
    torch.save(state, tmp_path / "lighttaehy1_5.pth")
    light = load_decoder(tmp_path / "lighttaehy1_5.pth", reasoner(32, space=16))
    z = torch.randn(1, 32, 2, 2, 2)
    x = plain.decoder[0]((z / 1.03682)[0].transpose(0, 1))
    for layer in plain.decoder[1:]:
        if isinstance(layer, MemBlock):
            pair = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], 1)
            for i in (0, 2, 4):
                pair = layer.conv[i](pair)
                pair = F.leaky_relu(pair, 0.2) if i < 4 else pair
            x = F.leaky_relu(pair + x, 0.2)
        else:
            x = F.leaky_relu(x, 0.2) if isinstance(layer, torch.nn.ReLU) else layer(x)
    expected = (F.pixel_shuffle(x, 2)[3:].clamp(-1, 1) + 1) / 2
    assert expected.std() > 0.02
    torch.testing.assert_close(light.decode(z), expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(light.decode_batch(z)[0], expected, atol=1e-5, rtol=0)


def test_a_first_stage_of_two_frames_keeps_the_later(tmp_path):
    """As upstream reads such files; a decoder that was saved with its layout keeps both."""
    plain = random_decoder(**WAN21, **NARROW).requires_grad_(False)
    state = plain.state_dict()
    weight = state["decoder.7.conv.weight"]
    torch.save(state | {"decoder.7.conv.weight": torch.cat([torch.randn_like(weight), weight])}, tmp_path / "tae.pth")
    z = torch.randn(1, 16, 2, 2, 2)
    assert torch.equal(SurrogateDecoder.from_checkpoint(tmp_path / "tae.pth").decode(z), plain.decode(z))
    double = SurrogateDecoder(**WAN21, **NARROW, time_upscale=(True, True, True))
    double.save(tmp_path / "double.safetensors")
    assert SurrogateDecoder.from_checkpoint(tmp_path / "double.safetensors").config == double.config


class Code:
    """What a hostile pickle holds."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_with_code_is_not_run(tmp_path):
    ran = tmp_path / "ran"
    torch.save({"decoder.1.weight": Code(ran)}, tmp_path / "tae.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Code(ran)))
    for name in ("tae.pth", "plain.pth"):
        with pytest.raises(InputError, match="cannot read"):
            SurrogateDecoder.from_checkpoint(tmp_path / name)
    assert not ran.exists()


def test_truncated_files_and_odd_metadata_are_input_errors(tmp_path):
    decoder = random_decoder(**WAN21, **NARROW)
    decoder.save(tmp_path / "tae.safetensors")
    torch.save(decoder.state_dict(), tmp_path / "tae.pth")
    for name in ("tae.safetensors", "tae.pth"):
        content = (tmp_path / name).read_bytes()
        for size in (0, 10, len(content) // 2, len(content) - 1):
            (tmp_path / name).write_bytes(content[:size])
            with pytest.raises(InputError, match="cannot read"):
                SurrogateDecoder.from_checkpoint(tmp_path / name)
    wrong = ('{"space_upscale": 3}', '{"space_upscale": "yes"}', '{"slope": "x"}', '{"slope": NaN}', '{"signed": "no"}')
    for config in ("[", "[]", "[" * 9000, '{"slope": 0, "slope": 0}', *wrong):
        save_file(decoder.state_dict(), tmp_path / "tae.safetensors", metadata={"config": config})
        if config != "[]":  # no entry, as good as none
            with pytest.raises(InputError, match=r"not a TAEHV decoder|metadata of"):
                SurrogateDecoder.from_checkpoint(tmp_path / "tae.safetensors")


def test_wrong_family_names_both_channel_counts(tmp_path):
    with pytest.raises(InputError, match=r"48 channels, but the Reasoner's have 16"):
        check_decoder(SurrogateDecoder(**WAN22, **NARROW), reasoner(16))
    with pytest.raises(InputError, match=r"8x in space, but the Reasoner's VAE 4x and 16x"):
        check_decoder(SurrogateDecoder(**WAN21, **NARROW), reasoner(16, space=16))
    check_decoder(SurrogateDecoder(**PACKAGED), reasoner(24))


def test_bad_files_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        SurrogateDecoder.from_checkpoint(tmp_path / "none.pth")
    for name in ("noise.pth", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(InputError, match="cannot read"):
            SurrogateDecoder.from_checkpoint(tmp_path / name)
    save_file({"decoder.1.weight": torch.zeros(4, 4, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not a TAEHV decoder"):
        SurrogateDecoder.from_checkpoint(tmp_path / "other.safetensors")
    state = SurrogateDecoder(**WAN21, **NARROW).state_dict()
    for changes, message in (
        ({"decoder.3.extra.weight": torch.zeros(1)}, "unexpected decoder.3.extra.weight"),
        ({"decoder.4.conv.0.bias": torch.zeros(7)}, r"decoder.4.conv.0.bias should be \(\d+,\) but \(7,\)"),
        ({"decoder.1.weight": torch.zeros(1).expand(10**6, 16, 1000, 1000)}, "larger than the file"),
        ({"decoder.1.weight": torch.zeros(4, 4, dtype=torch.int64)}, "no tensor of floating-point numbers"),
        ({"decoder.1.weight": "text"}, "no tensor"),
        ({"decoder.1.weight": torch.zeros(4000, 16, 3, 3)}, "should be"),  # whose MemBlocks would take gigabytes
    ):
        torch.save(state | changes, tmp_path / "changed.pth")
        with pytest.raises(InputError, match=message):
            SurrogateDecoder.from_checkpoint(tmp_path / "changed.pth")
    for content in ([1, 2], torch.zeros(3), {1: torch.zeros(3)}):
        torch.save(content, tmp_path / "changed.pth")
        with pytest.raises(InputError, match="changed"):
            SurrogateDecoder.from_checkpoint(tmp_path / "changed.pth")


# ------------------------------------------------------------------ _super


SUPER = {"latent_channels": 6, "widths": (10, 8, 6, 4), "patch": 2}


def plain_super(decoder, latents):
    """taew2_2_super from its description, frame by frame: (C, T, h, w) to (F, 3, H, W)."""
    state = decoder.state_dict()
    frames = list(latents.unbind(1))
    number = 0

    def conv(x, name, **options):
        weight, bias = state[f"decoder.{name}.weight"], state.get(f"decoder.{name}.bias")
        return F.conv2d(x[None], weight, bias, **options)[0]

    frames = [conv(x, 0) for x in frames]
    for stage in range(3):
        for _ in range(3):
            number += 1
            past = [torch.zeros_like(frames[0]), *frames[:-1]]
            out = []
            for x, before in zip(frames, past, strict=True):
                pair = torch.cat([x, before])
                y = conv(pair, f"{number}.conv.0", padding=3, groups=len(pair))
                y = conv(conv(y, f"{number}.conv.1").relu(), f"{number}.conv.3")
                out.append(x + y)
            frames = out
        number += 1
        frames = [F.pixel_shuffle(conv(x, number, padding=1).relu(), 2) for x in frames]
        number += 3  # convolution, ReLU, pixel shuffle, and then the growth in time
        grown = [conv(x, f"{number}.conv") for x in frames]
        frames = [part for y in grown for part in y.chunk(1 if stage == 0 else 2)]
    assert number == 21
    return torch.stack([F.pixel_shuffle(conv(x, 22, padding=1), 2) for x in frames])[3:].clamp(0, 1)


def random_super(**changes):
    torch.manual_seed(1)
    decoder = SuperVideoDecoder(**SUPER | changes).double()
    with torch.no_grad():
        decoder.decoder[-1].bias.fill_(0.5)
        decoder.decoder[-1].weight.mul_(5)
    return decoder.float().double().requires_grad_(False)  # files are read as float32


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_super_decoders(tmp_path, suffix):
    """Files as upstream writes them give what the description says, any frames of them, and the same gradient."""
    written = random_super()
    state = written.state_dict()
    (torch.save if suffix == ".pth" else save_file)(state, tmp_path / f"taew2_2_super{suffix}")
    decoder = SurrogateDecoder.from_checkpoint(tmp_path / f"taew2_2_super{suffix}", torch.float64)
    assert isinstance(decoder, SuperVideoDecoder) and decoder.config == written.config
    assert (decoder.temporal_stride, decoder.spatial_stride) == (4, 16)
    z = torch.randn(1, 6, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    expected = plain_super(written, z[0])
    assert expected.shape == (9, 3, 32, 48) and expected.std() > 0.02
    torch.testing.assert_close(decoder.decode(z), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(decoder.decode_batch(z)[0], expected, atol=1e-12, rtol=0)
    for indices in ([8, 0, 3, 3], [0], [4]):
        weight = torch.randn(len(indices), 3, 32, 48, dtype=torch.float64)
        frames = decoder.decode(z, indices)
        torch.testing.assert_close(frames, expected[indices], atol=1e-12, rtol=0)
        ours, theirs = (
            torch.autograd.grad((x * weight).sum(), z, retain_graph=True)[0] for x in (frames, expected[indices])
        )
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_super_decoders_keep_little_for_the_backward():
    decoder = random_super().float()
    z = torch.randn(1, 6, 3, 4, 4, requires_grad=True)

    def kept(decode):
        sizes = {}
        pack = lambda x: sizes.__setitem__(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) or x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = decode()
        del result
        return sum(sizes.values())

    assert kept(lambda: decoder.decode(z)) < 0.5 * kept(lambda: decoder.decode_batch(z))


def test_super_decoders_round_trip_and_refuse(tmp_path):
    decoder = random_super(space_upscale=(True, True, False), time_upscale=(True, False, True)).float()
    decoder.save(tmp_path / "own.safetensors")
    assert SurrogateDecoder.from_checkpoint(tmp_path / "own.safetensors").config == decoder.config
    state = decoder.state_dict()
    del state["decoder.9.conv.1.bias"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(InputError, match=r"decoder.9.conv.1.bias should be \(32,\) but missing"):
        SurrogateDecoder.from_checkpoint(tmp_path / "less.safetensors")


def test_runs_of_the_class_by_its_former_name_resume() -> None:
    """Run folders keep a fingerprint that names the class."""
    former = type("TinyVideoDecoder", (SurrogateDecoder,), {})(4)
    decoder = SurrogateDecoder(4)
    decoder.load_state_dict(former.state_dict())
    assert fingerprint({"decoder": decoder}) == fingerprint({"decoder": former})
