"""TeacherPipeline: a frozen vision-language model teaches a video generation model one instance, at test time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch

from vlmteacher import arguments
from vlmteacher.call_forms import any_form
from vlmteacher.errors import InputError
from vlmteacher.files import read_json
from vlmteacher.frozen_models import FrozenModels, alone
from vlmteacher.instance import lora_fingerprint
from vlmteacher.lora.float8 import is_float8
from vlmteacher.lora.formats import LoRA, merge_lora, read_lora
from vlmteacher.media import ImageInput
from vlmteacher.output import Frames as Frames
from vlmteacher.output import TeacherPipelineOutput as TeacherPipelineOutput
from vlmteacher.placement import DeviceMap, find_devices, find_dtype, parse_dtype
from vlmteacher.progress import reporting
from vlmteacher.queries import QuerySet
from vlmteacher.reasoners.few_step_lora import noise_in_name
from vlmteacher.reasoners.quantization import (
    QuantizationConfig,
    check_precision,
    is_reduced,
    kept_methods,
    reduce_precision,
)
from vlmteacher.rewards import Reward
from vlmteacher.runs.folder import in_its_folder
from vlmteacher.session import open_session
from vlmteacher.settings import Keywords, Settings
from vlmteacher.torch_modes import plain_torch
from vlmteacher.trackers import Trackers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedModel, ProcessorMixin

    from vlmteacher.decoders.taehv import SurrogateDecoder
    from vlmteacher.teachers.quantization import Quantize

PACKAGED_PAIR = Path(__file__).parent / "microworld" / "models"


class TeacherPipeline(FrozenModels):
    """A Reasoner (video generation model), a Teacher (vision-language model) and a surrogate decoder between them.

    All three stay frozen: a call trains a LoRA for its one instance and takes it off again. Calls work the same inside
    `no_grad`, `inference_mode` and autocast. A pipeline makes one call at a time: a second one, from another thread or
    from a callback, raises InputError.
    """

    @classmethod
    @plain_torch()
    def from_pretrained(
        cls,
        reasoner: str | os.PathLike[str] | None = None,
        teacher: str | os.PathLike[str] | None = None,
        decoder: str | os.PathLike[str] | None = None,
        *,
        pair: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        vae_dtype: torch.dtype | str | None = None,
        device_map: str | torch.device | DeviceMap | None = None,
        offload: bool = False,
        quantize: Quantize | None = None,
        transformer: str | Sequence[str] | None = None,
        few_step_lora: str | Sequence[str] | None = None,
        preset: str | None = None,
        lora_partial: bool = False,
        fp8: bool = False,
        quantization_config: QuantizationConfig | None = None,
    ) -> TeacherPipeline:
        """Load the models: hub ids or local directories for `reasoner` and `teacher`, a file or hub name for `decoder`.

        Those left out come from `pair`, a directory with a pair.json, by default the packaged tiny pair; its default
        settings hold where the Reasoner is the pair's. A Reasoner whose latents do not fit the pair's decoder gets the
        decoder of its family, from the hub (`known_decoder`).
        device_map: one device, or {"reasoner": "cuda:0", "teacher": "cuda:1"} (see `to`); None is the GPU where there
        is one. dtype: torch's or its name; None is bfloat16 on GPUs, float32 elsewhere; torch_dtype: diffusers' other
        name for it. vae_dtype: of the VAE; None is float32, as diffusers' examples have it. offload: see `need`.
        quantize: keep the Teacher's language model in "8bit" or "4bit" (the extra `quantized`); it stays on its device.
        transformer, few_step_lora, preset, lora_partial: see `load_reasoner`.
        fp8: the frozen weights of the Reasoner's blocks in 8-bit floating point (see `lora.float8`), with its errors.
        quantization_config: of the Reasoner (extra `quantized`): one of `QUANTIZATIONS` or diffusers', or a dictionary.
        Raises InputError for an unknown model, models that do not fit together, an unusable device; MissingExtra.
        """
        from vlmteacher.decoders.agreement import check_agreement
        from vlmteacher.decoders.find import known_decoder
        from vlmteacher.decoders.taehv import fits_decoder, load_decoder
        from vlmteacher.reasoners.loading import load_reasoner
        from vlmteacher.teachers import load_teacher

        arguments.flag("offload", offload)
        arguments.flag("fp8", fp8)
        for name, value in (("quantize", quantize), ("preset", preset)):
            if value is not None:
                arguments.text(name, value)
        if transformer is not None:
            transformer = arguments.paths("transformer", transformer)
        if few_step_lora is not None:
            few_step_lora = arguments.paths("few_step_lora", few_step_lora)
        devices = find_devices(device_map)
        chosen = one_dtype(dtype, torch_dtype) or find_dtype(devices)
        check_precision(fp8, quantization_config, devices["reasoner"], chosen)
        paths, models, defaults = find_parts({"reasoner": reasoner, "teacher": teacher, "decoder": decoder}, pair)
        for name, files in (("transformer", transformer), ("few_step_lora", few_step_lora)):
            for file in [files] if isinstance(files, str) else files or ():
                path = os.path.abspath(file) if os.path.exists(file) else file
                models[name] = f"{models[name]}, {path}" if name in models else path
        with reporting(f"loading the Reasoner {models['reasoner']}"):
            the_reasoner = load_reasoner(
                paths["reasoner"],
                dtype=chosen,
                transformer=transformer,
                few_step_lora=few_step_lora,
                preset=preset,
                lora_partial=lora_partial,
                keep_quantized=kept_methods(quantization_config),
            )
        reduced = reduce_precision(the_reasoner.networks, fp8, quantization_config, devices["reasoner"])
        models |= {**the_reasoner.notes, **reduced}
        if reasoner is not None and decoder is None and not fits_decoder(paths["decoder"], the_reasoner):
            models["decoder"] = paths["decoder"] = known_decoder(the_reasoner)
        if vae_dtype is not None:
            the_reasoner.vae.to(parse_dtype(vae_dtype, "vae_dtype"))
        the_reasoner.to(devices["reasoner"], networks=False).vae.to(devices["reasoner"])  # a misfit shows early
        with reporting(f"loading the surrogate decoder {models['decoder']}"):
            the_decoder = load_decoder(paths["decoder"], the_reasoner, dtype=chosen)
            check_agreement(the_decoder, the_reasoner, models["decoder"])
        with reporting(f"loading the Teacher {models['teacher']}"):
            the_teacher = load_teacher(paths["teacher"], dtype=chosen, quantize=quantize, device=devices["teacher"])
        return cls(the_reasoner, the_teacher, the_decoder, defaults, models, offload).to(devices)

    @classmethod
    @plain_torch()
    def from_parts(
        cls,
        pipeline: DiffusionPipeline,
        vlm: PreTrainedModel,
        processor: ProcessorMixin,
        decoder: SurrogateDecoder | str | os.PathLike[str] | None = None,
        *,
        preset: str | None = None,
        offload: bool = False,
    ) -> TeacherPipeline:
        """Teach a loaded pipeline of diffusers by a loaded VLM of transformers. No weight is copied or moved.

        Both are frozen and in evaluation mode from then on; a call puts its LoRA on the pipeline's transformer and
        takes it off again. decoder: the surrogate decoder or its file; None is that of the family, from the hub.
        preset: see `adopt_reasoner`. Raises InputError as `from_pretrained` does.
        """
        from vlmteacher.decoders.agreement import check_agreement
        from vlmteacher.decoders.find import known_decoder
        from vlmteacher.decoders.taehv import SurrogateDecoder, load_decoder
        from vlmteacher.reasoners.loading import adopt_reasoner
        from vlmteacher.teachers.base import adopt_teacher

        reasoner, name = adopt_reasoner(pipeline, preset), "the given surrogate decoder"
        if not isinstance(decoder, SurrogateDecoder):
            name = known_decoder(reasoner) if decoder is None else arguments.path("decoder", decoder)
            decoder = load_decoder(name, reasoner, dtype=reasoner.dtype)
        check_agreement(decoder, reasoner, name)
        teacher = adopt_teacher(vlm, processor)
        models = {
            "reasoner": str(pipeline.config.get("_name_or_path") or type(pipeline).__name__),
            "teacher": str(getattr(vlm.config, "_name_or_path", "") or type(vlm).__name__),
            "decoder": name,
            **reasoner.notes,
        }
        return cls(reasoner, teacher, decoder, {}, models, arguments.flag("offload", offload))

    @any_form
    @alone()
    @in_its_folder
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: ImageInput | None = None,
        *,
        last_image: ImageInput | None = None,
        goal_image: ImageInput | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        queries: QuerySet | Mapping[str, Any] | Sequence[str] | str | os.PathLike[str] | None = None,
        rewards: Sequence[tuple[Reward, float]] = (),
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        progress: bool = True,
        tracker: Trackers = None,
        run_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
        **keywords: Unpack[Keywords],
    ) -> TeacherPipelineOutput:
        """Answer one instance, or each of a list, by test-time optimisation: Algorithm 1 of arXiv 2606.02564.

        Args:
            prompt, image, last_image, goal_image: task, first frame, last one, goal for the Teacher (see `Instance`).
            num_frames, height, width, num_inference_steps, guidance_scale, negative_prompt: None is the Reasoner's own.
            generator: draws the noise and the first weights of the LoRA; None draws a new seed.
            queries: a QuerySet, its dictionary, a list with the goal first, or a file; None: the Teacher writes them.
            rewards: (function, weight) beside the Teacher: see `vlmteacher.rewards`.
            output_type, return_dict: the form of the videos (`Frames`); False returns `(frames,)`.
            callback_on_step_end, progress, tracker: call, show, log each step (`three_arguments`, `trackers.tracking`).
            run_dir, resume: a folder to record the run in; go on with the interrupted run there, to the same result.
            keywords: see `Settings`; None is the default of the pair, or else of the paper.

        Raises InputError, OutputError, OutOfMemory; NonFiniteError when the first step is not finite.
        """
        images, size = (image, last_image, goal_image), (num_frames, height, width)
        sampling = (num_inference_steps, guidance_scale, negative_prompt)
        with open_session(
            self, prompt, images, size, sampling, generator, queries, rewards, keywords, run_dir, resume
        ) as session:
            # 1. The Teacher writes one goal query and M process queries.
            session.encode()
            session.write_queries()
            # 2. One noise for the whole instance, and a LoRA that changes nothing yet.
            session.draw_noise()
            session.add_lora()
            session.begin()
            # 3. At most N times: predict in one step, decode K frames, ask the Teacher; stop, or train the LoRA.
            for row in session.steps():
                if callback_on_step_end:
                    callback_on_step_end(self, row["step"], row)
            # 4. The few-step video of the adapted Reasoner from the same noise.
            sample = session.final_sample()
        output = session.output(sample, output_type)
        return output if return_dict else (output.frames,)  # type: ignore[return-value]  # diffusers' other form

    @alone()
    def load_lora(self, lora: str | os.PathLike[str] | TeacherPipelineOutput | None, partial: bool = False) -> None:
        """Start the following calls from this LoRA; None starts them from a fresh one again.

        lora: a file of any known tool or PEFT's folder (see `read_lora`), or the output of a call. Layers, rank and
        alpha are kept, and `frames_before` is made with it. partial: leave out tensors for layers that the Reasoner
        does not have, with a Notice. Raises InputError for a file that cannot be read, a LoRA for another model, and
        weight differences, which cannot be trained.
        """
        self.lora = None if lora is None else self._read_lora(lora, partial, trainable=True)

    @alone()
    def fuse(self, lora: str | os.PathLike[str] | TeacherPipelineOutput, partial: bool = False) -> None:
        """Add a LoRA (see `load_lora`) to the Reasoner's weights permanently.

        Weight differences (of norms, biases, modulations) are added too. Sums are computed in float32; weights of a
        smaller dtype lose part of the update, with a warning where it is more than 1%, and `load_lora` loses nothing.
        Raises InputError as `load_lora` does, and leaves the weights as they were.
        """
        if is_float8(self.reasoner.transformer):
            raise InputError("fuse adds to the Reasoner's weights, which fp8 keeps in 8 bits: fuse without fp8")
        if is_reduced(self.reasoner.transformer):
            raise InputError(
                "fuse adds to the Reasoner's weights, which are quantised: load them without quantization_config, or"
                " give the LoRA as few_step_lora, which is merged before"
            )
        read = self._read_lora(lora, partial)
        lost = merge_lora(self.reasoner.transformer, read)
        if lost > 0.01:
            dtype = str(self.reasoner.dtype).removeprefix("torch.")
            warnings.warn(f"rounding to {dtype} lost {lost:.0%} of the update by {read.source}", stacklevel=2)
        fused = f"{self.models['fused']}, " if "fused" in self.models else ""
        what = f"{read.source} ({lora_fingerprint(read)}; scale: {read.scale_source})"
        self.models = {**self.models, "fused": fused + what}

    def _read_lora(
        self, lora: str | os.PathLike[str] | TeacherPipelineOutput, partial: bool, trainable: bool = False
    ) -> LoRA:
        source: str | bytes
        name: str | None
        if isinstance(lora, TeacherPipelineOutput):
            source, name = lora.lora, "the output's LoRA"
        else:
            source, name = lora if isinstance(lora, bytes) else arguments.path("lora", lora), None
        two = getattr(self.reasoner, "transformer_2", None) is not None
        if two and not isinstance(source, bytes) and noise_in_name(os.fspath(source)) == "low":
            raise InputError(
                f"LoRA {os.fspath(source)} is for the low-noise expert by its name: give the high-noise one"
            )
        read = read_lora(source, name, partial).fitted(self.reasoner.transformer, partial, trainable)
        read.tell()
        return read


def one_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that is given under either name. Raises InputError for two that differ."""
    dtypes = {parse_dtype(each) for each in (dtype, torch_dtype) if each is not None}
    if len(dtypes) > 1:
        raise InputError(f"dtype {dtype} and torch_dtype {torch_dtype} are two names of one thing: give one")
    return dtypes.pop() if dtypes else None


def find_parts(
    given: Mapping[str, str | os.PathLike[str] | None], pair: str | os.PathLike[str] | None
) -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
    """The paths of reasoner, teacher and decoder, their names for the record, and the default settings.

    Those that are not given are the pair's. Raises InputError.
    """
    models = {name: arguments.path(name, path) for name, path in given.items() if path is not None}
    models = {name: os.path.abspath(path) if os.path.exists(path) else path for name, path in models.items()}
    if len(models) == len(given):
        return dict(models), models, {}
    directory, description = read_pair(pair)
    label = "packaged" if pair is None else os.fspath(pair)
    paths = {name: str(directory / description[name]) for name in given} | models
    models = {name: f"{label}/{description[name]}" for name in given} | models
    return paths, models, description.get("defaults", {}) if given["reasoner"] is None else {}


def read_pair(path: str | os.PathLike[str] | None = None) -> tuple[Path, dict[str, Any]]:
    """The directory and the content of pair.json of a pair of models, by default the packaged one.

    Raises InputError.
    """
    directory = PACKAGED_PAIR if path is None else Path(arguments.path("pair", path))
    file = directory / "pair.json"
    try:
        description = read_json(file, "file")
    except InputError as error:
        raise InputError(f"{directory} is no pair of models: {error}") from error
    if not isinstance(description, dict):
        raise InputError(f"{file} must be a JSON object that names reasoner, teacher and decoder")
    if missing := [name for name in ("reasoner", "teacher", "decoder") if name not in description]:
        raise InputError(f"{file} does not name its {' and '.join(missing)}")
    for name in ("reasoner", "teacher", "decoder", "many_step"):
        if not isinstance(description.get(name, ""), str):
            raise InputError(f"{file}: {name} must be a path, not {description[name]!r}")
    Settings.of(description.get("defaults", {}), f"{file}: defaults")
    return directory, description
