"""One instance from begin to end: the parts of Algorithm 1 that `TeacherPipeline.__call__` puts in order."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from vlmteacher import state
from vlmteacher.errors import NonFiniteError, NonFiniteFrames, OutOfMemory
from vlmteacher.first_video import FirstVideo, Sample, timed
from vlmteacher.instance import Instance, check_inputs
from vlmteacher.lora.adapter import export_lora, load_lora_state, lora_state_dict, remove_lora
from vlmteacher.media import ImageInput
from vlmteacher.ops import sdpa
from vlmteacher.optimization.divergence import DIVERGED_RISE, SUSPICIOUS_RISE
from vlmteacher.optimization.frames import indices_by_change
from vlmteacher.optimization.guards import frame_contrast
from vlmteacher.optimization.loop import Optimization
from vlmteacher.optimization.reward import pick, vqa_objective
from vlmteacher.output import TeacherPipelineOutput, convert
from vlmteacher.placement import peak_memory, used_memory
from vlmteacher.progress import reporting
from vlmteacher.queries import QuerySet
from vlmteacher.reasoners.attention import check_backward, describe
from vlmteacher.reasoners.context_parallel import shared_tokens
from vlmteacher.rewards import RewardContext, Rewards
from vlmteacher.runs.folder import RunFolder
from vlmteacher.settings import Keywords
from vlmteacher.torch_modes import leave_inference_mode
from vlmteacher.warm_starts import WarmStarts, embed, key_of

if TYPE_CHECKING:
    from vlmteacher.frozen_models import FrozenModels
    from vlmteacher.reasoners.condition import Condition, Noise


log = logging.getLogger(__name__)


class Session:
    """One instance on the models of a pipeline. As a context it takes the LoRA off at its end, and undoes `offload`.

    Attributes:
        queries, condition, noise: of the instance, as soon as they are made.
        loop: the optimisation. It is also `models.loop` while it is at work.
        lora: the bytes of the LoRA file, after the steps.
    """

    queries: QuerySet
    condition: Condition
    noise: Noise
    loop: Optimization
    lora: bytes

    def __init__(self, models: FrozenModels, instance: Instance) -> None:
        self.models, self.instance = models, instance
        self.settings, self.reasoner = instance.settings, instance.reasoner
        self.ranks = instance.reasoner.ranks
        self.config = instance.config()
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self._start = time.perf_counter()
        self.rewards: Rewards | None = None
        self._undo = ExitStack()
        later = self.settings.check_final or self.settings.target != "first_step"
        self._at_work = ["transformer", "teacher", *(["transformer_2", "vae"] if later else [])]

    def __enter__(self) -> Self:
        self._undo.enter_context(sdpa.chosen(self.settings.attention, self.reasoner.device))
        return self

    def __exit__(self, *error: Any) -> None:
        self._undo.__exit__(*error)

    def encode(self) -> None:
        """Encode prompt, first and last frame."""
        self.models.need(*(name for name in self.reasoner.networks if not name.startswith("transformer")))
        instance = self.instance
        self.condition = self.reasoner.encode(
            instance.prompt, instance.image, **instance.size, last_image=instance.last_image
        )

    def write_queries(self) -> None:
        """Take the queries of the call, or let the Teacher write them."""
        if self.instance.queries:
            self.models.check_task(self.instance.prompt)
        with self._timed("queries", shown=not self.instance.queries):
            prompt, image, goal = self.instance.prompt, self.instance.image, self.instance.goal_image
            queries = self.instance.queries or self.models.write_queries(prompt, image, goal)
            self.queries = self.ranks.first(self._preserving(queries))

    def _preserving(self, queries: QuerySet) -> QuerySet:
        return queries.plus(self.models.teacher.style.preservation_query) if self.settings.preserve else queries

    def draw_noise(self) -> None:
        """Draw the noise of every sampling step."""
        self.noise = self.reasoner.noise(self.condition, self.instance.generator, self.settings.final_samples)

    def add_lora(self) -> None:
        """Put a LoRA on the Reasoner: a fresh one, which changes nothing yet, or the one to start from."""
        usage = self.seconds, self.memory
        self.before = FirstVideo(self.models, self.instance, self.condition, self.noise, self.queries, usage)
        self._undo.callback(self.models.need)
        self._undo.callback(self._remove_lora)
        self.before.add_lora()
        self.before.start = lora_state_dict(self.reasoner.transformer)
        check_backward(self.reasoner.transformer)
        self._undo.enter_context(shared_tokens(self.reasoner, self.ranks))
        if self.settings.teacher_frames_by == "change":
            self._choose_frames()

    def _choose_frames(self) -> None:
        """Let the Teacher see the frames where the one-step prediction changes, the same ones in all steps."""
        indices = self.frames_known()
        if indices is None:
            self.models.need("transformer")
            with torch.no_grad():
                latents = self.reasoner.predict_clean(self.condition, self.noise)
            reasoner, frames = self.reasoner, self.instance.size["num_frames"]
            how = reasoner.temporal_stride, reasoner.lead_frames, frames, len(self.instance.frame_indices)
            indices = self.ranks.first(indices_by_change(latents, *how))
        self.instance = self.before.instance = replace(self.instance, frame_indices=indices)

    def frames_known(self) -> list[int] | None:
        """The frames that an earlier process has chosen for this run."""
        return None

    def _remove_lora(self) -> None:
        remove_lora(self.reasoner.transformer)
        self.before.start = None

    def begin(self) -> None:
        """Check the rewards on the video before any update, where there are any; several ranks make it together now."""
        instance = self.instance
        if instance.rewards:
            context = RewardContext(
                instance.prompt, instance.image, instance.frame_indices, self.reasoner.fps, self.queries
            )
            self.rewards = self.before.rewards = instance.rewards.within(context)
            self.rewards.check(self.before().video[instance.frame_indices])
        if self.ranks.size > 1:
            self.before()

    def steps(self) -> Iterator[dict[str, Any]]:
        """The rows of the optimisation's steps (see `Optimization`), which are the events of the work "solve"."""
        self._begin_loop()
        if self.ranks.size > 1:
            self.loop.load_state_dict(self.ranks.first(self.loop.state_dict()))
        devices = self.models.devices.values()
        about = {"prompt": self.instance.prompt, "queries": self.queries.to_dict(), "models": self.models.models}
        total, done = self.settings.max_steps, len(self.loop.history)
        with reporting("solve", total, done=done, settings={**about, **self.config}) as advance:
            for row in self.loop:
                advance({**row, "memory": used_memory(*devices)})
                yield row
                self.models.need(*self._at_work)  # a callback may have sampled a video
        self.memory["steps"] = peak_memory(*self.models.devices.values())
        self.loop.finish()
        self._export_lora()

    def _begin_loop(self) -> None:
        models, offload = self.models, self.models.offload

        def make_room() -> None:
            models.offload = True
            models.need(*self._at_work)

        def end() -> None:
            models.loop = None
            self.loop.close()
            if models.offload and not offload:  # memory ran out; the next instance may be smaller
                models.offload = False
                models.place()

        warm = self.settings.warm_start and self.settings.max_steps and self._embed()
        models.need(*self._at_work)
        if self.instance.fit:
            log.info("memory: %s", self.instance.fit)
            self._undo.enter_context(self.instance.fit.on(self.reasoner, self.instance.teacher))
        self.loop = models.loop = Optimization(
            self.reasoner,
            models.decoder,
            self.instance.teacher,
            self.condition,
            self.noise,
            self.queries,
            self.settings,
            make_room,
            self.rewards,
            self.instance.frame_indices,
        )
        self._undo.callback(end)
        if warm:
            self._warm_start()

    def _embed(self) -> bool:
        """Embed the texts by the Reasoner's text encoder, for warm starts."""
        self.models.need(*(name for name in self.reasoner.networks if not name.startswith("transformer")))
        self.embedding = embed(self.reasoner, self.instance.prompt, self.queries)
        return True

    def _warm_start(self) -> None:
        """Take an earlier instance's LoRA where its first loss is lower than that of the fresh LoRA."""
        loop, transformer = self.loop, self.reasoner.transformer
        assert self.settings.warm_start is not None
        self._store = WarmStarts(self.settings.warm_start, self.models.models["reasoner"])
        self._key = key_of(self.instance.prompt, self.queries, self.config)
        fresh = lora_state_dict(transformer)
        start = self._store.find(self.embedding, self._key, fresh, self.settings.warm_start_from == "mean")
        if start is None:
            return
        loss_fresh = loop.look()
        load_lora_state(transformer, start.state)
        loss_start = loop.look()
        taken = loss_start < loss_fresh
        if not taken:
            load_lora_state(transformer, fresh)
        losses = {"loss_fresh": loss_fresh, "loss_start": loss_start}
        loop.warm_start = {"from": start.name, "similarity": start.similarity, "taken": taken, **losses}

    def _remember(self, after: Sample) -> None:
        """Add the instance to the warm starts if it reached the threshold by updates."""
        if not self.settings.warm_start or self.loop.stopped != "threshold" or not self.loop.updates:
            return
        entry = {
            "prompt": self.instance.prompt,
            "queries": self.queries.to_dict(),
            "embedding": self.embedding,
            "updates": self.loop.updates,
            "loss_first": self.loop.history[0]["loss"],
            "loss_after": self._loss(after),
            "warm_start": self.loop.warm_start,
        }
        self._store.add(self._key, self.lora, self.instance.image, entry)

    def _export_lora(self) -> None:
        self.lora = export_lora(self.reasoner.transformer)

    def final_sample(self) -> Sample:
        """The few-step video of the trained LoRA, the best of `final_samples`.

        No step has evaluated the last update: where this video shows that it diverged, the best LoRA takes its place.
        """
        with self._timed("after"):
            after = self._final_sample()
        if self.loop.stopped == "diverged":
            self._export_lora()
        return after

    def _final_sample(self) -> Sample:
        loop = self.loop
        try:
            after = self._best_sample()
        except NonFiniteFrames as error:
            if not loop.updates:
                raise
            loop.diverge(error)
            return self._best_sample()
        why = None
        if self.settings.keep == "last" and loop.stopped == "max_steps":
            why = self._divergence(after)
        if why is None:
            return after
        loop.diverge(why)
        return self._best_sample()

    def _best_sample(self) -> Sample:
        noises = self.noise.samples()
        changed = self.loop.updates or self.loop.starts_warm
        some = [(index, noise) for index, noise in enumerate(noises) if index or changed]
        samples = [self.before.sample(noise, index) for index, noise in some]
        if not changed:  # the first one is the video from before
            samples.insert(0, self.before())
        return samples[pick([sample.objective for sample in samples])]

    def _divergence(self, after: Sample) -> str | None:
        """Why the last update diverged, by the video after it; None if it did not."""
        rise = (after.objective - self.before().objective).item()
        flat = self.loop.flatness(frame_contrast(after.video).item())
        if rise > DIVERGED_RISE:
            return f"the few-step video's loss has risen by {rise:.2f}"
        if flat or not rise > SUSPICIOUS_RISE:
            return flat
        self.models.need(*self._at_work)
        return self.loop.last_divergence()

    def _loss(self, sample: Sample) -> float:
        return vqa_objective(sample.losses, self.settings.goal_weight).item()

    def _rewards(self, after: Sample) -> dict[str, Any] | None:
        """The entry `rewards` of run.json."""
        if self.rewards is None:
            return None
        before = self.before()
        assert before.rewards is not None and after.rewards is not None
        return {
            "weights": self.rewards.to_dict(),
            "before": self.rewards.named(before.rewards),
            "after": self.rewards.named(after.rewards),
            "objective_before": before.objective.item(),
            "objective_after": after.objective.item(),
        }

    def output(self, after: Sample, output_type: Literal["pil", "np", "pt"]) -> TeacherPipelineOutput:
        """The result of the instance."""
        loop = self.loop
        assert loop.stopped is not None  # `steps` ends in no other way
        self._remember(after)
        self.seconds["steps"] = sum(row["seconds"] for row in loop.history)
        self.seconds["total"] = time.perf_counter() - self._start
        return TeacherPipelineOutput(
            frames=convert(after.video, output_type),
            prompt=self.instance.prompt,
            queries=self.queries,
            history=loop.history,
            stopped=loop.stopped,
            updates=loop.updates,
            p_yes_after=after.losses.neg().exp().tolist(),
            loss_after=self._loss(after),
            sample=after.index,
            seconds=self.seconds,
            config=self.config,
            models=self.models.models,
            fps=self.reasoner.fps,
            lora=self.lora,
            make_before=partial(self.before.shown, output_type),
            cut_tokens=self.condition.all_cut,
            rewards=self._rewards(after),
            predictions={step: strip.cpu().numpy() for step, strip in loop.predictions.items()},
            memory=self.memory,
            warm_start=loop.warm_start,
            attention=describe(self.settings.attention, self.reasoner.device, self.reasoner.dtype),
        )

    def _timed(self, name: str, shown: bool = True) -> AbstractContextManager[None]:
        return timed(name, self.seconds, self.memory, self.models, shown)


class RecordedSession(Session):
    """A session that is written to a run folder while it goes on, and resumes the run that is there.

    Raises InputError where the folder holds a run of other inputs.
    """

    def __init__(self, models: FrozenModels, instance: Instance, folder: RunFolder) -> None:
        super().__init__(models, instance)
        self.folder = folder
        if folder.record:
            assert instance.queries is not None
            folder.take_up(self._identity(self._preserving(instance.queries)))

    def _identity(self, queries: QuerySet) -> dict[str, Any]:
        """The entries of run.json that make the run what it is, of the models without the LoRA."""
        models = self.models
        teacher = getattr(models.teacher, "model", None)
        return {
            "prompt": self.instance.prompt,
            "config": self.config,
            "models": models.models,
            "queries": queries.to_dict(),
            "fingerprints": {
                "reasoner": state.fingerprint(models.reasoner.networks, models.reasoner.settings),
                "teacher": state.fingerprint({} if teacher is None else {"model": teacher}, models.teacher.style),
                "decoder": state.fingerprint({"decoder": models.decoder}),
            },
        }

    def add_lora(self) -> None:
        if not self.folder.record:
            self._record = self._identity(self.queries)
        super().add_lora()

    def frames_known(self) -> list[int] | None:
        return self.folder.frame_indices(self.instance.size["num_frames"], len(self.instance.frame_indices))

    def begin(self) -> None:
        super().begin()
        if not self.folder.record:
            chosen = self.settings.teacher_frames_by == "change"
            frames = {"teacher_frame_indices": self.instance.frame_indices} if chosen else {}
            self.folder.begin({**self._record, "cut_tokens": self.condition.all_cut, **frames})

    def _begin_loop(self) -> None:
        super()._begin_loop()
        self.folder.load_state(self.loop)
        self._undo.push(self._interrupt)

    def _interrupt(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (KeyboardInterrupt, NonFiniteError, OutOfMemory)) or self.ranks.has_lost(error):
            self.folder.interrupt(self.loop)

    def steps(self) -> Iterator[dict[str, Any]]:
        for row in super().steps():
            self.folder.save_state(self.loop, force=self.loop.stopped is not None)
            yield row

    def _export_lora(self) -> None:
        super()._export_lora()
        self.folder.write_lora(self.lora)

    def output(self, after: Sample, output_type: Literal["pil", "np", "pt"]) -> TeacherPipelineOutput:
        if self.settings.before:
            self.before()
        output = super().output(after, output_type)
        output.finish(self.folder)
        return output


def open_session(
    models: FrozenModels,
    prompt: object,
    images: tuple[ImageInput | None, ...],
    size: tuple[object, ...],
    sampling: tuple[object, ...],
    generator: object,
    queries: object,
    rewards: object,
    keywords: Keywords,
    run_dir: str | os.PathLike[str] | None,
    resume: bool,
) -> Session:
    """The session of a call with these inputs (see `check_inputs`), recorded where there is a run folder.

    Of several ranks, the first one has the folder; inputs that another one has differently raise InputError.
    """
    leave_inference_mode(models.reasoner, models.teacher, models.decoder)
    ranks = models.reasoner.ranks
    with ranks.together():
        folder = None if run_dir is None else RunFolder(run_dir, resume)
    record = ranks.first(folder.record if folder else None)
    with ranks.together():
        instance = check_inputs(models, prompt, images, size, sampling, generator, queries, rewards, keywords, record)
    ranks.check_same(instance.hashes() if ranks.size > 1 else {})
    with ranks.together():
        return RecordedSession(models, instance, folder) if folder else Session(models, instance)
