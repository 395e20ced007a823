"""TeacherPipeline: a frozen vision-language model teaches a video generation model one instance, at test time."""

from __future__ import annotations

import hashlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeAlias, TypeVar, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from vlmteacher import arguments, state
from vlmteacher.errors import InputError, NonFiniteError, NonFiniteFrames, OutOfMemory
from vlmteacher.exclusive import exclusive
from vlmteacher.files import claimed, read_json
from vlmteacher.lora.adapter import add_lora, export_lora, frozen_blocks, lora_size, remove_lora
from vlmteacher.lora.formats import LoRA, merge_lora, read_lora, safetensors_bytes
from vlmteacher.media import ImageInput, fit_image
from vlmteacher.optimization.divergence import DIVERGED_RISE, SUSPICIOUS_RISE
from vlmteacher.optimization.engines import check_engine
from vlmteacher.optimization.guards import frame_contrast
from vlmteacher.optimization.loop import Optimization, Stopped
from vlmteacher.optimization.objective import teacher_frame_indices
from vlmteacher.optimization.out_of_memory import is_out_of_memory
from vlmteacher.optimization.reward import pick, vqa_objective
from vlmteacher.placement import DeviceMap, check_memory, find_devices, find_dtype, parse_dtype
from vlmteacher.prompts import check_prompt
from vlmteacher.queries import QuerySet
from vlmteacher.reasoners.few_step_lora import noise_in_name
from vlmteacher.runs.folder import RunFolder, checked, in_its_folder
from vlmteacher.settings import Keywords, Settings
from vlmteacher.torch_modes import deterministic, leave_inference_mode, plain_torch

if TYPE_CHECKING:
    from vlmteacher.decoders.taehv import SurrogateDecoder
    from vlmteacher.reasoners.base import Reasoner
    from vlmteacher.reasoners.condition import Condition, Noise
    from vlmteacher.teachers.base import Teacher
    from vlmteacher.teachers.quantization import Quantize

PACKAGED_PAIR = Path(__file__).parent / "microworld" / "models"

P = ParamSpec("P")
R = TypeVar("R")

Frames: TypeAlias = list[Image.Image] | np.ndarray | Tensor
"""A video: list of F images ("pil"), array (F, H, W, 3) ("np") or tensor (F, 3, H, W) ("pt"), floats in [0, 1]."""


@dataclass
class TeacherPipelineOutput:
    """What one call gives.

    frames, frames_before: the final video with the trained LoRA and with what that started from, of the same noise.
    history: one row per step (see `Optimization`). stopped: "threshold", "max_steps" or "diverged"
    (the updates led nowhere: the LoRA is the best before them). p_yes_before, p_yes_after: the
    Teacher's P(Yes) for each query, goal first, on the two final videos; loss_before, loss_after: the objective there.
    sample: which of `final_samples` videos `frames` is; 0 is the one from all the noise of frames_before.
    lora: the bytes of lora.safetensors. seconds: wall time of each part. cut_tokens: of the prompt, the negative prompt
    and so on, how many tokens the Reasoner's text encoder did not take.
    """

    frames: Frames
    frames_before: Frames
    prompt: str
    queries: QuerySet
    history: list[dict[str, Any]]
    stopped: Stopped
    updates: int
    p_yes_before: list[float]
    p_yes_after: list[float]
    loss_before: float
    loss_after: float
    sample: int
    seconds: dict[str, float]
    config: dict[str, Any]
    models: dict[str, str]
    fps: float
    lora: bytes = field(repr=False)
    cut_tokens: dict[str, int] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The content of run.json, but for the version."""
        return {
            "prompt": self.prompt,
            "config": self.config,
            "queries": self.queries.to_dict(),
            "steps": self.history,
            "stopped": self.stopped,
            "updates": self.updates,
            "p_yes_before": self.p_yes_before,
            "p_yes_after": self.p_yes_after,
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "sample": self.sample,
            "seconds": self.seconds,
            "models": self.models,
            "cut_tokens": self.cut_tokens,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a run folder: before.mp4, after.mp4, lora.safetensors and its README.md, queries.json, run.json,
        report.html.

        Raises InputError when `path` cannot be written to or already holds a run, OutputError when the disk is full.
        """
        with claimed(checked(path)):
            folder = RunFolder(path)
            folder.begin(self.record())
            folder.finish(self)

    @staticmethod
    def uint8(frames: Frames) -> np.ndarray:
        """A video of any output type as (F, H, W, 3) uint8."""
        if isinstance(frames, Tensor):
            frames = frames.permute(0, 2, 3, 1).float().cpu().numpy()
        if isinstance(frames, np.ndarray):
            return (frames * 255).round().clip(0, 255).astype(np.uint8)
        return np.stack([np.asarray(frame) for frame in frames])


def alone(
    nested: bool = False,
) -> Callable[[Callable[Concatenate[Any, P], R]], Callable[Concatenate[Any, P], R]]:
    """Decorate a method that works with the models: one thread and one call at a time, in torch's plain modes.

    nested: may be called inside another one of the same thread, by a callback for one. The call raises InputError where
    the pipeline is at work already, and OutOfMemory where what it makes does not fit.
    """

    def decorate(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
        @wraps(method)
        def run(self: Any, *args: P.args, **keywords: P.kwargs) -> R:
            with exclusive(self.reasoner.transformer, nested), plain_torch(), self._same_bytes(keywords):
                try:
                    return method(self, *args, **keywords)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OutOfMemory(
                f"it does not fit in memory ({why}): give fewer or smaller frames, or offload; `vlmteacher plan` says"
                " what fits"
            )

        return run

    return decorate


class TeacherPipeline:
    """A Reasoner (video generation model), a Teacher (vision-language model) and a surrogate decoder between them.

    All three stay frozen: a call trains a LoRA for its one instance and takes it off again.

    defaults: settings of a call where they differ from the paper's. models: names for the record, under "reasoner",
    "teacher" and "decoder". offload: networks that are not needed wait in main memory (see `need`). loop: while a call
    is at its steps, the optimisation, for a callback that wants to know more of it.
    """

    def __init__(
        self,
        reasoner: Reasoner,
        teacher: Teacher,
        decoder: SurrogateDecoder,
        defaults: dict[str, Any] | None = None,
        models: dict[str, str] | None = None,
        offload: bool = False,
    ) -> None:
        for name, part in (("reasoner", reasoner), ("teacher", teacher), ("decoder", decoder)):
            if not hasattr(part, "to"):
                raise InputError(
                    f"{name} must be a loaded model, not {arguments.show(part)}: `from_pretrained` loads by name"
                )
        self.reasoner, self.teacher, self.decoder = reasoner, teacher, decoder
        self.offload = offload
        self.devices = {"reasoner": reasoner.device, "teacher": teacher.device}
        self.defaults = Settings.of(defaults or {}, "defaults")
        self.models = models or {}
        self.lora: LoRA | None = None
        self.loop: Optimization | None = None

    def _same_bytes(self, keywords: Mapping[str, Any]) -> Any:
        """The context of a call with these keywords: `deterministic`, or none."""
        wanted = keywords.get("deterministic")
        if wanted is None:
            wanted = self.defaults.deterministic
        if not arguments.flag("deterministic", wanted):
            return nullcontext()
        return deterministic(*self.devices.values())

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
        device_map: str | torch.device | DeviceMap | None = None,
        offload: bool = False,
        quantize: Quantize | None = None,
        transformer: str | Sequence[str] | None = None,
        few_step_lora: str | Sequence[str] | None = None,
        preset: str | None = None,
        lora_partial: bool = False,
    ) -> TeacherPipeline:
        """Load the models: hub ids or local directories for `reasoner` and `teacher`, a file or hub name for `decoder`.

        Those left out come from `pair`, a directory with a pair.json; by default the packaged tiny pair. The pair's
        own default settings hold as long as the Reasoner is the pair's. A Reasoner with other latents than the pair's
        decoder gets the decoder that its family is known to have, from the hub (`known_decoder`).
        device_map: one device, or {"reasoner": "cuda:0", "teacher": "cuda:1"} (see `to`); None is the GPU where there
        is one. dtype: torch's or its name; None is bfloat16 on GPUs, float32 elsewhere; torch_dtype: the same under
        diffusers' other name. offload: see `need`.
        quantize: keep the Teacher's language model in "8bit" or "4bit" (the extra `quantized`); it stays on its device.
        transformer, few_step_lora, preset, lora_partial: parts of the Reasoner from elsewhere, and how it samples
            (`load_reasoner`).
        Raises InputError: no such model, an unknown family, models that do not fit together, a device that is not
        there; MissingExtra.
        """
        from vlmteacher.decoders.agreement import check_agreement
        from vlmteacher.decoders.find import known_decoder
        from vlmteacher.decoders.taehv import fits_decoder, load_decoder
        from vlmteacher.reasoners.loading import load_reasoner
        from vlmteacher.teachers import load_teacher

        dtypes = {parse_dtype(each) for each in (dtype, torch_dtype) if each is not None}
        if len(dtypes) > 1:
            raise InputError(f"dtype {dtype} and torch_dtype {torch_dtype} are two names of one thing: give one")
        arguments.flag("offload", offload)
        for name, value in (("quantize", quantize), ("preset", preset)):
            if value is not None:
                arguments.text(name, value)
        if transformer is not None:
            transformer = arguments.paths("transformer", transformer)
        if few_step_lora is not None:
            few_step_lora = arguments.paths("few_step_lora", few_step_lora)
        devices = find_devices(device_map)
        chosen = dtypes.pop() if dtypes else find_dtype(devices)
        given = {"reasoner": reasoner, "teacher": teacher, "decoder": decoder}
        models = {name: arguments.path(name, path) for name, path in given.items() if path is not None}
        models = {name: os.path.abspath(path) if os.path.exists(path) else path for name, path in models.items()}
        defaults: dict[str, Any] = {}
        if len(models) < 3:
            directory, description = read_pair(pair)
            label = "packaged" if pair is None else os.fspath(pair)
            paths = {name: str(directory / description[name]) for name in given} | models
            models = {name: f"{label}/{description[name]}" for name in given} | models
            defaults = description.get("defaults", {}) if reasoner is None else {}
        else:
            paths = models
        changes = {"transformer": transformer, "few_step_lora": few_step_lora}
        for name, files in changes.items():
            for file in [files] if isinstance(files, str) else files or ():
                path = os.path.abspath(file) if os.path.exists(file) else file
                models[name] = f"{models[name]}, {path}" if name in models else path
        the_reasoner = load_reasoner(
            paths["reasoner"],
            dtype=chosen,
            transformer=transformer,
            few_step_lora=few_step_lora,
            preset=preset,
            lora_partial=lora_partial,
        )
        models |= the_reasoner.notes
        if reasoner is not None and decoder is None and not fits_decoder(paths["decoder"], the_reasoner):
            models["decoder"] = paths["decoder"] = known_decoder(the_reasoner)
        # A misfit shows before the Teacher loads.
        the_reasoner.to(devices["reasoner"], networks=False).vae.to(devices["reasoner"])
        the_decoder = load_decoder(paths["decoder"], the_reasoner, dtype=chosen)
        check_agreement(the_decoder, the_reasoner, models["decoder"])
        the_teacher = load_teacher(paths["teacher"], dtype=chosen, quantize=quantize, device=devices["teacher"])
        return cls(the_reasoner, the_teacher, the_decoder, defaults, models, offload).to(devices)

    @alone()
    def to(self, device: str | torch.device | DeviceMap) -> TeacherPipeline:
        """Work on one device, or on one for each of "reasoner" and "teacher"; the decoder goes with the Reasoner.

        Frames go from the one to the other, and their gradients back. Raises InputError for an unknown part, a device
        that is not there, and a quantised Teacher that would have to move.
        """
        self.devices = find_devices(device)
        self._place()
        return self

    def _place(self) -> None:
        self.reasoner.to(self.devices["reasoner"], networks=not self.offload)
        self.decoder.to(self.devices["reasoner"])
        if self.teacher.quantized or not self.offload:
            self.teacher.to(self.devices["teacher"])
        self.need()

    def need(self, *names: str) -> None:
        """With `offload`: these on their devices, every other in main memory. Else all stay where they are.

        names: of `Reasoner.networks`, or "teacher"; a quantised one always stays.
        """
        if not self.offload:
            return
        parts: dict[str, Any] = dict(self.reasoner.networks)
        if not self.teacher.quantized:
            parts["teacher"] = self.teacher
        for name in sorted(parts, key=lambda name: name in names):  # those that leave make room for those that come
            home = self.devices["teacher" if name == "teacher" else "reasoner"]
            parts[name].to(home if name in names else torch.device("cpu"))

    @alone()
    @in_its_folder
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: ImageInput | None = None,
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        queries: QuerySet | Mapping[str, Any] | Sequence[str] | str | os.PathLike[str] | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[TeacherPipeline, int, dict[str, Any]], Any] | None = None,
        progress: bool = True,
        run_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
        **keywords: Unpack[Keywords],
    ) -> TeacherPipelineOutput:
        """Answer one instance (prompt, first frame) by test-time optimisation: Algorithm 1 of arXiv 2606.02564.

        Args:
            prompt: the task; it, negative_prompt and generator may come as a list of one. image: the first frame, or
                None for a text-only instance; an image of another size but the same shape is resized.
            num_frames, height, width: of the video; None is the Reasoner's own size.
            num_inference_steps, guidance_scale, negative_prompt: how the Reasoner samples; None is its preset's. The
                steps are evenly spaced (before the shift); guidance, 1 for none, holds in the one-step prediction too.
            generator: the source of the instance's noise and of the LoRA's start; None draws a new seed.
            queries: a QuerySet, its dictionary, a list with the goal first, or a file of `vlmteacher queries`; None
                lets the Teacher write them.
            output_type: what the videos come as (see `Frames`). return_dict: False returns `(frames,)`.
            callback_on_step_end: called as `callback(pipe, step, row)` after each step.
            run_dir: a folder to write the run to while it goes on; an interrupted one (KeyboardInterrupt, kill, power)
                is taken up by the same call with `resume=True`, and ends in the same LoRA as if nothing had happened. A
                finished one gets the files that it lacks, or, with a greater `max_steps`, goes on.
            keywords: see `Settings`; None is the pair's default, where it has one, or else the paper's.

        It does not matter whether the caller is inside `no_grad`, `inference_mode` or autocast. A pipeline does one
        thing at a time: from another thread, or from its callback, a second call is refused.

        Raises InputError for what cannot be used, OutputError for a file that cannot be written, NonFiniteError when
        the optimisation breaks down at its first step, OutOfMemory when a step does not fit, however little is kept
        (`vlmteacher/optimization/memory_ladder.py`).
        """
        start = time.perf_counter()
        leave_inference_mode(self.reasoner, self.teacher, self.decoder)
        teacher, decoder = self.teacher, self.decoder
        prompt = arguments.text("prompt", arguments.single("prompt", prompt))
        if negative_prompt is not None:
            negative_prompt = arguments.text("negative_prompt", arguments.single("negative_prompt", negative_prompt))
        if guidance_scale is not None:
            guidance_scale = arguments.number("guidance_scale", guidance_scale)
        if num_inference_steps is not None:
            num_inference_steps = arguments.whole("num_inference_steps", num_inference_steps)
        source = find_generator(generator)
        queries = find_queries(queries)
        for name, value in (("return_dict", return_dict), ("progress", progress), ("resume", resume)):
            arguments.flag(name, value)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise InputError(f"callback_on_step_end must be a function, not {arguments.show(callback_on_step_end)}")
        reasoner = self.reasoner.with_sampling(
            num_inference_steps, guidance_scale=guidance_scale, negative_prompt=negative_prompt
        )
        if not reasoner.draws_later and keywords.get("final_samples") is None:
            keywords["final_samples"] = 1  # a pair's default is for its own sampler: by another, all may be the same
        if self.lora:
            if keywords.get("rank") not in (None, self.lora.rank):
                raise InputError(
                    f"{self.lora.source} is of rank {self.lora.rank}: it cannot go on with rank {keywords['rank']}"
                )
            keywords["rank"] = self.lora.rank
        settings = self.defaults.updated(**keywords)
        check_engine(settings.engine, reasoner, teacher)
        reasoner.check_target(settings.target)
        reasoner.check_samples(settings.final_samples)
        frozen_blocks(reasoner.transformer, settings.lora_blocks)
        if self.lora and settings.lora_blocks is not None:
            raise InputError(f"{self.lora.source} has its own layers: it cannot go on with lora_blocks")
        given = {"num_frames": num_frames, "height": height, "width": width}
        size = {
            name: getattr(reasoner, name) if value is None else arguments.whole(name, value)
            for name, value in given.items()
        }
        check_prompt(prompt)
        check_choice("output_type", output_type, ("pil", "np", "pt"))
        reasoner.check(**size)
        check_size(reasoner, settings, **size)
        frame_indices = teacher_frame_indices(size["num_frames"], settings.teacher_frames)
        image = None if image is None else fit_image(image, size["height"], size["width"])
        run = None if run_dir is None else RunFolder(arguments.path("run_dir", run_dir), resume)
        recorded = run.record if run else None
        if recorded and keywords.get("max_steps") is None:  # it may have been raised since
            settings = replace(settings, max_steps=recorded["config"].get("max_steps"))
        if source is None:
            source = torch.Generator()
            source.manual_seed(recorded["config"]["seed"] if recorded else source.seed())
        seed = source.initial_seed()
        config = {
            **settings.to_dict(),
            **size,
            "sampling": reasoner.settings.sampling,
            "seed": seed,
            "generator": digest(source.get_state().numpy()),  # one that was used before has the same seed
            "image": None if image is None else digest(np.asarray(image)),
            "dtype": str(reasoner.dtype).removeprefix("torch."),
            "lora": self.lora and fingerprint(self.lora),
            **({"lora_scale": self.lora.scale_source} if self.lora else {}),
        }
        if run and recorded:
            queries = queries or QuerySet.from_dict(recorded["queries"])
            if settings.preserve:
                queries = queries.plus(teacher.style.preservation_query)
            run.take_up(self._record(prompt, config, queries))
        seconds: dict[str, float] = {}
        self.need(*(name for name in reasoner.networks if not name.startswith("transformer")))
        condition = reasoner.encode(prompt, image, **size)

        # 1. The Teacher writes one goal query and M process queries.
        with timed(seconds, "queries"):
            queries = queries or self.write_queries(prompt, image)
            if settings.preserve:
                queries = queries.plus(teacher.style.preservation_query)

        record = self._record(prompt, config, queries) if run else {}  # of the models without the LoRA

        # 2. One noise for the whole instance, and a LoRA that changes nothing yet.
        noise = reasoner.noise(condition, source, settings.final_samples)
        add_lora(
            reasoner.transformer,
            settings.rank,
            seed=seed,
            start=self.lora,
            fused=settings.fused_lora,
            blocks=settings.lora_blocks,
        )
        try:
            with timed(seconds, "before"):
                video_before = self.sample(condition, noise, reasoner)
                losses_before = self.judge(video_before, frame_indices, queries)
            if run and not recorded:
                run.begin({**record, "cut_tokens": condition.all_cut})
            working = self._working(settings)
            self.need(*working)
            offload = self.offload

            def make_room() -> None:
                self.offload = True
                self.need(*working)

            loop = Optimization(reasoner, decoder, teacher, condition, noise, queries, settings, make_room)
            self.loop = loop
            try:
                # 3. Look at the one-step prediction; stop if the Teacher is content, else update; at most N times.
                for row in watch(loop, run, progress):
                    if callback_on_step_end:
                        with plain_torch():
                            callback_on_step_end(self, row["step"], row)
                        self.need(*working)  # it may have looked at a video
                loop.finish()
                lora = export_lora(reasoner.transformer)
                if run:
                    run.write_lora(lora)

                # 4. The few-step video of the adapted Reasoner from the same noise.
                with timed(seconds, "after"):
                    video, losses, sample = self._final(loop, video_before, losses_before)
                if loop.stopped == "diverged":  # which this video may have shown
                    lora = export_lora(reasoner.transformer)
                    if run:
                        run.write_lora(lora)
            except (KeyboardInterrupt, NonFiniteError, OutOfMemory):
                if run:
                    run.interrupt(loop)
                raise
            finally:
                self.loop = None
                loop.close()
                if self.offload and not offload:  # memory ran out; the next instance may be smaller
                    self.offload = False
                    self._place()
        finally:
            remove_lora(reasoner.transformer)
            self.need()

        assert loop.stopped is not None  # the loop above ends in no other way
        seconds["steps"] = sum(row["seconds"] for row in loop.history)
        seconds["total"] = time.perf_counter() - start
        output = TeacherPipelineOutput(
            frames=convert(video, output_type),
            frames_before=convert(video_before, output_type),
            prompt=prompt,
            queries=queries,
            history=loop.history,
            stopped=loop.stopped,
            updates=loop.updates,
            p_yes_before=losses_before.neg().exp().tolist(),
            p_yes_after=losses.neg().exp().tolist(),
            loss_before=vqa_objective(losses_before, settings.goal_weight).item(),
            loss_after=vqa_objective(losses, settings.goal_weight).item(),
            sample=sample,
            seconds=seconds,
            config=config,
            models=self.models,
            fps=reasoner.fps,
            lora=lora,
            cut_tokens=condition.all_cut,
        )
        if run:
            run.finish(output)
        if not return_dict:
            return (output.frames,)  # type: ignore[return-value]  # diffusers' other form, for those who ask for it
        return output

    def _record(self, prompt: str, config: dict[str, Any], queries: QuerySet) -> dict[str, Any]:
        """What identifies a run in its folder (see `RunFolder.begin`)."""
        teacher = getattr(self.teacher, "model", None)
        fingerprints = {
            "reasoner": state.fingerprint(self.reasoner.networks, self.reasoner.settings),
            "teacher": state.fingerprint({} if teacher is None else {"model": teacher}, self.teacher.style),
            "decoder": state.fingerprint({"decoder": self.decoder}),
        }
        what = {"prompt": prompt, "config": config, "models": self.models}
        return {**what, "queries": queries.to_dict(), "fingerprints": fingerprints}

    def _final(self, loop: Optimization, video_before: Tensor, losses_before: Tensor) -> tuple[Tensor, Tensor, int]:
        """The few-step video of the LoRA that stays, its losses, and which of the samples it is.

        The last update was not looked at by any step: where this video shows that it led nowhere, the best LoRA comes
        in its place.
        """
        weight = loop.settings.goal_weight

        def best() -> tuple[Tensor, Tensor, int]:
            # Without an update the first of them is the video of before.
            samples, judged = ([], []) if loop.updates else ([video_before], [losses_before])
            known = len(samples)
            samples += [self.sample(loop.condition, each, loop.reasoner) for each in loop.noise.samples()[known:]]
            judged += [self.judge(each, loop.frame_indices, loop.queries) for each in samples[known:]]
            sample = pick(judged, weight)
            return samples[sample], judged[sample], sample

        try:
            found = best()
        except NonFiniteFrames as error:
            if not loop.updates:
                raise
            loop.diverge(error)
            return best()
        rise = vqa_objective(found[1], weight).item() - vqa_objective(losses_before, weight).item()
        flat = loop.flatness(frame_contrast(found[0]).item())
        if loop.settings.keep == "best" or loop.stopped != "max_steps" or not (rise > SUSPICIOUS_RISE or flat):
            return found
        why = f"the few-step video's loss has risen by {rise:.2f}" if rise > DIVERGED_RISE else flat
        if why is None:
            self.need(*self._working(loop.settings))
            why = loop.last_divergence()
        if why is None:
            return found
        loop.diverge(why)
        return best()

    def _working(self, settings: Settings) -> list[str]:
        """The networks that a step needs."""
        final = settings.check_final or settings.target != "first_step"
        return ["transformer", "teacher", *(["transformer_2", "vae"] if final else [])]

    @alone()
    def load_lora(self, lora: str | os.PathLike[str] | TeacherPipelineOutput | None, partial: bool = False) -> None:
        """Let every following call go on from this LoRA instead of a fresh one; None: from a fresh one again.

        lora: a file of one of many tools or PEFT's folder (see `read_lora`), or the output of a call. Its layers, rank
        and alpha stay as they are, and `frames_before` is made with it. partial: leave out what the Reasoner has no
        place for, of which a Notice tells. Raises InputError for a file that cannot be read, a LoRA for another model,
        and weight differences, which cannot be trained.
        """
        self.lora = None if lora is None else self._read_lora(lora, partial, trainable=True)

    @alone()
    def fuse(self, lora: str | os.PathLike[str] | TeacherPipelineOutput, partial: bool = False) -> None:
        """Add a LoRA (see `load_lora`) to the Reasoner's weights for good; following calls start from them.

        Weight differences (of norms, biases, modulations) are added too. The sum is made in float32. Weights of a
        smaller dtype lose a part of the update, of which a warning tells: `load_lora` loses nothing. Raises InputError
        as `load_lora` does; the weights are then as they were.
        """
        read = self._read_lora(lora, partial)
        lost = merge_lora(self.reasoner.transformer, read)
        if lost > 0.01:
            dtype = str(self.reasoner.dtype).removeprefix("torch.")
            warnings.warn(f"rounding to {dtype} lost {lost:.0%} of the update by {read.source}", stacklevel=2)
        fused = f"{self.models['fused']}, " if "fused" in self.models else ""
        what = f"{read.source} ({fingerprint(read)}; scale: {read.scale_source})"
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
                f"LoRA {os.fspath(source)} is for the low-noise expert by its name: the other one is taught"
            )
        read = read_lora(source, name, partial).fitted(self.reasoner.transformer, partial, trainable)
        read.tell()
        return read

    @alone(nested=True)
    def write_queries(self, prompt: str, image: ImageInput | None = None) -> QuerySet:
        """The Teacher's queries for a task (see `Teacher.write_queries`)."""
        self.need("teacher")
        return self.teacher.write_queries(prompt, image)

    @alone(nested=True)
    def sample(self, condition: Condition, noise: Noise, reasoner: Reasoner | None = None) -> Tensor:
        """The video (F, 3, H, W) of the Reasoner, as it is now, from this noise; float32 in [0, 1].

        reasoner: our own with other settings (`with_sampling`).
        """
        self.need("transformer")
        latents = (reasoner or self.reasoner).sample(condition, noise)
        self.need("vae")
        return self.reasoner.decode(latents)

    @alone(nested=True)
    @torch.no_grad()
    def judge(self, video: Tensor, frame_indices: Sequence[int], queries: QuerySet) -> Tensor:
        """-log P(Yes) (1+M,) of each query on a decoded video (F, 3, H, W)."""
        self.need("teacher")
        return self.teacher.losses(video[list(frame_indices)], frame_indices, self.reasoner.fps, queries)


def watch(loop: Optimization, run: RunFolder | None, progress: bool) -> Iterator[dict[str, Any]]:
    """The steps of `loop`, with a progress bar, from and to the state that `run` keeps on disk."""
    if run:
        run.load_state(loop)
    with tqdm(total=loop.settings.max_steps, initial=len(loop.history), disable=not progress) as bar:
        for row in loop:
            p_yes = " ".join(f"{p:.2f}" for p in row["p_yes"])
            bar.set_postfix_str(f"loss {row['loss']:.3f}, P(Yes) {p_yes}", refresh=False)
            bar.update()
            if run:
                run.save_state(loop, force=loop.stopped is not None)
            yield row


def read_pair(path: str | os.PathLike[str] | None = None) -> tuple[Path, dict[str, Any]]:
    """The directory and the pair.json of a pair of models, by default of the packaged one. Raises InputError."""
    directory = PACKAGED_PAIR if path is None else Path(arguments.path("pair", path))
    file = directory / "pair.json"
    try:
        description = read_json(file, "file")
    except InputError as error:
        raise InputError(f"{directory} is no pair of models: {error}") from error
    if not isinstance(description, dict):
        raise InputError(f"{file} is no object of names: it must name reasoner, teacher and decoder")
    if missing := [name for name in ("reasoner", "teacher", "decoder") if name not in description]:
        raise InputError(f"{file} does not name its {' and '.join(missing)}")
    for name in ("reasoner", "teacher", "decoder", "many_step"):
        if not isinstance(description.get(name, ""), str):
            raise InputError(f"{file}: {name} must be a path, not {description[name]!r}")
    defaults = description.get("defaults", {})
    try:
        Settings(**defaults)
    except TypeError as error:
        raise InputError(f"{file}: its defaults are no settings ({str(error).split('__init__() ')[-1]})") from error
    return directory, description


def find_generator(generator: object) -> torch.Generator | None:
    """A generator, or the only one of a list. Raises InputError."""
    found = arguments.single("generator", generator)
    if found is None or isinstance(found, torch.Generator):
        return found
    raise InputError(
        f"generator must be a torch.Generator, not {arguments.show(found)}: torch.Generator().manual_seed(0) is one"
    )


def find_queries(queries: object) -> QuerySet | None:
    """A query set from its dictionary, from a list with the goal first, or from a file. Raises InputError."""
    if queries is None or isinstance(queries, QuerySet):
        return queries
    if isinstance(queries, (str, os.PathLike)):
        return QuerySet.load(arguments.path("queries", queries))
    if isinstance(queries, (list, tuple)) and queries:
        return QuerySet(queries[0], tuple(queries[1:]))
    return QuerySet.from_dict(queries)


def check_size(reasoner: Reasoner, settings: Settings, num_frames: int, height: int, width: int) -> None:
    """Raise InputError where noise and pixels alone, or the LoRA alone, are larger than the Reasoner's device."""
    if settings.frame_jitter >= min(height, width):
        raise InputError(f"frame_jitter {settings.frame_jitter} shifts frames of {width}x{height} out of themselves")
    latents = math.prod(reasoner.latent_shape(num_frames, height, width))
    later = len(reasoner.settings.timesteps) - 1 if reasoner.settings.sampler == "renoise" else 0
    pixels = 3 * num_frames * height * width
    numbers = latents * (2 + later * settings.final_samples) + pixels * (1 + settings.final_samples)
    samples = f" and {settings.final_samples} final_samples" if settings.final_samples > 1 else ""
    video = f"a video of {num_frames} frames of {width}x{height} with {later + 1} draws of noise{samples}"
    check_memory(reasoner.device, 4 * numbers, video, "give fewer or smaller frames, steps or final_samples")
    weights = lora_size(reasoner.transformer, settings.rank, settings.lora_blocks)
    check_memory(reasoner.device, 16 * weights, f"a LoRA of rank {settings.rank} in training", "give a lower rank")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} {arguments.show(value)} is not there: it can be {' or '.join(map(repr, choices))}")


def convert(video: Tensor, output_type: Literal["pil", "np", "pt"]) -> Frames:
    """A video (F, 3, H, W) in [0, 1] as the output type."""
    if output_type == "pt":
        return video
    if output_type == "np":
        return video.permute(0, 2, 3, 1).float().cpu().numpy()
    return [Image.fromarray(frame) for frame in TeacherPipelineOutput.uint8(video)]


def fingerprint(lora: LoRA) -> str:
    data = replace(lora, differences={}).to_bytes("diffusers")
    differences = safetensors_bytes(lora.differences) if lora.differences else b""
    return hashlib.sha256(data + differences).hexdigest()[:16]


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
