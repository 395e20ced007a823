"""The TAEHV class of surrogate decoders (github.com/madebyollin/taehv, MIT; LightX2V ships the same networks).

One layer table describes every published checkpoint; the differences follow from the shapes of the weights:

====================  ========  =====  ==========  =========
checkpoint            channels  patch  time        space
====================  ========  =====  ==========  =========
taew2_1, taehv        16        1      (1, 2, 2)   x8
taecvx                16        1      (1, 2, 2)   x8
taew2_2               48        2      (1, 2, 2)   x16
taehv1_5              32        2      (1, 2, 2)   x16
lighttaew2_1, _2_2    16, 48    1, 2   (1, 2, 2)   x8, x16 (takes de-normalised latents)
lighttaehy1_5         32        2      (1, 2, 2)   x16 (takes de-scaled latents, LeakyReLU, gives [-1, 1])
taew2_2_super         48        2      (1, 2, 2)   x16 (other layers: `SuperVideoDecoder`)
taehv1_5_super        32        2      (1, 2, 2)   x16 (the same)
====================  ========  =====  ==========  =========

Training runs the plain torch modules (`decode_batch`). With frozen weights `decode` is one autograd function
(`vlmteacher.ops.surrogate_decoder`), defined by the modules.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmteacher.decoders import taehv_files as files
from vlmteacher.decoders.find import KNOWN, find_decoder
from vlmteacher.decoders.taehv_layers import MemBlock, SoftClamp, SuperMemBlock, TGrow, activation
from vlmteacher.errors import InputError, first_line
from vlmteacher.files import parse_json, replacing
from vlmteacher.moved import moved_name
from vlmteacher.ops import surrogate_decoder
from vlmteacher.ops.backends import without_data
from vlmteacher.ops.decoder_plan import Layer, Plan
from vlmteacher.ops.patchify import PatchLayout, PatchRows
from vlmteacher.reasoners.registry import decoder_file, family_of
from vlmteacher.torch_modes import keepable, plain_torch

# Bytes of one activation at full resolution, of which a few are alive at a time. A GPU needs more frames to be busy. On
# the CPU a chunk and the frame carried over from the chunk before must fit below 32 MiB: the C library maps larger
# tensors anew, and the page faults cost more than the longer chunk gains.
CHUNK_BYTES = {"cpu": 28 << 20, "cuda": 256 << 20}
CPU = torch.device("cpu")
LAYOUT = ("latent_channels", "temporal_stride", "spatial_stride")


class SurrogateDecoder(nn.Module):
    """Latents to frames by the published TAEHV layer table, in plain torch and differentiable.

    Args:
        latent_channels: channels C of the latents.
        widths: channels of the three stages and of the last layers.
        patch: side of the final pixel shuffle.
        time_upscale: which stages double the frames.
        space_upscale: which stages double height and width; the weights do not show it, so `save` records it.
        slope: slope of the activations below zero: 0 is ReLU; lighttaehy1_5 has LeakyReLU 0.2.
        signed: the network's output is in [-1, 1] (that decoder's is) and is mapped to [0, 1].
    """

    def __init__(
        self,
        latent_channels: int,
        widths: Sequence[int] = (256, 128, 64, 64),
        patch: int = 1,
        time_upscale: Sequence[bool] = (False, True, True),
        space_upscale: Sequence[bool] = (True, True, True),
        slope: float = 0.0,
        signed: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "latent_channels": latent_channels,
            "widths": [int(w) for w in widths],
            "patch": patch,
            "time_upscale": [bool(t) for t in time_upscale],
            "space_upscale": [bool(s) for s in space_upscale],
            "slope": float(slope),
            "signed": bool(signed),
        }
        self.decoder = nn.Sequential(*self._make_modules())
        # per-channel statistics for checkpoints that take de-normalised latents, see `load_decoder`
        self.latents_mean: Tensor | None
        self.latents_std: Tensor | None
        self.register_buffer("latents_mean", None, persistent=False)
        self.register_buffer("latents_std", None, persistent=False)
        self._layers: tuple[list[Any], list[Layer]] | None = None  # made from the weights by `layers`
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def _make_modules(self) -> list[nn.Module]:
        """The layer table, with upstream's numbers."""
        widths, patch, slope = (self.config[name] for name in ("widths", "patch", "slope"))
        first = nn.Conv2d(self.latent_channels, widths[0], 3, padding=1)
        layers: list[nn.Module] = [SoftClamp(), first, activation(slope)]
        for stage in range(3):
            layers += [MemBlock(widths[stage], slope) for _ in range(3)]
            layers += [
                nn.Upsample(scale_factor=2 if self.config["space_upscale"][stage] else 1),
                TGrow(widths[stage], 2 if self.config["time_upscale"][stage] else 1),
                nn.Conv2d(widths[stage], widths[stage + 1], 3, padding=1, bias=False),
            ]
        return [*layers, activation(slope), nn.Conv2d(widths[3], 3 * patch**2, 3, padding=1)]

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
            latents: (B, C, T, h, w), normalised as the Reasoner's transformer reads them.
            clamp: clamp to [0, 1]. Training turns it off, for a clamped value has no gradient.

        Returns:
            (B, F, 3, H, W) with F = temporal_stride * (T - 1) + 1.
        """
        batch = latents.shape[0]
        x = self._run(self._network_latents(latents).transpose(1, 2).flatten(0, 1), batch, 0, len(self.decoder))
        frames = F.pixel_shuffle(x, self.config["patch"]).unflatten(0, (batch, -1))[:, self.temporal_stride - 1 :]
        frames = frames / 2 + 0.5 if self.config["signed"] else frames
        return frames.clamp(0, 1) if clamp else frames

    def _run(self, x: Tensor, batch: int, first: int, end: int) -> Tensor:
        """Layers `first` to `end` on x (batch T, C, h, w)."""
        for layer in self.decoder[first:end]:
            memory = isinstance(layer, (MemBlock, SuperMemBlock))
            x = layer(x.unflatten(0, (batch, -1))).flatten(0, 1) if memory else layer(x)
        return x

    def decode(
        self,
        latents: Tensor,
        frame_indices: Sequence[int] | None = None,
        chunk: int | None = None,
        check: bool = True,
    ) -> Tensor:
        """Decode some frames of one clip, computing only what they depend on.

        With frozen weights this keeps one bit per activation for the backward pass, decodes the frames in chunks and is
        differentiable once with respect to the latents (`vlmteacher.ops.surrogate_decoder`). A decoder in training
        decodes the whole clip by `decode_batch`.

        Args:
            latents: (1, C, T, h, w), normalised as the Reasoner's transformer reads them; finite.
            frame_indices: which of the F = temporal_stride * (T - 1) + 1 frames, in any order, with repetitions; None
                is all of them.
            chunk: frames decoded at a time: bounds the memory and changes no frame; None chooses by the size.
            check: test the latents for NaN, which waits for the device; without it NaN may stay unnoticed.

        Returns:
            (K, 3, H, W) in [0, 1], in the order of `frame_indices`.

        Raises:
            InputError: latents of another shape or with NaN; unknown frames, or none; a chunk below 1.
        """
        indices = self._check(latents, frame_indices, chunk, check)
        return self._decode(latents, indices, chunk)

    def decode_rows(
        self,
        latents: Tensor,
        layout: PatchLayout,
        frame_indices: Sequence[int] | None = None,
        chunk: int | None = None,
        check: bool = True,
    ) -> PatchRows:
        """Decode frames as the patch rows that a Teacher reads (`Teacher.patch_layout`); the last layer writes them.

        Equal to `patchify` of `decode`'s frames, without a tensor of frames in between, and differentiable likewise.

        Raises:
            InputError: as `decode`; frames that do not split into the layout's blocks.
        """
        indices = self._check(latents, frame_indices, chunk, check)
        height, width = (side * self.spatial_stride for side in latents.shape[-2:])
        return PatchRows(self._decode(latents, indices, chunk, layout), layout, len(indices), height, width)

    def _decode(
        self, latents: Tensor, indices: list[int], chunk: int | None, layout: PatchLayout | None = None
    ) -> Tensor:
        if any(p.requires_grad for p in self.parameters()):
            frames = self.decode_batch(latents)[0][indices]
            return frames if layout is None else layout.of(frames)
        layers, plan = self.layers(), self.plan(latents.shape[-2:], indices, chunk, latents.device)
        x = self.decoder[0](self._network_latents(latents))[0].permute(1, 2, 3, 0).contiguous()
        raw = [i + self.temporal_stride - 1 for i in indices]  # the first latent frame gives fewer frames
        return surrogate_decoder.decode(x, layers, plan, self.config["patch"], raw, layout)

    def plan(
        self,
        size: Sequence[int],
        frame_indices: Sequence[int],
        chunk: int | None = None,
        device: torch.device = CPU,
    ) -> Plan:
        """The plan that decodes these frames of latents of `size` (h, w), with its indices on `device`; cached."""
        wanted = sorted({i + self.temporal_stride - 1 for i in frame_indices})
        if chunk is None:
            pixels = size[0] * size[1] * 4 ** sum(self.config["space_upscale"])
            weight = self.decoder[1].weight
            frame = pixels * max(self.config["widths"][2:]) * weight.element_size()
            chunk = max(self.temporal_stride, CHUNK_BYTES["cpu" if weight.device.type == "cpu" else "cuda"] // frame)
        key = (device, *wanted, -chunk)
        if key not in self._plans:
            if len(self._plans) >= 8:
                self._plans.clear()
            self._plans[key] = Plan.make(self.layers(), wanted, chunk).to(device)
        return self._plans[key]

    def layers(self) -> list[Layer]:
        """The layer table for `vlmteacher.ops.surrogate_decoder`, in the weights' dtype and on their device.

        Upsampling, TGrow and the convolution after it are linear, without biases between them: they become one
        convolution for each frame that TGrow makes.
        """
        parameters = list(self.parameters())
        state = [(p.untyped_storage()._cdata, 0 if p.is_inference() else p._version, p.dtype) for p in parameters]
        if self._layers is None or self._layers[0] != state:
            with keepable(), torch.no_grad():
                self._layers = state, self._make_layers()
        return self._layers[1]

    def _make_layers(self) -> list[Layer]:
        slope = self.config["slope"]

        def last(weight: Tensor) -> Tensor:
            return weight.detach().permute(0, 2, 3, 1).contiguous()

        modules = list(self.decoder)
        layers = [Layer((last(modules[1].weight),), modules[1].bias.detach(), slope=slope)]
        for stage in range(3):
            start = 3 + 6 * stage
            for block in modules[start : start + 3]:
                first, second, third = (block.conv[i] for i in (0, 2, 4))
                layers += [
                    Layer((last(first.weight),), first.bias.detach(), memory=True, slope=slope),
                    Layer((last(second.weight),), second.bias.detach(), slope=slope),
                    Layer((last(third.weight),), third.bias.detach(), residual=len(layers), slope=slope),
                ]
            grow, project = modules[start + 4].conv.weight[:, :, 0, 0].double(), modules[start + 5].weight
            weights = [
                last(torch.einsum("nmyx,mc->ncyx", project.double(), each).to(project.dtype))
                for each in grow.split(project.shape[1])
            ]
            activation = slope if stage == 2 else None
            upscale = 2 if self.config["space_upscale"][stage] else 1
            layers.append(Layer(tuple(weights), slope=activation, upscale=upscale))
        head = modules[22]
        if self.config["signed"]:  # [-1, 1] to [0, 1], within the convolution
            weight, bias = head.weight.double() / 2, head.bias.double() / 2 + 0.5
            return [*layers, Layer((last(weight.to(head.weight.dtype)),), bias.to(head.bias.dtype))]
        return [*layers, Layer((last(head.weight),), head.bias.detach())]

    def _check(
        self, latents: Tensor, frame_indices: Sequence[int] | None, chunk: int | None, values: bool
    ) -> list[int]:
        """The checked `frame_indices`, with None replaced by all frames. Raises InputError."""
        shape = tuple(latents.shape)
        if latents.dim() != 5 or shape[0] != 1 or 0 in shape:
            raise InputError(f"a decoder takes the latents (1, C, T, h, w) of one clip, got {shape}")
        if shape[1] != self.latent_channels:
            raise InputError(
                f"latents of {shape[1]} channels for a decoder of {self.latent_channels}:"
                " give those of the Reasoner whose family the decoder is of"
            )
        if not latents.is_floating_point():
            raise InputError(f"a decoder takes floating-point latents, got {latents.dtype}")
        if values and not without_data(latents) and latents.isnan().any():
            raise InputError("the latents hold NaN: the Reasoner's prediction broke down before it was decoded")
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk must be at least 1 frame, not {chunk}")
        count = self.temporal_stride * (shape[2] - 1) + 1
        indices = list(range(count)) if frame_indices is None else [int(i) for i in frame_indices]
        if not indices:
            raise InputError("frame_indices is empty: name at least one frame")
        if wrong := [i for i in indices if not 0 <= i < count]:
            raise InputError(f"frame {wrong[0]} does not exist: these latents decode to frames 0 to {count - 1}")
        return indices

    def _network_latents(self, latents: Tensor) -> Tensor:
        """The first layer's input: latents in the weights' dtype, de-normalised for checkpoints that take them so."""
        if self.latents_mean is not None and self.latents_std is not None:
            latents = latents * self.latents_std + self.latents_mean
        return latents.to(next(self.parameters()).dtype)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with upstream's ``decoder.{i}`` keys and the layout as metadata.

        Raises OutputError.
        """
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        with replacing(Path(path)) as temporary:
            save_file(state, temporary, metadata={"config": json.dumps(self.config)})

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> SurrogateDecoder:
        """Load an upstream ``.pth`` or ``.safetensors`` file, frozen and in eval mode. Encoder weights are ignored.

        Raises:
            InputError: the file does not exist, holds no weights, or weights of another layer table.
        """
        path = Path(path)
        state, metadata = files.read_tensors(path)
        written = parse_json(metadata.get("config", "{}"), f"the metadata of {path}")
        kind = SuperVideoDecoder if files.is_super(state) else SurrogateDecoder
        try:
            if files.is_super(state):
                config = files.read_super_layout(state)
            else:
                config = files.read_layout(state, written if isinstance(written, dict) else {}, path)
            with torch.device("meta"):  # no memory is taken before the shapes that the file names are checked
                expected = {name: value.shape for name, value in kind(**config).state_dict().items()}
            files.check_shapes({name: value.shape for name, value in state.items()}, expected)
            decoder = kind(**config)
            decoder.load_state_dict(state)
        except (AttributeError, KeyError, IndexError, ValueError, RuntimeError, TypeError, OverflowError) as error:
            raise InputError(
                f"{path} is not a TAEHV decoder ({first_line(error)[:120]}): give a checkpoint such as taew2_1, taew2_2"
                " or taew2_2_super"
            ) from error
        if scale := decoder_file(path.name).latents_scale:
            decoder.latents_mean = torch.zeros(1, decoder.latent_channels, 1, 1, 1)
            decoder.latents_std = torch.full_like(decoder.latents_mean, 1 / scale)
        return decoder.to(dtype).eval().requires_grad_(False)


class SuperVideoDecoder(SurrogateDecoder):
    """The ``_super`` layer table: wider, `SuperMemBlock`s, pixel shuffles instead of upsampling, no clamp of latents.

    It runs as plain torch modules. For the backward pass it keeps the activations at the four borders of its stages and
    recomputes the others. widths: channels of the three stages and of the last convolution's input.
    """

    def __init__(
        self,
        latent_channels: int,
        widths: Sequence[int] = (512, 256, 128, 64),
        patch: int = 2,
        time_upscale: Sequence[bool] = (False, True, True),
        space_upscale: Sequence[bool] = (True, True, True),
    ) -> None:
        super().__init__(latent_channels, widths, patch, time_upscale, space_upscale)

    def _make_modules(self) -> list[nn.Module]:
        widths, patch = self.config["widths"], self.config["patch"]
        layers: list[nn.Module] = [nn.Conv2d(self.latent_channels, widths[0], 1, bias=False)]
        for stage in range(3):
            side, width = 2 if self.config["space_upscale"][stage] else 1, widths[stage + 1]
            layers += [SuperMemBlock(widths[stage]) for _ in range(3)]
            layers += [
                nn.Conv2d(widths[stage], width * side**2, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.PixelShuffle(side),
                TGrow(width, 2 if self.config["time_upscale"][stage] else 1),
            ]
        return [*layers, nn.Conv2d(widths[3], 3 * patch**2, 3, padding=1)]

    def layers(self) -> list[Layer]:
        """Empty: these layers have no fused form."""
        return []

    def _decode(
        self, latents: Tensor, indices: list[int], chunk: int | None, layout: PatchLayout | None = None
    ) -> Tensor:
        stride = self.temporal_stride
        needed = (max(indices) + stride - 1) // stride + 1  # no frame depends on later latents
        x = self._network_latents(latents[:, :, :needed]).transpose(1, 2).flatten(0, 1)
        for first, end in pairwise((0, 8, 15, 22, len(self.decoder))):
            if x.requires_grad:
                x = checkpoint(self._run, x, 1, first, end, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self._run(x, 1, first, end)
        frames = F.pixel_shuffle(x, self.config["patch"])[[i + stride - 1 for i in indices]].clamp(0, 1)
        return frames if layout is None else layout.of(frames)


@plain_torch()
def load_decoder(path: str | os.PathLike[str], reasoner: Any, dtype: torch.dtype = torch.float32) -> SurrogateDecoder:
    """Load a decoder for a Reasoner's latents, and check that it fits them (`check_decoder`); on the Reasoner's device.

    path: a file, or a file on the hub (`find_decoder`). A decoder that was trained on de-normalised latents
    (`DecoderFile`) gets the Reasoner's statistics. Raises InputError.
    """
    path = find_decoder(path)
    known = decoder_file(path.name)
    decoder = SurrogateDecoder.from_checkpoint(path, dtype)
    check_decoder(decoder, reasoner, name=str(path))
    if known.refusal and known in family_of(reasoner.transformer).decoder_files:
        raise InputError(f"{path} {known.refusal}")
    if known.denormalised:
        decoder.latents_mean, decoder.latents_std = reasoner.latents_mean.clone(), reasoner.latents_std.clone()
    return decoder.to(reasoner.device)


def fits_decoder(path: str | os.PathLike[str], reasoner: Any) -> bool:
    """Whether the checkpoint's channels and strides are those of the Reasoner's latents."""
    decoder = SurrogateDecoder.from_checkpoint(path)
    return all(getattr(decoder, name) == getattr(reasoner, name) for name in LAYOUT)


def check_decoder(decoder: SurrogateDecoder, reasoner: Any, name: str = "the decoder") -> None:
    """Raise InputError unless `decoder` takes the latents of `reasoner` and gives frames of the VAE's size."""
    if decoder.latent_channels != reasoner.latent_channels:
        files = {f"{Path(file).stem}: {channels} channels": None for (_, (channels, *_)), file in KNOWN.items()}
        published = ", ".join(files)  # each once
        raise InputError(
            f"{name} decodes latents of {decoder.latent_channels} channels, but the Reasoner's have"
            f" {reasoner.latent_channels}: give a decoder of the Reasoner's family ({published}), or train one with"
            " `vlmteacher distill decoder`"
        )
    ours = (decoder.temporal_stride, decoder.spatial_stride)
    theirs = (reasoner.temporal_stride, reasoner.spatial_stride)
    if ours != theirs:
        raise InputError(
            f"{name} upscales {ours[0]}x in time and {ours[1]}x in space, but the Reasoner's VAE {theirs[0]}x and"
            f" {theirs[1]}x: give a decoder of the Reasoner's family"
        )


def __getattr__(name: str) -> object:
    return moved_name(__name__, name)
