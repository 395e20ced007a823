"""`vlmteacher distill decoder`: a surrogate decoder for a video VAE of diffusers, from a folder of videos.

A clip is encoded by the VAE; the decoder learns to give what the VAE's own decoder gives, pixel by pixel and in the
differences of neighbouring pixels, on latents that are normalised as the VAE's transformer sees them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from vlmteacher.decoders.taehv import TinyVideoDecoder
from vlmteacher.distillation.dataset import read_video, resized
from vlmteacher.distillation.trainer import Trainer, TrainSettings, check_out
from vlmteacher.distillation.training import build_settings, read_settings
from vlmteacher.errors import InputError
from vlmteacher.hub import only_local
from vlmteacher.optimization import NonFiniteError

SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi")


@dataclass(frozen=True)
class Settings:
    """What such a training may be told; the entries of its YAML file. Raises InputError.

    Attributes:
        vae: of diffusers: a directory or a hub id, of itself or of a pipeline that has it.
        data: folder of videos, at any depth.
        out: folder to write to; the result is its ``decoder.safetensors``.
        num_frames, height, width: of the clips: the first frames of a random place, resized.
        widths: channels of the three stages and of the last layers.
        held_out: videos, spread over the data, that are not trained on: they make the validation curve.
        train: steps, batch size, learning rate, ... (`full`, `rank` and `gradient_checkpointing` mean nothing here).
    """

    vae: str
    data: str
    out: str
    num_frames: int
    height: int
    width: int
    widths: Sequence[int] = (256, 128, 64, 64)
    held_out: int = 1
    train: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width", "held_out"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, not {value}")
        widths = self.widths
        if (
            not isinstance(widths, list | tuple)
            or len(widths) != 4
            or not all(isinstance(w, int) and w > 0 for w in widths)
        ):
            raise InputError(f"widths must be four whole numbers greater than 0, not {widths}")

    def to_dict(self) -> dict[str, Any]:
        """What a resumed run must agree with, by its name in the YAML file."""
        values = asdict(self)
        return {**values.pop("train"), **{name: value for name, value in values.items() if name != "out"}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """From the entries of a YAML file; those of `TrainSettings` stand beside the others."""
        return build_settings(values, lambda entries: cls(**entries))


def load_settings(path: Path, overrides: dict[str, Any]) -> Settings:
    """Read a YAML file of `Settings`; `overrides` replace its entries. Raises InputError."""
    return read_settings(path, overrides, lambda entries: Settings(**entries))


class Autoencoder:
    """A VAE of diffusers, between videos (B, 3, F, H, W) in [-1, 1] and normalised latents (B, C, T, h, w)."""

    def __init__(self, path_or_id: str) -> None:
        import diffusers

        local = only_local(path_or_id)
        reasons = []
        for where in ({"subfolder": "vae"}, {}):
            try:
                model = diffusers.AutoModel.from_pretrained(path_or_id, local_files_only=local, **where)
                break
            except (OSError, ValueError, RuntimeError, KeyError, AttributeError, SafetensorError) as error:
                reasons.append((str(error).strip().splitlines() or [type(error).__name__])[0][:120])
        else:
            raise InputError(f"{path_or_id} holds no VAE of diffusers ({reasons[-1]})")
        if not (hasattr(model, "encode") and hasattr(model, "decode")):
            raise InputError(f"{path_or_id} is a {type(model).__name__}, which encodes no videos: give a VAE")
        self.model: Any = model.eval().requires_grad_(False)
        config = model.config
        buffers = dict(model.named_buffers(recurse=False))  # where LTX keeps them
        mean, std = (config.get(name, buffers.get(name)) for name in ("latents_mean", "latents_std"))
        # Wan divides by std; LTX does and multiplies by its scale, which is 1; all others only multiply
        shape = (1, -1, 1, 1, 1)
        self.mean = (torch.zeros(1) if mean is None else torch.as_tensor(mean).float()).view(shape)
        scale = config.get("scaling_factor") or 1.0
        self.std = (torch.ones(1) if std is None else torch.as_tensor(std).float()).view(shape) / scale

    def to(self, device: torch.device) -> Autoencoder:
        self.model.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        return (self.model.encode(video).latent_dist.mode().float() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode((latents * self.std + self.mean).to(self.model.dtype), return_dict=False)[0].float()


def decoder_for(latents: Tensor, video: Tensor, widths: Sequence[int]) -> TinyVideoDecoder:
    """An untrained decoder from latents (1, C, T, h, w) to videos (1, 3, F, H, W). Raises InputError."""
    channels, latent_frames, h, w = latents.shape[1:]
    frames, height, width = video.shape[2:]
    time = (frames - 1) / (latent_frames - 1) if latent_frames > 1 else 0
    space = height / h
    if time not in (1, 2, 4, 8) or space not in (1, 2, 4, 8, 16, 32, 64) or width != w * space:
        raise InputError(
            f"no decoder of this kind takes {latent_frames}x{h}x{w} latents to {frames}x{height}x{width} frames: it"
            " doubles one frame up to 3 times in time (1 + n frames, n a multiple of 8) and the sides up to 6 times"
        )
    doublings, ups = int(math.log2(time)), min(3, int(math.log2(space)))
    return TinyVideoDecoder(
        channels,
        widths,
        patch=int(space) >> ups,
        time_upscale=[stage >= 3 - doublings for stage in range(3)],
        space_upscale=[stage < ups for stage in range(3)],
    )


class Distillation:
    """The loss, and what is looked at on the way."""

    def __init__(self, settings: Settings, vae: Autoencoder, videos: Sequence[Path], device: torch.device) -> None:
        self.settings, self.vae, self.device = settings, vae, device
        if not settings.held_out < len(videos):
            raise InputError(f"{settings.held_out} of {len(videos)} videos cannot be held out: leave some to train on")
        held = {k * len(videos) // settings.held_out for k in range(settings.held_out)}
        self.held_out = [path for i, path in enumerate(videos) if i in held]
        self.videos = [path for i, path in enumerate(videos) if i not in held]
        first = self.clip(self.held_out[0], 0)[None].to(device)
        torch.manual_seed(settings.train.seed)
        self.decoder = decoder_for(vae.encode(first), first, settings.widths).to(device)
        self.optimizer = torch.optim.AdamW(
            self.decoder.parameters(), lr=settings.train.learning_rate, weight_decay=settings.train.weight_decay
        )

    def clip(self, path: Path, start: int) -> Tensor:
        """(3, F, H, W) in [-1, 1] from frame `start`, or a little earlier; raises InputError."""
        settings = self.settings
        frames = read_video(path)
        if len(frames) < settings.num_frames:
            raise InputError(f"video {path} is too short: {len(frames)} frames of {settings.num_frames}")
        start %= len(frames) - settings.num_frames + 1
        frames = resized(frames[start : start + settings.num_frames], settings.height, settings.width)
        return torch.from_numpy(frames.astype(np.float32)).permute(3, 0, 1, 2) / 127.5 - 1

    def error(self, videos: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The loss on videos (B, 3, F, H, W); values to log."""
        latents = self.vae.encode(videos)
        target = (self.vae.decode(latents).clamp(-1, 1) + 1) / 2
        low = self.settings.train.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            frames = self.decoder.decode_batch(latents, clamp=False)
        error = frames.float().transpose(1, 2) - target
        edges = [error.diff(dim=dim).abs().mean() for dim in (2, 3, 4) if error.shape[dim] > 1]
        loss = error.abs().mean() + sum(edges, start=error.new_zeros(()))
        square = error.detach().clamp(-1, 1).square().mean()
        return loss, {"loss": float(loss.detach()), "psnr": float(-10 * torch.log10(square))}

    def step(self, index: int, generator: torch.Generator) -> dict[str, float]:
        """One update. Raises NonFiniteError."""
        train = self.settings.train
        found: dict[str, float] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(train.gradient_accumulation):
            drawn = torch.randint(len(self.videos), (train.batch_size,), generator=generator).tolist()
            starts = torch.randint(2**31, (train.batch_size,), generator=generator).tolist()
            videos = torch.stack([self.clip(self.videos[k], at) for k, at in zip(drawn, starts, strict=True)])
            loss, values = self.error(videos.to(self.device))
            if not torch.isfinite(loss):
                raise NonFiniteError(f"the loss of step {index} is {float(loss)}")
            (loss / train.gradient_accumulation).backward()
            found = {name: found.get(name, 0) + value / train.gradient_accumulation for name, value in values.items()}
        norm = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), train.max_grad_norm)
        if not torch.isfinite(norm):
            raise NonFiniteError(f"the gradient of step {index} is not finite")
        self.optimizer.step()
        return found

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """On the first frames of the held-out videos."""
        rows = [self.error(self.clip(path, 0)[None].to(self.device))[1] for path in self.held_out]
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def find_videos(folder: Path) -> list[Path]:
    """Sorted. Raises InputError when there is none."""
    if not folder.is_dir():
        raise InputError(f"data folder {folder} does not exist")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"data folder {folder} holds no video ({', '.join(SUFFIXES)})")
    return found


def run(settings: Settings, resume: bool = False) -> Path:
    """Train; returns the decoder's file, ``decoder.safetensors`` in `settings.out`.

    Raises InputError for what cannot be used, NonFiniteError when the training breaks down (the last good state stays).
    """
    from accelerate import Accelerator

    out = Path(settings.out)
    check_out(out, resume)
    videos = find_videos(Path(settings.data))
    accelerator = Accelerator()
    vae = Autoencoder(settings.vae).to(accelerator.device)
    distillation = Distillation(settings, vae, videos, accelerator.device)
    modules, optimizers = {"student": distillation.decoder}, {"student": distillation.optimizer}
    trainer = Trainer(out, modules, optimizers, settings.to_dict(), accelerator)
    if resume:
        trainer.resume()
    trainer.run(distillation.step, settings.train.steps, distillation.validate)
    distillation.decoder.save(out / "decoder.safetensors")
    return out / "decoder.safetensors"
