"""``vlmteacher distill decoder``: a surrogate decoder for the latents of any video VAE of diffusers."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vlmteacher.checkpoints.hub import find_file, only_local
from vlmteacher.checkpoints.pretrained import json_object, load_network
from vlmteacher.decoders.taehv import SurrogateDecoder
from vlmteacher.distillation.dataset import find_instances, read_sized, save_whole, whole
from vlmteacher.distillation.kinds import check_kinds
from vlmteacher.distillation.reconstruction import reconstruction_loss
from vlmteacher.distillation.trainer import AVERAGED, Trainer, TrainSettings, training_folder
from vlmteacher.distillation.training import read_settings
from vlmteacher.errors import InputError, NonFiniteError
from vlmteacher.files import make_folder
from vlmteacher.progress import track
from vlmteacher.reasoners.vae import decode_latents
from vlmteacher.torch_modes import plain_torch
from vlmteacher.trackers import LOGS, Trackers, tracking

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class DecoderSettings:
    """Settings of the training of a surrogate decoder: the entries of its YAML file. Raises InputError.

    Attributes:
        vae: hub id or directory of a diffusers VAE, or of a pipeline that has one.
        data: folder of instances in VBVR's layout; only their videos are used.
        out: folder to write to; the result is ``decoder.safetensors`` in it.
        num_frames, height, width: size to which the videos are cut and resized, in frames and pixels.
        cache: folder of the encoded videos, ``out/cache`` by default.
        widths: channels of the decoder's three stages and of its last layers.
        patch: side of the final pixel shuffle; 0 derives it from the VAE's stride and three doublings.
        target: what the decoder learns to reproduce: the "vae"'s decoding, or the "video" itself.
        crop: side of the training windows in latent cells; 0 trains on whole frames.
        held_out: number of videos to validate on.
        train: steps, batch size, learning rate, ...
    """

    vae: str
    data: str
    out: str
    num_frames: int
    height: int
    width: int
    cache: str | None = None
    widths: tuple[int, ...] = (256, 128, 64, 64)
    patch: int = 0
    target: Literal["vae", "video"] = "vae"
    crop: int = 0
    held_out: int = 8
    train: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        check_kinds(self)
        least = {"num_frames": 1, "height": 1, "width": 1, "patch": 0, "crop": 0, "held_out": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise InputError(f"{name} must be a whole number of at least {low}, not {value}")
        if self.target not in ("vae", "video"):
            raise InputError(f"target must be vae or video, not {self.target!r}")
        widths = self.widths
        if (
            not isinstance(widths, list | tuple)
            or len(widths) != 4
            or not all(isinstance(w, int) and w > 0 for w in widths)
        ):
            raise InputError(f"widths must be four whole numbers greater than 0, not {widths}")

    def to_dict(self) -> dict[str, Any]:
        """The settings that a resumed run must share, by their names in the YAML file."""
        values = asdict(self)
        return {**values.pop("train"), **{n: v for n, v in values.items() if n not in ("out", "cache")}}


def load_settings(path: Path, overrides: dict[str, Any]) -> DecoderSettings:
    """Read `DecoderSettings` from a YAML file; `overrides` take precedence over its entries. Raises InputError."""
    return read_settings(path, overrides, lambda entries: DecoderSettings(**entries))


class VideoVAE:
    """A frozen diffusers VAE, to and from the normalised latents that its pipeline's transformer uses."""

    def __init__(self, source: str, device: torch.device) -> None:
        self.model: Any = _load(source).to(device).eval().requires_grad_(False)
        self.device = device
        config = self.model.config
        buffers = dict(self.model.named_buffers(recurse=False))  # where some classes have them
        mean, std = (config.get(name, buffers.get(name)) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            mean, std = [config.get("shift_factor") or 0.0], [1 / (config.get("scaling_factor") or 1.0)]
        self.mean, self.std = (
            torch.as_tensor(v, dtype=torch.float32, device=device).view(1, -1, 1, 1, 1) for v in (mean, std)
        )

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> Tensor:
        """Encode frames (F, H, W, 3) uint8 to normalised latents (1, C, T, h, w) float32, the mode of the posterior."""
        x = torch.from_numpy(frames.astype(np.float32)).permute(3, 0, 1, 2)[None] / 127.5 - 1
        latents = self.model.encode(x.to(self.device)).latent_dist.mode().float()
        return (latents - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Decode normalised latents (1, C, T, h, w) to frames (F, H, W, 3) uint8."""
        latents = latents * self.std + self.mean
        video = decode_latents(self.model, latents)
        return ((video[0].float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def _load(source: str) -> nn.Module:
    """Load a diffusers VAE in float32, from a pipeline or a directory of its own. Raises InputError."""
    import diffusers

    local = only_local(source)
    for subfolder in ("vae", ""):
        if file := find_file(source, f"{subfolder}/config.json".lstrip("/"), local):
            name = json_object(file).get("_class_name")
            kind = getattr(diffusers, name, None) if isinstance(name, str) and name.startswith("Autoencoder") else None
            if kind is None:
                raise InputError(f"vae {source} is a {name}: give a diffusers VAE or a pipeline with one")
            return load_network(kind, source, subfolder, dtype=torch.float32, local_files_only=local)
    raise InputError(f"vae {source} cannot be loaded (no config.json): give a diffusers VAE or a pipeline with one")


class Clips:
    """Encoded videos on disk: latents, and the frames that a decoder should reproduce."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    @classmethod
    def prepare(cls, settings: DecoderSettings, vae: VideoVAE) -> Clips:
        """Encode the videos of `settings.data`; existing cache files are reused. Raises InputError."""
        cache = Path(settings.cache or Path(settings.out) / "cache")
        make_folder(cache)
        size = settings.num_frames, settings.height, settings.width
        weights = hashlib.sha256(f"{size} {settings.target}".encode())
        for name, value in vae.model.state_dict().items():
            weights.update(f"{name} {tuple(value.shape)} {value.double().sum().item()!r}".encode())
        files = []
        for instance in track(find_instances(Path(settings.data)), "encode", "video"):
            video = instance / "ground_truth.mp4"
            path = cache / f"{hashlib.sha256(weights.digest() + video.read_bytes()).hexdigest()[:32]}.safetensors"
            if not whole(path):
                frames = read_sized(video, size)[0]
                latents = vae.encode(frames)
                if settings.target == "vae":
                    frames = vae.decode(latents)
                save_whole(
                    ({"latents": latents[0].cpu().contiguous(), "frames": torch.from_numpy(frames).contiguous()}, {}),
                    path,
                )
            files.append(path)
        return cls(files)

    def split(self, count: int) -> tuple[Clips, Clips]:
        """The clips but the last `count`, and the last `count`. Raises InputError: too few clips."""
        if count >= len(self.files):
            raise InputError(f"{count} of {len(self.files)} instances cannot be held out: leave some to train on")
        return Clips(self.files[:-count]), Clips(self.files[-count:])

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        """A hash of the videos and of the VAE that encoded them, from the names of the files."""
        return hashlib.sha256("".join(sorted(file.name for file in self.files)).encode()).hexdigest()[:16]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One clip: latents (C, T, h, w) float32 and frames (F, H, W, 3) uint8."""
        content = load_file(self.files[index])
        return content["latents"], content["frames"]


def build(settings: DecoderSettings, latents: Tensor, frames: Tensor) -> SurrogateDecoder:
    """An untrained decoder with the strides between `latents` and `frames` of a clip. Raises InputError."""
    channels, t, h, w = latents.shape
    count, height, width = frames.shape[:3]
    space, time = height // h, (count - 1) // (t - 1) if t > 1 else 1
    patch = settings.patch or max(1, space // 8)
    doublings = math.log2(space / patch)
    fits = (height, width, count) == (h * space, w * space, time * (t - 1) + 1) and time in (1, 2, 4, 8)
    if not fits or doublings not in (0, 1, 2, 3):
        raise InputError(
            f"{count} frames of {height}x{width} are {t} latent frames of {h}x{w}: three doublings and patch {patch} do"
            " not invert that; give multiples of the VAE's strides (plus 1 in time) or another patch"
        )
    late = int(math.log2(time))
    return SurrogateDecoder(
        channels,
        settings.widths,
        patch,
        time_upscale=[stage >= 3 - late for stage in range(3)],
        space_upscale=[stage < doublings for stage in range(3)],
    )


class DecoderTraining:
    """The training of a surrogate decoder; `Trainer` calls `step`."""

    def __init__(self, settings: DecoderSettings, clips: Clips, accelerator: Accelerator) -> None:
        self.settings, self.accelerator = settings, accelerator
        self.clips, self.held_out = clips.split(settings.held_out)
        torch.manual_seed(settings.train.seed)
        self.decoder = build(settings, *self.clips[0]).to(accelerator.device)
        self.optimizer = torch.optim.AdamW(
            self.decoder.parameters(), settings.train.learning_rate, weight_decay=settings.train.weight_decay
        )

    def batch(self, clips: Clips, rows: list[int], generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Latents (B, C, T, h, w) and videos (B, 3, F, H, W) in [-1, 1]; random windows of `crop` with a generator."""
        stride, crop = self.decoder.spatial_stride, self.settings.crop
        latents, videos = [], []
        for row in rows:
            z, frames = clips[row]
            h, w = z.shape[2:]
            if generator is not None and 0 < crop < max(h, w):
                sides = min(crop, h), min(crop, w)
                y, x = (
                    int(torch.randint(n - side + 1, (), generator=generator))
                    for n, side in zip((h, w), sides, strict=True)
                )
                z = z[:, :, y : y + sides[0], x : x + sides[1]]
                frames = frames[:, y * stride : (y + sides[0]) * stride, x * stride : (x + sides[1]) * stride]
            latents.append(z)
            videos.append(frames.permute(3, 0, 1, 2).float() / 127.5 - 1)
        device = self.accelerator.device
        return torch.stack(latents).to(device), torch.stack(videos).to(device)

    def loss(self, latents: Tensor, videos: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The reconstruction loss of latents (B, C, T, h, w) against videos (B, 3, F, H, W), and its metrics."""
        low = self.settings.train.dtype == "bfloat16"
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=low):
            frames = self.decoder.decode_batch(latents, clamp=False)
        loss, terms = reconstruction_loss(videos, frames.float().transpose(1, 2) * 2 - 1)
        finite = {name: value for name, value in terms.items() if math.isfinite(value)}  # nothing moves in a still clip
        return loss, {"loss": float(loss.detach()), **finite}

    def step(self, index: int, generator: torch.Generator) -> dict[str, float]:
        """Make one update; returns its metrics. Raises NonFiniteError, without an update."""
        train, values = self.settings.train, dict[str, float]()
        for _ in range(train.gradient_accumulation):
            rows = torch.randint(len(self.clips), (train.batch_size,), generator=generator).tolist()
            loss, terms = self.loss(*self.batch(self.clips, rows, generator))
            self.accelerator.backward(loss / train.gradient_accumulation)
            for name, value in terms.items():
                values[name] = values.get(name, 0.0) + value / train.gradient_accumulation
        for parameter in self.decoder.parameters():
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        norm = nn.utils.clip_grad_norm_(self.decoder.parameters(), train.max_grad_norm).item()
        if not (math.isfinite(norm) and math.isfinite(values["loss"])):
            raise NonFiniteError(f"the decoder's loss or gradient of step {index} is not finite")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return values

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """The mean metrics on the held-out videos."""
        rows = [self.loss(*self.batch(self.held_out, [k], None))[1] for k in range(len(self.held_out))]
        return {name: sum(row.get(name, 0.0) for row in rows) / len(rows) for name in rows[0]}


@plain_torch()
def run(settings: DecoderSettings, resume: bool = False, tracker: Trackers = None) -> Path:
    """Train a surrogate decoder; returns its checkpoint, ``decoder.safetensors`` in `settings.out`.

    tracker: see `trackers.tracking`.

    Raises:
        InputError: a setting, a video or the VAE cannot be used.
        NonFiniteError: the training broke down; the last good state stays.
    """
    from accelerate import Accelerator

    out, accelerator = Path(settings.out), Accelerator()
    with tracking(tracker, out / LOGS), training_folder(out, resume, accelerator):
        clips = Clips.prepare(settings, VideoVAE(settings.vae, accelerator.device))
        training = DecoderTraining(settings, clips, accelerator)
        modules: dict[str, nn.Module] = {AVERAGED: training.decoder}
        trainer = Trainer(
            out,
            modules,
            {AVERAGED: training.optimizer},
            settings.to_dict() | {"videos": clips.fingerprint()},
            accelerator,
        )
        if resume:
            trainer.resume()
        trainer.run(training.step, settings.train.steps, training.validate)
        if accelerator.is_main_process:
            training.decoder.save(out / "decoder.safetensors")
        return out / "decoder.safetensors"
