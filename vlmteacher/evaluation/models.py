"""The models of a benchmark: those of a pair, or any that `vlmteacher solve` takes, in a size and on a device."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

from vlmteacher.errors import InputError
from vlmteacher.instance import lora_fingerprint
from vlmteacher.lora.formats import LoRA, read_lora
from vlmteacher.media import fit_image
from vlmteacher.placement import find_devices, find_dtype, parse_device_map, parse_dtype
from vlmteacher.reasoners.sampling import even_timesteps
from vlmteacher.settings import Keywords, Settings

if TYPE_CHECKING:
    import torch

    from vlmteacher.pipeline import TeacherPipeline
    from vlmteacher.reasoners.base import Reasoner

MANY_STEPS = 30  # of a Reasoner before its few-step distillation
SIZE = ("num_frames", "height", "width")
LORAS = ("lora", "post_lora", "grpo_lora")
SAMPLING = ("num_inference_steps", "guidance_scale", "negative_prompt")
PLACES = ("device", "device_map", "offload", "activations")  # where and how the results are computed


@dataclass(frozen=True, kw_only=True)
class Models:
    """Models instead of a pair's, by the names of `vlmteacher solve`'s flags; None is the pair's or the Reasoner's own.

    Attributes:
        reasoner, teacher, decoder, transformer, few_step_lora, preset, quantize, lora_partial: see
            `TeacherPipeline.from_pretrained`.
        device, device_map, dtype, offload: the same; the default is the CPU in float32 where Reasoner and Teacher are a
            pair's, so that the results are the same on any machine.
        activations: what the blocks keep for the backward, in the words of ``vlmteacher plan``.
        num_frames, height, width, num_inference_steps, guidance_scale, negative_prompt: of every video.
        settings: names and values of `Settings`, instead of the pair's defaults.
        lora, post_lora, grpo_lora: file of a LoRA that the method `base`, `post` or `flow-grpo` runs with.
    """

    reasoner: str | None = None
    teacher: str | None = None
    decoder: str | None = None
    transformer: tuple[str, ...] | None = None
    few_step_lora: tuple[str, ...] | None = None
    preset: str | None = None
    quantize: str | None = None
    lora_partial: bool = False
    device: str | None = None
    device_map: str | None = None
    dtype: str | None = None
    offload: bool = False
    activations: str | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    lora: str | None = None
    post_lora: str | None = None
    grpo_lora: str | None = None

    def __post_init__(self) -> None:
        Settings().updated(**self.keywords)
        for name in SIZE:
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        if self.device and self.device_map:
            raise InputError(f"--device {self.device} and --device-map {self.device_map} exclude each other")

    @property
    def keywords(self) -> Keywords:
        """The settings as keywords of a call."""
        return cast(Keywords, dict(self.settings))

    def described(self) -> dict[str, Any]:
        """Return what the results depend on, as plain data for JSON: without the `PLACES`; LoRAs by their content.

        Raises InputError for a LoRA's file that cannot be read.
        """
        values = {name: value for name, value in asdict(self).items() if name not in (*PLACES, "settings")}
        values |= {name: lora_fingerprint(read_lora(values[name])) for name in LORAS if values[name] is not None}
        if self.reasoner or self.teacher:
            values["dtype"] = str(self.place()[1]).removeprefix("torch.")
        given = {name: value for name, value in values.items() if value not in (None, False)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()} | dict(
            self.settings
        )

    def place(self) -> tuple[dict[str, torch.device], torch.dtype]:
        """Return the devices of Reasoner and Teacher, and the dtype. Raises InputError for a device of no use."""
        where: Any = parse_device_map(self.device_map) if self.device_map else self.device
        if where is None and not (self.reasoner or self.teacher):
            where = "cpu"
        devices = find_devices(where, "--device", "--device-map")
        if self.offload and all(device.type == "cpu" for device in devices.values()):
            raise InputError("--offload keeps in main memory what a GPU does not need: give --device or --device-map")
        return devices, parse_dtype(self.dtype) if self.dtype else find_dtype(devices)


def use_lora(pipe: TeacherPipeline, file: str | None, partial: bool) -> None:
    """Start the pipeline's calls from the LoRA in a file, which is read once; None: from none. Raises InputError."""
    pipe.lora = None if file is None else _read(pipe, file, partial)


@lru_cache(maxsize=4)
def _read(pipe: TeacherPipeline, file: str, partial: bool) -> LoRA | None:
    pipe.load_lora(file, partial)
    return pipe.lora


_LOADED: dict[tuple[Models, str | None, str | None], TeacherPipeline] = {}
"""The models that `load` has loaded last."""


def load(models: Models, pair: str | None, many_step: str | None = None) -> TeacherPipeline:
    """Load models, or return those of the last call if they are the same.

    Others are let go first: a device need not hold the models of two methods.

    pair: directory of the pair for what `models` leaves out; None: the packaged one. many_step: the Reasoner before its
    few-step distillation, which takes the place of `models.reasoner`; the directory of its transformer alone is put
    into the Reasoner and sampled in `MANY_STEPS` even steps.
    """
    key = models, pair, many_step
    if key not in _LOADED:
        _LOADED.clear()
        _read.cache_clear()
        gc.collect()
        _LOADED[key] = _load(*key)
    return _LOADED[key]


def _load(models: Models, pair: str | None, many_step: str | None) -> TeacherPipeline:
    from vlmteacher.pipeline import TeacherPipeline, read_pair
    from vlmteacher.quiet import quiet

    quiet()
    devices, dtype = models.place()
    reasoner, transformer, few_step_lora = models.reasoner, models.transformer, models.few_step_lora
    alone = many_step is not None and (Path(many_step) / "config.json").exists()
    if many_step is not None:
        few_step_lora, transformer = None, (many_step,) if alone else None
        reasoner = reasoner if alone else many_step
    pipe = TeacherPipeline.from_pretrained(
        reasoner,
        models.teacher,
        models.decoder,
        pair=pair,
        dtype=dtype,
        device_map=devices,
        offload=models.offload,
        quantize=cast(Any, models.quantize),
        transformer=transformer,
        few_step_lora=few_step_lora,
        preset=models.preset,
        lora_partial=models.lora_partial,
    )
    if alone:
        pipe.reasoner.settings = replace(
            pipe.reasoner.settings, timesteps=even_timesteps(MANY_STEPS), shift=1.0, sampler="euler"
        )
    if models.reasoner is None:  # another Reasoner's folder has none
        pipe.defaults = Settings(**read_pair(pair)[1].get("defaults", {}))
    pipe.defaults = pipe.defaults.updated(**models.keywords)
    _resize(pipe.reasoner, models)
    if models.activations is not None:
        from vlmteacher.reasoners.checkpointing import block_list, keep_activations, parse_levels

        transformer_ = pipe.reasoner.transformer
        keep_activations(transformer_, parse_levels(models.activations, len(block_list(transformer_))))
    return pipe


def _resize(reasoner: Reasoner, models: Models) -> None:
    """Set size and sampling of every video. Raises InputError where the Reasoner cannot do it."""
    if any(getattr(models, name) is not None for name in SAMPLING):
        steps, scale, negative = (getattr(models, name) for name in SAMPLING)
        reasoner.settings = reasoner.with_sampling(steps, guidance_scale=scale, negative_prompt=negative).settings
    if size := {name: value for name in SIZE if (value := getattr(models, name)) is not None}:
        reasoner.check(**{name: getattr(reasoner, name) for name in SIZE} | size)
        reasoner.settings = replace(reasoner.settings, **size)


@contextmanager
def sized(reasoner: Reasoner, height: int, width: int) -> Iterator[None]:
    """Make videos of this size inside the block."""
    settings = reasoner.settings
    reasoner.settings = replace(settings, height=height, width=width)
    try:
        yield
    finally:
        reasoner.settings = settings


def cover(image: Image.Image | None, reasoner: Reasoner) -> tuple[Image.Image | None, tuple[int, int]]:
    """Return a first frame in the size of its video, and that size (H, W): about as many pixels as the Reasoner's own.

    The size has the image's proportions but for rounding to one that the Reasoner can make; what then stands out is
    cropped on both sides. Without an image the size is the Reasoner's own.
    """
    if image is None:
        return None, (reasoner.height, reasoner.width)
    scale = math.sqrt(reasoner.height * reasoner.width / (image.height * image.width))
    multiples = (reasoner.spatial_stride * side for side in reasoner.patch)
    height, width = (
        max(1, round(side * scale / multiple)) * multiple
        for side, multiple in zip((image.height, image.width), multiples, strict=True)
    )
    return fit_image(image, height, width, fit="crop"), (height, width)
