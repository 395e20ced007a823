"""The TAEHV class of tiny video decoders (github.com/madebyollin/taehv, MIT; LightX2V ships the same networks).

One layer table serves every published checkpoint; what differs can be read from the shapes of the weights:

====================  ========  =====  ==========  =========
checkpoint            channels  patch  time        space
====================  ========  =====  ==========  =========
taew2_1, taehv        16        1      (1, 2, 2)   x8
taew2_2               48        2      (1, 2, 2)   x16
taehv1_5              32        2      (1, 2, 2)   x16
taeltx_2              128       4      (2, 2, 2)   x32
lighttaew2_1, _2_2    16, 48    1, 2   (1, 2, 2)   x8, x16 (takes de-normalised latents)
====================  ========  =====  ==========  =========
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmteacher.errors import InputError


class SoftClamp(nn.Module):
    """3 tanh(x / 3): keeps latents within what the decoder was trained on."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemBlock(nn.Module):
    """Residual block that sees the previous frame's input beside this frame's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x_BTCHW: Tensor) -> Tensor:
        past = F.pad(x_BTCHW, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
        pair = torch.cat([x_BTCHW, past], 2)
        return F.relu(self.conv(pair.flatten(0, 1)).view_as(x_BTCHW) + x_BTCHW)


class TGrow(nn.Module):
    """A 1x1 convolution that turns one frame into `stride` frames."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])


class TinyVideoDecoder(nn.Module):
    """Latents to frames by the published TAEHV layer table, in plain torch and differentiable.

    Args:
        latent_channels: channels C of the latents (16 Wan 2.1, 48 Wan 2.2).
        widths: channels of the three stages and of the last layers.
        patch: side of the final pixel shuffle.
        time_upscale: which stages double the frames.
        space_upscale: which stages double height and width; weights do not show it, so `save` writes it down.
    """

    def __init__(
        self,
        latent_channels: int,
        widths: Sequence[int] = (256, 128, 64, 64),
        patch: int = 1,
        time_upscale: Sequence[bool] = (False, True, True),
        space_upscale: Sequence[bool] = (True, True, True),
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "latent_channels": latent_channels,
            "widths": [int(w) for w in widths],
            "patch": patch,
            "time_upscale": [bool(t) for t in time_upscale],
            "space_upscale": [bool(s) for s in space_upscale],
        }
        layers: list[nn.Module] = [SoftClamp(), nn.Conv2d(latent_channels, widths[0], 3, padding=1), nn.ReLU()]
        for stage in range(3):
            layers += [MemBlock(widths[stage]) for _ in range(3)]
            layers += [
                nn.Upsample(scale_factor=2 if space_upscale[stage] else 1),
                TGrow(widths[stage], 2 if time_upscale[stage] else 1),
                nn.Conv2d(widths[stage], widths[stage + 1], 3, padding=1, bias=False),
            ]
        layers += [nn.ReLU(), nn.Conv2d(widths[3], 3 * patch**2, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)
        # Per-channel statistics for checkpoints that take de-normalised latents (see `load_decoder`).
        self.latents_mean: Tensor | None
        self.latents_std: Tensor | None
        self.register_buffer("latents_mean", None, persistent=False)
        self.register_buffer("latents_std", None, persistent=False)

    @property
    def latent_channels(self) -> int:
        return self.config["latent_channels"]

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame; T latent frames give ``temporal_stride * (T - 1) + 1`` frames."""
        return 2 ** sum(self.config["time_upscale"])

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent cell, along height and width."""
        return self.config["patch"] * 2 ** sum(self.config["space_upscale"])

    def decode_batch(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """Decode whole clips.

        Args:
            latents: (B, C, T, h, w), normalised as the Reasoner's transformer sees them.
            clamp: limit to [0, 1]. Training turns it off, for a clamped value has no gradient.

        Returns:
            (B, F, 3, H, W) with F = temporal_stride * (T - 1) + 1.
        """
        if self.latents_mean is not None and self.latents_std is not None:
            latents = latents * self.latents_std + self.latents_mean
        batch = latents.shape[0]
        x = latents.to(self.decoder[1].weight.dtype).transpose(1, 2).flatten(0, 1)
        for layer in self.decoder:
            x = layer(x.unflatten(0, (batch, -1))).flatten(0, 1) if isinstance(layer, MemBlock) else layer(x)
        frames = F.pixel_shuffle(x, self.config["patch"]).unflatten(0, (batch, -1))[:, self.temporal_stride - 1 :]
        return frames.clamp(0, 1) if clamp else frames

    def decode(self, latents: Tensor, frame_indices: Sequence[int] | None = None) -> Tensor:
        """Decode one clip: latents (1, C, T, h, w) -> frames (K, 3, H, W) in [0, 1], `frame_indices` or all."""
        frames = self.decode_batch(latents)[0]
        return frames if frame_indices is None else frames[list(frame_indices)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with upstream's ``decoder.{i}`` keys and the layout as metadata."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(state, partial, metadata={"config": json.dumps(self.config)})
        os.replace(partial, path)

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> TinyVideoDecoder:
        """Load an upstream ``.pth`` or a ``.safetensors`` file; frozen, in eval mode. Encoder weights are ignored.

        Raises:
            InputError: no such file, not a weights file, or not of this layer table.
        """
        path = Path(path)
        state, metadata = _read(path)
        try:
            first, last = state["decoder.1.weight"], state["decoder.22.weight"]
            projections = [state[f"decoder.{i}.weight"] for i in (8, 14, 20)]
            grows = [state[f"decoder.{i}.conv.weight"] for i in (7, 13, 19)]
            config: dict[str, Any] = {
                "latent_channels": first.shape[1],
                "widths": [first.shape[0], *(w.shape[0] for w in projections)],
                "patch": round((last.shape[0] / 3) ** 0.5),
                "time_upscale": [w.shape[0] == 2 * w.shape[1] for w in grows],
            }
            written = json.loads(metadata.get("config", "{}"))
            if "space_upscale" in written:
                config["space_upscale"] = written["space_upscale"]
            decoder = cls(**config)
            decoder.load_state_dict(state)
        except (KeyError, IndexError, ValueError, RuntimeError, TypeError) as error:
            raise InputError(
                f"{path} is not a TAEHV decoder ({_short(error)}): give a checkpoint such as taew2_1 or taew2_2"
                " (the _super variants have other layers)"
            ) from error
        return decoder.to(dtype).eval().requires_grad_(False)


def load_decoder(path: str | os.PathLike[str], reasoner: Any, dtype: torch.dtype = torch.float32) -> TinyVideoDecoder:
    """`TinyVideoDecoder.from_checkpoint` for a Reasoner: checked against it, on its device.

    LightX2V's ``lighttae*`` files were trained on de-normalised latents: they are given the Reasoner's statistics.
    """
    decoder = TinyVideoDecoder.from_checkpoint(path, dtype)
    check_decoder(decoder, reasoner, name=str(path))
    if Path(path).name.startswith("lighttae"):
        decoder.latents_mean, decoder.latents_std = reasoner.latents_mean.clone(), reasoner.latents_std.clone()
    return decoder.to(reasoner.device)


def check_decoder(decoder: TinyVideoDecoder, reasoner: Any, name: str = "the decoder") -> None:
    """Raise InputError unless `decoder` takes the latents of `reasoner` and gives frames of the VAE's size."""
    if decoder.latent_channels != reasoner.latent_channels:
        raise InputError(
            f"{name} decodes latents of {decoder.latent_channels} channels, but the Reasoner's have"
            f" {reasoner.latent_channels}: give a decoder of the Reasoner's family"
            " (taew2_1: 16 channels, taehv1_5: 32, taew2_2: 48)"
        )
    ours = (decoder.temporal_stride, decoder.spatial_stride)
    theirs = (reasoner.temporal_stride, reasoner.spatial_stride)
    if ours != theirs:
        raise InputError(
            f"{name} upscales {ours[0]}x in time and {ours[1]}x in space, but the Reasoner's VAE {theirs[0]}x and"
            f" {theirs[1]}x: give a decoder of the Reasoner's family"
        )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The ``decoder.*`` tensors of a file and its safetensors metadata."""
    if not path.is_file():
        raise InputError(f"decoder file {path} does not exist: give the path of a .pth or .safetensors checkpoint")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith("decoder.")]  # noqa: SIM118 (no iterator)
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        return {name: value for name, value in loaded.items() if name.startswith("decoder.")}, {}
    except Exception as error:  # a damaged archive can raise anything from its reader
        raise InputError(f"cannot read {path} as decoder weights ({_short(error)})") from error


def _short(error: Exception) -> str:
    """The first line of an error, at most 120 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
