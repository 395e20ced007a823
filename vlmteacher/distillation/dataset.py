"""Training instances in VBVR's layout (``first_frame.png``, ``prompt.txt``, ``ground_truth.mp4``), encoded once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.files import make_folder, read_text, replacing
from vlmteacher.media import check_aspect, check_first_frame, read_clip, read_image, resize_clip
from vlmteacher.progress import track
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.condition import Condition, collate

FILES = ("first_frame.png", "prompt.txt", "ground_truth.mp4")
Size = tuple[int, int, int]  # frames, height, width


class LatentDataset:
    """Encoded instances on disk, read batch by batch; `prepare` encodes them.

    Attributes:
        empty_prompt: (1, L, D) embeddings of the empty prompt.
    """

    def __init__(self, files: Sequence[Path], size: Size, empty_prompt: Tensor, device: torch.device) -> None:
        self.files, self.size, self.empty_prompt, self.device = files, size, empty_prompt, device

    @classmethod
    def prepare(
        cls, folder: Path, cache: Path, reasoner: Reasoner, num_frames: int, height: int, width: int
    ) -> LatentDataset:
        """Encode every instance in `folder`, at any depth, into `cache`; existing cache files are reused.

        A cache file is named by a digest of the instance's files, the size and the encoders' weights, so that none is
        ever stale. The first `num_frames` frames of a video are used, at the Reasoner's frame rate, and resized to
        `width` x `height` pixels.

        Raises:
            InputError: there is no instance; an instance, which is named, lacks a file, cannot be read, is too short
                or of too low a frame rate, has another aspect ratio than the Reasoner's videos, another size than the
                other instances, or a first frame that is not its video's; the Reasoner's family cannot be trained.
        """
        reasoner.check_trainable()
        reasoner.check(num_frames, height, width)
        size = (num_frames, height, width)
        instances = find_instances(folder)
        make_folder(cache)
        encoders, files = _fingerprint(reasoner), []
        sizes: dict[str, Path] = {}
        for instance in track(instances, "encode", "video"):
            digest = hashlib.sha256(f"{encoders} {size} {reasoner.fps}".encode())
            for name in FILES:
                digest.update(hashlib.sha256((instance / name).read_bytes()).digest())
            path = cache / f"{digest.hexdigest()[:32]}.safetensors"
            if not whole(path) or _own_size(path) is None:
                save_whole(_encode(instance, reasoner, size), path)
            sizes.setdefault(str(_own_size(path)), instance)
            if len(sizes) > 1:
                (a, first), (b, second) = sizes.items()
                raise InputError(f"videos of mixed sizes: {a} in {first}, {b} in {second}: give videos of one size")
            files.append(path)
        return cls(files, size, reasoner.encode_prompt(""), reasoner.device)

    def split(self, count: int) -> tuple[LatentDataset, LatentDataset]:
        """The other instances and `count` of them, spread evenly. Raises InputError: too few instances."""
        if not 0 < count < len(self):
            raise InputError(f"{count} of {len(self)} instances cannot be held out: leave some to train on")
        held = {k * len(self) // count for k in range(count)}
        parts = ([f for i, f in enumerate(self.files) if (i in held) == taken] for taken in (False, True))
        rest, held_out = (LatentDataset(files, self.size, self.empty_prompt, self.device) for files in parts)
        return rest, held_out

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        """A hash of the videos, the prompts and the networks that encoded them, from the names of the files."""
        return hashlib.sha256("".join(sorted(file.name for file in self.files)).encode()).hexdigest()[:16]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One instance: latents (C, T, h, w), prompt_embeds (L, D) and, for image models, first_frame (C, 1, h, w)."""
        return load_file(self.files[index])

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Condition]:
        """Latents (B, C, T, h, w) float32 and the condition of some instances, on the Reasoner's device."""
        rows = [{name: value[None].to(self.device) for name, value in self[index].items()} for index in indices]
        conditions = [Condition(row["prompt_embeds"], row.get("first_frame"), *self.size) for row in rows]
        return torch.cat([row["latents"] for row in rows]), collate(conditions)


def find_instances(folder: Path) -> list[Path]:
    """The directories in `folder`, at any depth, with the three files, sorted. Raises InputError (see `prepare`)."""
    if not folder.is_dir():
        raise InputError(f"data folder {folder} does not exist")
    instances = sorted({path.parent for name in FILES for path in folder.rglob(name)})
    for instance in instances:
        lacking = [name for name in FILES if not (instance / name).is_file()]
        if lacking:
            raise InputError(f"instance {instance} lacks {', '.join(lacking)}: add it or remove the instance")
    if not instances:
        raise InputError(f"data folder {folder} holds no instance: an instance is a directory with {', '.join(FILES)}")
    return instances


def read_sized(path: Path, size: Size, fps: float | None = None) -> tuple[np.ndarray, str]:
    """The first frames of a video (F, H, W, 3) uint8, in a size and frame rate, and its own size. Raises InputError."""
    num_frames, height, width = size
    video = read_clip(path, num_frames, fps)
    own_height, own_width = video.shape[1:3]
    check_aspect(own_width, own_height, height, width, f"video {path}")
    return resize_clip(video, height, width), f"{own_width}x{own_height}"


def _own_size(path: Path) -> str | None:
    """The size of an encoded video itself; None in a file that was not written here."""
    with safe_open(path, "pt") as content:
        return (content.metadata() or {}).get("size")


def _encode(instance: Path, reasoner: Reasoner, size: Size) -> tuple[dict[str, Tensor], dict[str, str]]:
    video, own = read_sized(instance / "ground_truth.mp4", size, reasoner.fps)
    prompt, image = read_text(instance / "prompt.txt", "prompt"), None
    if reasoner.image_conditioning:
        path = instance / "first_frame.png"
        image = read_image(path)
        check_first_frame(image, video[0], f"image {path}")
    try:
        condition = reasoner.encode(prompt, image, *size)
    except InputError as error:
        raise InputError(f"instance {instance}: {error}") from error
    tensors = {"latents": reasoner.encode_video(video)[0], "prompt_embeds": condition.prompt_embeds[0]}
    if condition.first_frame is not None:
        tensors["first_frame"] = condition.first_frame[0]
    return {name: value.cpu().contiguous() for name, value in tensors.items()}, {"size": own}


def save_whole(content: tuple[dict[str, Tensor], dict[str, str]], path: Path) -> None:
    """Write tensors and metadata to a safetensors file atomically. Raises OutputError."""
    with replacing(path) as temporary:  # several processes may encode at the same time
        save_file(content[0], temporary, metadata=content[1])


def whole(path: Path) -> bool:
    """Whether a file is a complete safetensors file."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _fingerprint(reasoner: Reasoner) -> str:
    """A hash of the weights that the encoding depends on: those of the VAE and the text encoder."""
    digest = hashlib.sha256(json.dumps(reasoner.settings.max_sequence_length).encode())
    for part in (reasoner.vae, reasoner.text_encoder):
        for name, value in part.state_dict().items():
            digest.update(f"{name} {tuple(value.shape)} {value.double().sum().item()!r}".encode())
    return digest.hexdigest()
