"""The inputs of one call, checked."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from vlmteacher import arguments
from vlmteacher.errors import InputError
from vlmteacher.lora.adapter import check_rank, frozen_blocks, lora_size
from vlmteacher.lora.formats import LoRA, safetensors_bytes
from vlmteacher.media import ImageInput, fit_image
from vlmteacher.ops import sdpa
from vlmteacher.optimization.engines import check_engine
from vlmteacher.optimization.frames import uniform_indices
from vlmteacher.placement import check_memory
from vlmteacher.prompts import check_prompt
from vlmteacher.queries import MAX_PROCESS, QuerySet
from vlmteacher.reasoners.context_parallel import check_tokens
from vlmteacher.rewards import Rewards
from vlmteacher.settings import Keywords, Settings

if TYPE_CHECKING:
    from vlmteacher.frozen_models import FrozenModels
    from vlmteacher.planning.fit import Fit
    from vlmteacher.reasoners.base import Reasoner
    from vlmteacher.teachers.base import Teacher

SIZE = ("num_frames", "height", "width")
IMAGES = ("image", "last_image", "goal_image")


@dataclass(frozen=True)
class Instance:
    """The inputs of one call, checked.

    Attributes:
        image, last_image: the first frame, and the last one for Reasoners that take it, in the size of the video.
        goal_image: a picture of the goal in that size, for the Teacher; by default the last frame.
        size: number of frames, height and width of the video, by the names of `SIZE`.
        frame_indices: the frames that the Teacher sees, of all windows; uniform until a session has chosen others.
        reasoner: the pipeline's Reasoner with the sampling of this call.
        teacher: the pipeline's Teacher with `goal_image`.
        queries: None where the Teacher writes them.
        generator: draws the noise.
        lora: the LoRA that the optimisation starts from; None for a fresh one.
        rewards: beside the Teacher, or None.
        fit: what the steps keep, where `settings.memory` limits them.
    """

    prompt: str
    image: Image.Image | None
    last_image: Image.Image | None
    goal_image: Image.Image | None
    size: dict[str, int]
    frame_indices: list[int]
    reasoner: Reasoner
    teacher: Teacher
    settings: Settings
    queries: QuerySet | None
    generator: torch.Generator
    lora: LoRA | None
    rewards: Rewards | None
    fit: Fit | None = None

    @property
    def seed(self) -> int:
        return self.generator.initial_seed()

    def hashes(self) -> dict[str, str]:
        """A hash of each input, by its name: equal on all ranks of a call."""
        queries = self.queries.to_dict() if self.queries else None
        inputs = {"prompt": self.prompt, "queries": queries, **self.config()}
        return {name: _hash(json.dumps(value, sort_keys=True).encode()) for name, value in inputs.items()}

    def config(self) -> dict[str, Any]:
        """The entry `config` of run.json, of the generator as it is now."""
        return {
            **self.settings.to_dict(),
            **self.size,
            "sampling": self.reasoner.settings.sampling,
            "seed": self.seed,
            "generator": _digest(self.generator.get_state().numpy()),  # a used one has the same seed
            **{name: None if (image := getattr(self, name)) is None else _digest(np.asarray(image)) for name in IMAGES},
            "dtype": str(self.reasoner.dtype).removeprefix("torch."),
            "lora": self.lora and lora_fingerprint(self.lora),
            **({"lora_scale": self.lora.scale_source} if self.lora else {}),
            **({"rewards": self.rewards.to_dict()} if self.rewards else {}),
        }


def check_inputs(
    models: FrozenModels,
    prompt: object,
    images: tuple[ImageInput | None, ...],
    size: tuple[object, ...],
    sampling: tuple[object, ...],
    generator: object,
    queries: object,
    rewards: object,
    keywords: Keywords,
    record: Mapping[str, Any] | None,
) -> Instance:
    """The inputs of a call, or InputError for the first that cannot be used.

    images: as of `IMAGES`; the goal is the last frame where none is given and the Teacher takes one. size: num_frames,
    height, width. sampling: num_inference_steps, guidance_scale, negative_prompt. None is the Reasoner's own in the
    last two. record: run.json of the run to resume, which has what the call leaves out.
    """
    prompt = arguments.text("prompt", arguments.single("prompt", prompt))
    source, asked, values = _generator(generator), QuerySet.of(queries), dict(keywords)
    reasoner = _with_sampling(models.reasoner, *sampling)
    if record:
        asked = asked or QuerySet.from_dict(record["queries"])
        _default(values, "max_steps", record["config"].get("max_steps"))
    if not reasoner.draws_later:  # a pair's default is for its own sampler: by another, all samples may be the same
        _default(values, "final_samples", 1)
    settings = _settings(models.defaults, values, models.lora)
    own = Rewards.of(rewards, settings.teacher_weight)
    check_engine(settings.engine, reasoner, models.teacher)
    sdpa.order(settings.attention, reasoner.device)
    reasoner.check_target(settings.target)
    reasoner.check_samples(settings.final_samples)
    frozen_blocks(reasoner.transformer, settings.lora_blocks)
    if models.lora is None:
        check_rank(reasoner.transformer, settings.rank, settings.lora_blocks)
    shape = {
        name: getattr(reasoner, name) if value is None else arguments.whole(name, value)
        for name, value in zip(SIZE, size, strict=True)
    }
    check_prompt(prompt)
    reasoner.check(**shape)
    check_size(reasoner, settings, **shape)
    check_tokens(reasoner, reasoner.ranks, shape)
    if settings.warm_start is not None and reasoner.ranks.size > 1:
        raise InputError("warm_start works in one process, not with --context-parallel: leave it out")
    if settings.memory is not None and reasoner.ranks.size > 1:  # ranks with other levels would wait for each other
        raise InputError(f"memory {settings.memory} plans for one GPU: with --context-parallel give --activations")
    frame_indices = uniform_indices(shape["num_frames"], settings)
    first, last, goal = (
        None if given is None else fit_image(given, shape["height"], shape["width"], name, settings.fit)
        for name, given in zip(IMAGES, images, strict=True)
    )
    reasoner.check_last_image(last)
    if goal is None and models.teacher.takes_goal_image:
        goal = last
    teacher = models.teacher.with_goal(goal)
    if source is None:
        source = torch.Generator()
        source.manual_seed(record["config"]["seed"] if record else source.seed())
    fit = None if settings.memory is None else _fit(models, reasoner, teacher, settings, shape, frame_indices, asked)
    inputs = prompt, first, last, goal, shape, frame_indices
    return Instance(*inputs, reasoner, teacher, settings, asked, source, models.lora, own, fit)


def _fit(
    models: FrozenModels,
    reasoner: Reasoner,
    teacher: Teacher,
    settings: Settings,
    shape: dict[str, int],
    frame_indices: list[int],
    queries: QuerySet | None,
) -> Fit:
    from vlmteacher.planning.fit import fit_memory

    questions = settings.preserve + (len(queries.questions) if queries else 1 + MAX_PROCESS)
    size = shape["num_frames"], shape["height"], shape["width"]
    parts = reasoner, models.decoder, teacher
    return fit_memory(*parts, size, frame_indices, questions, settings, models.offload)


def _default(values: dict[str, Any], name: str, default: object) -> None:
    if values.get(name) is None:
        values[name] = default


def _with_sampling(reasoner: Reasoner, steps: object, guidance_scale: object, negative_prompt: object) -> Reasoner:
    if negative_prompt is not None:
        negative_prompt = arguments.text("negative_prompt", arguments.single("negative_prompt", negative_prompt))
    if guidance_scale is not None:
        guidance_scale = arguments.number("guidance_scale", guidance_scale)
    if steps is not None:
        steps = arguments.whole("num_inference_steps", steps)
    return reasoner.with_sampling(steps, guidance_scale=guidance_scale, negative_prompt=negative_prompt)


def _settings(defaults: Settings, values: dict[str, Any], lora: LoRA | None) -> Settings:
    """`defaults` with these values. Raises InputError where they do not go with the LoRA that the call starts from."""
    if lora is None:
        return defaults.updated(**values)
    if values.get("rank") not in (None, lora.rank):
        raise InputError(f"{lora.source} is of rank {lora.rank}: it cannot go on with rank {values['rank']}")
    settings = defaults.updated(**{**values, "rank": lora.rank})
    if settings.warm_start is not None:
        raise InputError(f"the call starts from {lora.source}: leave out warm_start, or the LoRA")
    if settings.lora_blocks is not None:
        raise InputError(f"{lora.source} has its own layers: it cannot go on with lora_blocks")
    return settings


def _generator(generator: object) -> torch.Generator | None:
    """A generator, or the only one of a list. Raises InputError."""
    generator = arguments.single("generator", generator)
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    raise InputError(
        f"generator must be a torch.Generator, not {arguments.show(generator)}: torch.Generator().manual_seed(0) is one"
    )


def check_size(reasoner: Reasoner, settings: Settings, num_frames: int, height: int, width: int) -> None:
    """Raise InputError where noise and pixels alone, or the LoRA alone, are larger than the Reasoner's device."""
    if settings.frame_jitter >= min(height, width):
        raise InputError(f"frame_jitter {settings.frame_jitter} shifts frames of {width}x{height} out of themselves")
    latents = math.prod(reasoner.noise_shape(num_frames, height, width))
    later = len(reasoner.settings.timesteps) - 1 if reasoner.settings.sampler == "renoise" else 0
    pixels = 3 * num_frames * height * width
    numbers = latents * (2 + later * settings.final_samples) + pixels * (1 + settings.final_samples)
    samples = f" and {settings.final_samples} final_samples" if settings.final_samples > 1 else ""
    video = f"a video of {num_frames} frames of {width}x{height} with {later + 1} draws of noise{samples}"
    check_memory(reasoner.device, 4 * numbers, video, "give fewer or smaller frames, steps or final_samples")
    weights = lora_size(reasoner.transformer, settings.rank, settings.lora_blocks)
    check_memory(reasoner.device, 16 * weights, f"a LoRA of rank {settings.rank} in training", "give a lower rank")


def lora_fingerprint(lora: LoRA) -> str:
    """A hash of a LoRA's tensors."""
    data = replace(lora, differences={}).to_bytes("diffusers")
    differences = safetensors_bytes(lora.differences) if lora.differences else b""
    return _hash(data + differences)


def _digest(values: np.ndarray) -> str:
    return _hash(np.ascontiguousarray(values).tobytes())


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
