"""The decoder against an independent reading of the published layer table, frame by frame."""

import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vlmteacher.decoders import TinyVideoDecoder, check_decoder, load_decoder
from vlmteacher.errors import InputError

WAN21 = {"latent_channels": 16, "patch": 1}
WAN22 = {"latent_channels": 48, "patch": 2}
HUNYUAN15 = {"latent_channels": 32, "patch": 2}
PACKAGED = {"latent_channels": 24, "widths": (16, 12, 8, 8), "patch": 2, "space_upscale": (True, True, False)}
LTX = {"latent_channels": 128, "widths": (16, 8, 8, 8), "patch": 4, "time_upscale": (True, True, True)}
NARROW = {"widths": (16, 12, 8, 8)}


def random_decoder(**config):
    torch.manual_seed(0)
    decoder = TinyVideoDecoder(**config)
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
    assert sum(p.numel() for p in TinyVideoDecoder(**WAN22).parameters()) == 9_923_532


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
    decoder = random_decoder(**config, **NARROW)
    state = decoder.state_dict() | {"encoder.0.weight": torch.zeros(3)}
    torch.save(state, tmp_path / "tae.pth")
    save_file(state, tmp_path / "tae.safetensors")
    z = torch.randn(1, config["latent_channels"], 2, 2, 2)
    for name in ("tae.pth", "tae.safetensors"):
        loaded = TinyVideoDecoder.from_checkpoint(tmp_path / name)
        assert loaded.config == decoder.config
        assert torch.equal(loaded.decode(z), decoder.decode(z))
        assert not any(p.requires_grad for p in loaded.parameters())


def test_save_keeps_the_layout(tmp_path):
    decoder = random_decoder(**PACKAGED)
    decoder.save(tmp_path / "decoder.safetensors")
    loaded = TinyVideoDecoder.from_checkpoint(tmp_path / "decoder.safetensors")
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
    plain = random_decoder(**WAN21, **NARROW)
    torch.save(plain.state_dict(), tmp_path / "lighttaew2_1.pth")
    wan = reasoner(16)
    z = torch.randn(1, 16, 2, 2, 2)
    light = load_decoder(tmp_path / "lighttaew2_1.pth", wan)
    assert torch.equal(light.decode(z), plain.decode(z * wan.latents_std + wan.latents_mean))
    assert not torch.equal(light.decode(z), plain.decode(z))


def test_wrong_family_names_both_channel_counts(tmp_path):
    with pytest.raises(InputError, match=r"48 channels, but the Reasoner's have 16"):
        check_decoder(TinyVideoDecoder(**WAN22, **NARROW), reasoner(16))
    with pytest.raises(InputError, match=r"8x in space, but the Reasoner's VAE 4x and 16x"):
        check_decoder(TinyVideoDecoder(**WAN21, **NARROW), reasoner(16, space=16))
    check_decoder(TinyVideoDecoder(**PACKAGED), reasoner(24))


def test_bad_files_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        TinyVideoDecoder.from_checkpoint(tmp_path / "none.pth")
    for name in ("noise.pth", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(InputError, match="cannot read"):
            TinyVideoDecoder.from_checkpoint(tmp_path / name)
    save_file({"decoder.1.weight": torch.zeros(4, 4, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not a TAEHV decoder"):
        TinyVideoDecoder.from_checkpoint(tmp_path / "other.safetensors")
    state = TinyVideoDecoder(**WAN21, **NARROW).state_dict()
    state["decoder.3.extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "super.pth")
    with pytest.raises(InputError, match="_super"):
        TinyVideoDecoder.from_checkpoint(tmp_path / "super.pth")
