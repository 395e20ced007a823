"""Rewards of one's own beside the Teacher, or instead of it, and two that are ready: CLIP similarity and smoothness.

A reward is any callable `(frames, context) -> loss`: frames (K, 3, H, W), RGB in [0, 1], on the Reasoner's device;
`context` a `RewardContext`; the loss one number, differentiable in the frames, the lower the better.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmteacher import arguments
from vlmteacher.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from vlmteacher.queries import QuerySet

CLIP = "openai/clip-vit-base-patch32"


@dataclass(frozen=True)
class RewardContext:
    """What a reward may know of the instance beside the frames.

    image: the first frame that was given, in the video's size, or None. frame_indices: the places of the frames in the
    video, which runs at `fps` frames a second.
    """

    prompt: str
    image: Image.Image | None
    frame_indices: list[int]
    fps: float
    queries: QuerySet


Reward = Callable[[Tensor, RewardContext], Tensor]


@dataclass(frozen=True)
class Rewards:
    """Rewards with their weights, and the weight of the Teacher's loss in the sum that is minimised."""

    functions: tuple[Reward, ...]
    weights: tuple[float, ...]
    names: tuple[str, ...]
    teacher_weight: float = 1.0
    context: RewardContext | None = None

    @classmethod
    def of(cls, given: object, teacher_weight: float) -> Rewards | None:
        """The rewards of a list of (function, weight), with the names of the functions; None for no rewards.

        Raises InputError for another form, a weight that is no finite number, and no reward where the Teacher counts
        nothing.
        """
        pairs: list[Any] = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
        for pair in pairs:
            if not (isinstance(pair, list | tuple) and len(pair) == 2 and callable(pair[0])):
                raise InputError(f"rewards must be a list of (function, weight), not {arguments.show(given)}")
            if not math.isfinite(arguments.number("the weight of a reward", pair[1])):
                raise InputError(f"the weight of a reward must be finite, not {pair[1]}")
        if not pairs:
            if not teacher_weight:
                raise InputError("teacher_weight 0 leaves nothing to optimise: give rewards, or a weight above 0")
            return None
        names: list[str] = []
        for function, _ in pairs:
            name = getattr(function, "name", None) or getattr(function, "__name__", None) or type(function).__name__
            names.append(name if name not in names else f"{name}_{len(names) + 1}")
        functions, weights = tuple(pair[0] for pair in pairs), tuple(float(pair[1]) for pair in pairs)
        return cls(functions, weights, tuple(names), teacher_weight)

    def within(self, context: RewardContext) -> Rewards:
        """The same rewards for one instance."""
        return replace(self, context=context)

    def losses(self, frames: Tensor) -> Tensor:
        """The losses (R,) of frames (K, 3, H, W), float32, there. Raises InputError for one that is no number."""
        assert self.context is not None
        losses = []
        for function, name in zip(self.functions, self.names, strict=True):
            loss = function(frames, self.context)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
                what = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else arguments.show(loss)
                raise InputError(f"reward {name} returned {what}: it must return one number, a float tensor ()")
            losses.append(loss.reshape(()).to(frames.device, torch.float32))
        return torch.stack(losses)

    def total(self, teacher: Tensor, losses: Tensor) -> Tensor:
        """The objective: the Teacher's loss () and the rewards' (R,), each times its weight."""
        weights = torch.tensor(self.weights, device=losses.device)
        return self.teacher_weight * teacher + (weights * losses).sum().to(teacher)

    def check(self, frames: Tensor) -> None:
        """Try all rewards on frames (K, 3, H, W). Raises InputError: no gradient, or numbers that are not finite."""
        for index, name in enumerate(self.names):
            one = replace(self, functions=(self.functions[index],), names=(name,))
            with torch.enable_grad():
                leaf = frames.detach().clone().requires_grad_()
                (loss,) = one.losses(leaf)
                gradient = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
            if gradient is None:
                raise InputError(f"reward {name} has no gradient in the frames: compute it by operations of torch")
            if not (loss.isfinite() and gradient.isfinite().all()):
                raise InputError(f"reward {name} or its gradient is not finite on the first video ({loss.item():g})")

    def to_dict(self) -> dict[str, float]:
        """The weights by name, for run.json."""
        return dict(zip(self.names, self.weights, strict=True))

    def named(self, losses: Sequence[float] | Tensor) -> dict[str, float]:
        """Losses (R,) by name."""
        values = losses.tolist() if isinstance(losses, Tensor) else losses
        return dict(zip(self.names, values, strict=True))


# ---------------------------------------------------------------- rewards that are ready


def parse_reward(text: str) -> tuple[Reward, float]:
    """The reward and weight of NAME=WEIGHT: temporal_smoothness, clip_similarity[@MODEL]. Raises InputError."""
    name, equals, weight = text.rpartition("=")
    name, _, model = name.partition("@")
    try:
        number = float(weight)
    except ValueError:
        equals = ""
    if (
        not equals
        or name not in ("temporal_smoothness", ClipSimilarity.name)
        or (model and name != ClipSimilarity.name)
    ):
        raise InputError(
            f"--reward {text!r} is not of the form temporal_smoothness=WEIGHT or {ClipSimilarity.name}[@MODEL]=WEIGHT"
        )
    return (
        ClipSimilarity.from_pretrained(model or CLIP) if name == ClipSimilarity.name else temporal_smoothness
    ), number


def temporal_smoothness(frames: Tensor, context: RewardContext) -> Tensor:
    """The mean squared second difference of neighbouring frames: 0 for a still video and for an even change of pixels.

    Fewer than three frames have none.
    """
    return frames.diff(n=2, dim=0).square().mean() if len(frames) > 2 else 0 * frames.sum()


class ClipSimilarity:
    """One minus the mean cosine similarity of frames and prompt by a frozen CLIP-class model of transformers.

    Frames are resized to the model's square (bicubic, antialiased), so their aspect ratio is lost.

    Args:
        model: `CLIPModel`, `SiglipModel` or another with `get_image_features` and `get_text_features`.
        tokenizer: its tokenizer. mean, std: of its image processor, for RGB in [0, 1].
    """

    name = "clip_similarity"

    def __init__(self, model: Any, tokenizer: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
        self.side = model.config.vision_config.image_size
        self._text: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str] = CLIP, dtype: torch.dtype = torch.float32) -> ClipSimilarity:
        """Load a CLIP or SigLIP checkpoint: a local directory or a hub id. Raises InputError."""
        import transformers

        from vlmteacher.checkpoints.hub import only_local
        from vlmteacher.checkpoints.pretrained import load_network, load_processor, load_tokenizer, read_config

        name = arguments.path("the CLIP model", name)
        local = only_local(name)
        _, config = read_config(name, "", "config.json", local)
        kinds = {"clip": ("CLIPModel", "CLIPImageProcessor"), "siglip": ("SiglipModel", "SiglipImageProcessor")}
        if config.get("model_type") not in kinds:
            raise InputError(f"{name} is a {config.get('model_type')!r}: a reward takes {' or '.join(kinds)}")
        network, processor = (getattr(transformers, each) for each in kinds[config["model_type"]])
        images = load_processor(processor, name, local_files_only=local)
        model = load_network(network, name, dtype=dtype, local_files_only=local)
        return cls(model, load_tokenizer(name, local_files_only=local), images.image_mean, images.image_std)

    def __call__(self, frames: Tensor, context: RewardContext) -> Tensor:
        if self.model.device != frames.device:
            self.model.to(frames.device)
            self._text.clear()
        if context.prompt not in self._text:
            limit = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer(
                context.prompt, padding="max_length", truncation=True, max_length=limit, return_tensors="pt"
            )
            given = {key: tokens[key].to(frames.device) for key in ("input_ids", "attention_mask") if key in tokens}
            with torch.no_grad():
                self._text[context.prompt] = _features(self.model.get_text_features(**given))
        size = (self.side, self.side)
        pixels = torch.nn.functional.interpolate(frames, size, mode="bicubic", antialias=True)
        pixels = (pixels - self.mean.to(frames)) / self.std.to(frames)
        images = _features(self.model.get_image_features(pixel_values=pixels.to(self.model.dtype)))
        return 1 - torch.cosine_similarity(images.float(), self._text[context.prompt].float()).mean()


def _features(output: Any) -> Tensor:
    """The pooled features (N, D), whichever form transformers gives them in."""
    return output if isinstance(output, Tensor) else output.pooler_output
