"""Decoders of another model's latents are refused; decoders by hub name, and by family where none is given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.progress_output import without_loading
from tests.tiny_pair import tiny_decoder
from vlmteacher.cli import main
from vlmteacher.decoders import SurrogateDecoder, load_decoder
from vlmteacher.decoders.agreement import LEAST, agreement, check_agreement, pair_fingerprint
from vlmteacher.decoders.find import find_decoder, known_decoder
from vlmteacher.errors import InputError
from vlmteacher.pipeline import TeacherPipeline, read_pair
from vlmteacher.placement import describe, find_devices, find_dtype
from vlmteacher.reasoners.loading import load_reasoner

DIRECTORY, PAIR = read_pair()
FILE = DIRECTORY / PAIR["decoder"]


@pytest.fixture(scope="module")
def reasoner() -> Any:
    return load_reasoner(DIRECTORY / PAIR["reasoner"])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("VLMTEACHER_CHECK_DECODER")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/vlmteacher/decoders"


def random(decoder: SurrogateDecoder, _: Any) -> None:
    torch.manual_seed(0)
    decoder.load_state_dict(SurrogateDecoder(**decoder.config).state_dict())


def permuted(decoder: SurrogateDecoder, _: Any) -> None:
    """A decoder of the same latents with their channels in another order."""
    order = torch.randperm(decoder.latent_channels, generator=torch.Generator().manual_seed(0))
    decoder.decoder[1].weight.copy_(decoder.decoder[1].weight[:, order])


def denormalised(decoder: SurrogateDecoder, reasoner: Any) -> None:
    """A decoder of de-normalised latents, like a file of LightX2V under another name."""
    decoder.latents_mean, decoder.latents_std = reasoner.latents_mean.clone(), reasoner.latents_std.clone()


def signed(decoder: SurrogateDecoder, _: Any) -> None:
    """A decoder of frames in [-1, 1] instead of [0, 1]."""
    decoder.decoder[22].weight.mul_(2)
    decoder.decoder[22].bias.mul_(2).sub_(1)


def broken(decoder: SurrogateDecoder, _: Any) -> None:
    decoder.decoder[22].bias.fill_(float("nan"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_packaged_decoder_agrees(reasoner: Any, dtype: torch.dtype) -> None:
    found = agreement(load_decoder(FILE, reasoner, dtype), reasoner)
    assert 0.5 * (1 + LEAST) < found <= 1


@pytest.mark.parametrize("change", [random, permuted, denormalised, signed, broken])
def test_wrong_decoders_are_refused(reasoner: Any, change: Any) -> None:
    decoder = load_decoder(FILE, reasoner)
    right = pair_fingerprint(decoder, reasoner)
    with torch.no_grad():
        change(decoder, reasoner)
    assert pair_fingerprint(decoder, reasoner) != right
    for _ in range(2):  # measured, and from the cache
        with pytest.raises(
            InputError, match=r"other\.pth is no decoder of this Reasoner's latents: .* explain -?\d+\."
        ) as found:
            check_agreement(decoder, reasoner, "other.pth")
        assert "\n" not in str(found.value) and "distill decoder" in str(found.value)
    assert agreement(decoder, reasoner) < 0.85


def test_it_is_measured_once(reasoner: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load_decoder(FILE, reasoner)
    state = torch.get_rng_state()
    check_agreement(decoder, reasoner, "packaged")
    assert torch.equal(torch.get_rng_state(), state)  # results with and without the check are the same
    (kept,) = cache.iterdir()
    assert json.loads(kept.read_text())["agreement"] > LEAST

    encode = reasoner.encode_video
    monkeypatch.setattr(reasoner, "encode_video", lambda frames: pytest.fail("measured again"))
    check_agreement(decoder, reasoner, "packaged")
    monkeypatch.setattr(reasoner, "encode_video", encode)
    for content in (b"", b"[]", b'{"agreement": "yes"}', b'{"agreement": NaN}', b"\xff", b"{" * 9999):
        kept.write_bytes(content)
        check_agreement(decoder, reasoner, "packaged")
        assert json.loads(kept.read_text())["agreement"] > LEAST

    other = load_reasoner(DIRECTORY / PAIR["reasoner"])  # another VAE is another pair
    with torch.no_grad():
        next(other.vae.decoder.parameters()).add_(1e-3)
    assert pair_fingerprint(decoder, other) != pair_fingerprint(decoder, reasoner)


def test_a_cache_that_cannot_be_written_is_no_error(
    reasoner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", Path("/proc/none")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        check_agreement(load_decoder(FILE, reasoner), reasoner, "packaged")


def test_the_pipeline_checks_and_can_be_told_not_to(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert TeacherPipeline.from_pretrained().models["decoder"] == "packaged/decoder.safetensors"
    with pytest.raises(InputError, match=r"decoder\.safetensors is no decoder of this Reasoner's latents"):
        TeacherPipeline.from_pretrained(**models)
    capsys.readouterr()
    flags = [f"--{name}={path}" for name, path in models.items()]
    assert main(["solve", "--prompt", "x", "--out", str(tmp_path / "out"), *flags]) == 2
    assert without_loading(capsys.readouterr().err).count("\n") == 1 and not (tmp_path / "out").exists()
    monkeypatch.setenv("VLMTEACHER_CHECK_DECODER", "0")
    TeacherPipeline.from_pretrained(**models)


# ------------------------------------------------------------------ where it comes from


def latents(channels: int, time: int, space: int, transformer: str) -> Any:
    network = type(transformer, (torch.nn.Module,), {})()
    strides = {"temporal_stride": time, "spatial_stride": space}
    return SimpleNamespace(latent_channels=channels, transformer=network, **strides)


def test_known_decoders() -> None:
    assert known_decoder(latents(16, 4, 8, "WanTransformer3DModel")) == "lightx2v/Autoencoders/taew2_1.pth"
    assert known_decoder(latents(48, 4, 16, "WanTransformer3DModel")) == "lightx2v/Autoencoders/taew2_2.safetensors"
    assert (
        known_decoder(latents(32, 4, 16, "HunyuanVideo15Transformer3DModel"))
        == "lightx2v/Autoencoders/lighttaehy1_5.pth"
    )
    for layout in ((128, 8, 32, "LTXVideoTransformer3DModel"), (16, 4, 8, "CogVideoXTransformer3DModel")):
        with pytest.raises(InputError, match=rf"{layout[0]} channels.*distill decoder"):
            known_decoder(latents(*layout))


def in_the_cache(folder: Path, repo: str, files: dict[str, Path], commit: str, ref: str = "main") -> None:
    """Write files to the cache as huggingface_hub does."""
    cached = folder / f"models--{repo.replace('/', '--')}"
    for name, source in files.items():
        target = cached / "snapshots" / commit / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    (cached / "refs").mkdir(exist_ok=True)
    (cached / "refs" / ref).write_text(commit)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


def test_hub_names(hub: Path, tmp_path: Path) -> None:
    one, two = "1" * 40, "2" * 40
    in_the_cache(hub, "me/one", {"decoder.safetensors": FILE, "README.md": Path(__file__)}, one)
    in_the_cache(hub, "me/two", {"a/first.safetensors": FILE, "second.safetensors": FILE, "old.pth": FILE}, one)
    in_the_cache(hub, "me/two", {"a/first.safetensors": FILE}, two, "dev")
    root = hub / "models--me--two/snapshots"
    assert find_decoder("me/one") == hub / "models--me--one/snapshots" / one / "decoder.safetensors"
    assert find_decoder("me/two/second.safetensors") == root / one / "second.safetensors"
    assert find_decoder("me/two/a/first.safetensors@dev") == root / two / "a/first.safetensors"
    assert find_decoder("me/two@dev") == root / two / "a/first.safetensors"
    assert find_decoder(f"me/two@{two}") == root / two / "a/first.safetensors"
    for name, message in (
        ("me/two", r"me/two has 2 files of weights: name one, as in me/two/a/first.safetensors"),
        ("me/two/third.safetensors", "hub is out of reach: .*huggingface.co/me/two/blob/main/third.safetensors"),
        ("me/none", "download huggingface.co/me/none and"),
        ("me/two/second.safetensors@dev", "out of reach"),
        ("me/two@none", "out of reach"),
    ):
        with pytest.raises(InputError, match=message):
            find_decoder(name)
    for name in ("nothing.pth", "runs/nothing.safetensors", "./a/b/c.pth", "/a/b/c.pth", "a b/c/d.pth", "a//b"):
        assert find_decoder(name) == Path(name)
        with pytest.raises(InputError, match="does not exist"):
            SurrogateDecoder.from_checkpoint(find_decoder(name))
    assert find_decoder(FILE) == FILE
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder has no \.safetensors or \.pth file"):
        find_decoder(tmp_path / "folder")
    shutil.copy(FILE, tmp_path / "folder/x.safetensors")
    assert find_decoder(tmp_path / "folder") == tmp_path / "folder/x.safetensors"


def test_a_reasoner_brings_its_familys_decoder(
    models: dict[str, str], hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --decoder, the pair's own is used where it fits the latents, or else the known one of the hub."""
    monkeypatch.setenv("VLMTEACHER_CHECK_DECODER", "0")
    pipe = TeacherPipeline.from_pretrained(DIRECTORY / PAIR["reasoner"])
    assert pipe.models["decoder"] == "packaged/decoder.safetensors"
    foreign = {"reasoner": models["reasoner"], "teacher": models["teacher"]}
    monkeypatch.setattr("vlmteacher.decoders.find.KNOWN", {})
    with pytest.raises(InputError, match="no decoder is known for latents of 8 channels"):
        TeacherPipeline.from_pretrained(**foreign)
    monkeypatch.setattr(
        "vlmteacher.decoders.find.KNOWN", {("WanTransformer3DModel", (8, 4, 8)): "me/one/tiny.safetensors"}
    )
    with pytest.raises(InputError, match=r"download huggingface\.co/me/one/blob/main/tiny\.safetensors"):
        TeacherPipeline.from_pretrained(**foreign)
    in_the_cache(hub, "me/one", {"tiny.safetensors": tiny_decoder(tmp_path / "tiny.safetensors")}, "1" * 40)
    assert TeacherPipeline.from_pretrained(**foreign).models["decoder"] == "me/one/tiny.safetensors"


# ------------------------------------------------------------------ devices


def test_devices_and_dtype_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmteacher import placement

    devices = find_devices(None)
    assert {str(device) for device in devices.values()} == {"cpu"} and find_dtype(devices) == torch.float32
    cuda = {"reasoner": torch.device("cuda", 0), "teacher": torch.device("cuda", 1)}
    assert find_dtype(cuda) == torch.bfloat16
    assert find_dtype({**cuda, "teacher": torch.device("cpu")}) == torch.float32
    line = describe(devices, torch.float32)
    assert line.startswith("cpu (") and line.endswith("), float32") and "()" not in line
    monkeypatch.setattr(placement, "_processor", lambda device: f"card {device.index}")
    assert describe(cuda, torch.bfloat16) == "reasoner cuda:0 (card 0), teacher cuda:1 (card 1), bfloat16"
    assert describe({**cuda, "teacher": cuda["reasoner"]}, torch.bfloat16) == "cuda:0 (card 0), bfloat16"
