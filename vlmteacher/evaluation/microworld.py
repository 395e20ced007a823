"""The microworld as a benchmark: held-out instances, the packaged pair, the rule scorer as judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image
from torch import Tensor

from vlmteacher.evaluation.benchmark import Benchmark, Instance, Score
from vlmteacher.evaluation.benchmark import noise_seed as noise_seed
from vlmteacher.evaluation.methods import Method
from vlmteacher.evaluation.models import Models
from vlmteacher.evaluation.sweep import run_method
from vlmteacher.microworld import world
from vlmteacher.microworld.labeller import label
from vlmteacher.microworld.questions import truths
from vlmteacher.microworld.scorer import Verdict, score
from vlmteacher.microworld.world import first_frame as first_frame
from vlmteacher.queries import QuerySet
from vlmteacher.reasoners.base import Reasoner

if TYPE_CHECKING:
    from vlmteacher.pipeline import TeacherPipeline


@dataclass(frozen=True, kw_only=True)
class Bench(Benchmark):
    """The held-out splits of the microworld.

    Attributes:
        families: alternate from instance to instance.
        seed: draws the splits and the noises; 1 draws the frozen splits (``microworld/splits.json``).

    Raises InputError: an unknown family.
    """

    name: ClassVar[str] = "microworld"
    splits: ClassVar[tuple[str, ...]] = ("id", "ood", "validation")
    default_splits: ClassVar[tuple[str, ...]] = ("id",)
    test_splits: ClassVar[tuple[str, ...]] = ("id", "ood")
    tuning_splits: ClassVar[tuple[str, ...]] = ("validation",)
    controls: ClassVar[tuple[str, ...]] = ("static", "final-frame")
    within_tasks: ClassVar[bool] = False
    frames: ClassVar[int] = world.NUM_FRAMES
    fps: ClassVar[float] = world.FPS
    families: tuple[str, ...] = world.FAMILIES

    def __post_init__(self) -> None:
        super().__post_init__()
        world.check("id", self.families)

    def instances(self, splits: Sequence[str], limit: int, noises: int) -> list[Instance]:
        for split in splits:
            world.check(split, self.families)
        tasks = [self.families[index % len(self.families)] for index in range(limit)]
        return [
            Instance(f"{task}/{self.seed}/{index:04d}", split, index, k, task)
            for k in range(noises)
            for split in splits
            for index, task in enumerate(tasks)
        ]

    def load(self, instance: Instance) -> tuple[str, Image.Image]:
        scene, prompt = self._scene(instance)
        return prompt, first_frame(scene)

    def score(self, instance: Instance, video: Tensor) -> Score:
        return Score(**asdict(judge(video, self._scene(instance)[0])))

    def answers(self, instance: Instance, video: Tensor, queries: QuerySet) -> list[Any]:
        scene, _ = self._scene(instance)
        return [list(truth) for truth in truths(scene, label(_pixels(video), scene), queries)]

    def final_frame(self, instance: Instance) -> Image.Image:
        return Image.fromarray((world.render(self._scene(instance)[0])[-1] * 255).round().astype("uint8"))

    def described(self) -> dict[str, Any]:
        given = super().described()
        return {name: given.pop(name) for name in ("seed", "families") if name in given} | given

    def caption(self) -> str:
        return f"The microworld, seed {self.seed}, judged by its rule scorer."

    def load_models(self, method: Method) -> TeacherPipeline:
        pipe = super().load_models(method)
        _check_words(pipe, self.families)
        return pipe

    def _scene(self, instance: Instance) -> tuple[world.Scene, str]:
        return world.instance(instance.index, self.seed, instance.split, self.families)


def run_benchmark(
    method: str,
    limit: int,
    seed: int,
    out: Path,
    workers: int | None = None,
    resume: bool = False,
    pair: str | None = None,
    lora_blocks: str | None = None,
    split: str = "id",
    chosen: Sequence[str] = world.FAMILIES,
    noises: int = 1,
    trace: bool = False,
    many_step: str | None = None,
) -> dict[str, Any]:
    """Run a method on one split of the microworld (see `sweep.run_method`); other arguments: see `Bench`."""
    models = Models(settings=() if lora_blocks is None else (("lora_blocks", lora_blocks),))
    bench = Bench(seed=seed, families=tuple(chosen), pair=pair, many_step=many_step, trace=trace, models=models)
    return run_method(method, bench, [split], limit, noises, out, workers, resume)


@lru_cache(maxsize=2)
def _check_words(pipe: TeacherPipeline, families: tuple[str, ...]) -> None:
    """Raise InputError if the Teacher was trained on the world's words alone and lacks some of the families'."""
    from vlmteacher.microworld.tokenizer import check_words
    from vlmteacher.teachers.vlm import VLMTeacher

    if pipe.teacher.style.own_wording and isinstance(pipe.teacher, VLMTeacher):
        check_words(pipe.teacher.tokenizer, families)


def judge(video: Tensor, scene: world.Scene) -> Verdict:
    """Return the rule scorer's verdict on a video (F, 3, H, W) in [0, 1]."""
    return score(_pixels(video), scene)


def _pixels(video: Tensor) -> np.ndarray:
    return video.permute(0, 2, 3, 1).float().cpu().numpy()


def right_latents(reasoner: Reasoner, scene: world.Scene) -> Tensor:
    """Encode the scene's right video with the Reasoner's VAE: latents (1, C, T, h, w)."""
    return reasoner.encode_video((world.render(scene) * 255).round().astype("uint8"))
