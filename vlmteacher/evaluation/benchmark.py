"""What a benchmark is: its instances, how one of them is loaded and scored, and the models that solve it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image
from torch import Tensor

from vlmteacher.baselines.prompt_rewrite import Rewriter
from vlmteacher.errors import InputError
from vlmteacher.evaluation.failures import explain
from vlmteacher.evaluation.methods import Method, Row, check_teacher
from vlmteacher.evaluation.models import Models, load, use_lora
from vlmteacher.evaluation.vlm import check_vlm, find_vlm
from vlmteacher.files import read_json
from vlmteacher.media import fit_image
from vlmteacher.queries import QuerySet

if TYPE_CHECKING:
    from vlmteacher.pipeline import TeacherPipeline
    from vlmteacher.reasoners.base import Reasoner

VLM_KEY = "VLMTEACHER_VLM_KEY"  # environment variable
Key = tuple[str, int, int]
"""Split, index and noise: one instance of a benchmark."""


@dataclass(frozen=True)
class Instance:
    """One scene of a split and one noise, the same for every method, so that methods can be compared in pairs.

    Attributes:
        id: name of the scene in the benchmark.
        split, index: the scene; `index` counts within the split.
        noise: number of the noise.
        task: kind of the task.
        category: group of tasks; "" in a benchmark without groups.
        meta: further data that `Benchmark.load` and `Benchmark.score` need.
    """

    id: str
    split: str
    index: int
    noise: int
    task: str
    category: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def key(self) -> Key:
        return self.split, self.index, self.noise

    def entries(self) -> Row:
        """Return the entries of a row that name the instance."""
        category = {"category": self.category} if self.category else {}
        return {"split": self.split, "index": self.index, "noise": self.noise, "task": self.task, **category}


def key_of(row: Row) -> Key:
    """Return the key of the instance of a row."""
    return row["split"], row["index"], row["noise"]


@dataclass(frozen=True)
class Score:
    """The independent verdict on a video.

    Attributes:
        success: None in a benchmark that only has scores.
        score: in [0, 1]; None: the scorer has not judged, for a reason that is not the video's (`error`).
        subscores: the parts of the score by name.
        error: what the scorer says against the video; the benchmark's own rule then sets the score.
        category: the scorer's name for the group of the task, where the data have none.
        details: further entries of the row.
    """

    success: bool | None
    score: float | None
    subscores: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    category: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def entries(self) -> Row:
        """Return the entries of a row."""
        more = {name: value for name in ("error", "category") if (value := getattr(self, name))}
        scores = {"success": self.success, "score": self.score, "subscores": dict(self.subscores)}
        return {**scores, **self.details, **more}


@dataclass(frozen=True, kw_only=True)
class Benchmark(ABC):
    """A benchmark with what its results depend on beside method and instance.

    A subclass adds its own fields; a flag of ``vlmteacher bench`` sets the field of its name. Worker processes get
    copies by pickle, so large data belongs in files that `load` and `score` read.

    Attributes:
        name: on the command line and in results.json.
        splits: names of all splits.
        seed: draws the noises.
        pair: directory of a pair; None: the packaged one.
        many_step: the Reasoner before its few-step distillation: hub id, directory, or directory of its transformer
            alone, which is then sampled in `MANY_STEPS` steps; None: the one named by pair.json.
        models: instead of the pair's.
        vlm, vlm_url: rewrites prompts in the Teacher's place: a model's name and its endpoint, or ``local:`` and a
            directory or hub id.
        trace: see `methods.run`.
        default_splits: where none is chosen; () for all.
        default_limit: scenes of each split, where no number is chosen.
        test_splits, tuning_splits: of tables, to test methods on (() for all) and to choose settings on (() for none).
        controls: methods that the paper's tables have too, to show how much the scorer gives to videos of one picture.
        within_tasks: whether intervals resample the scenes within each task; otherwise they resample all scenes.
        scale: of the scores in a table; rows have them in [0, 1].
        frames, fps: of a video of the controls, which load no model.
    """

    name: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]
    default_splits: ClassVar[tuple[str, ...]] = ()
    default_limit: ClassVar[int] = 100
    test_splits: ClassVar[tuple[str, ...]] = ()
    tuning_splits: ClassVar[tuple[str, ...]] = ()
    controls: ClassVar[tuple[str, ...]] = ()
    within_tasks: ClassVar[bool] = True
    scale: ClassVar[float] = 1
    frames: ClassVar[int] = 89
    fps: ClassVar[float] = 24.0
    seed: int = 1
    pair: str | None = None
    many_step: str | None = None
    models: Models = field(default_factory=Models)
    vlm: str | None = None
    vlm_url: str | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        if self.vlm is not None:
            check_vlm(self.vlm, self.vlm_url, "--vlm", VLM_KEY)
        elif self.vlm_url is not None:
            raise InputError(f"--vlm-url {self.vlm_url} needs --vlm MODEL, a name of a model there")

    @abstractmethod
    def instances(self, splits: Sequence[str], limit: int, noises: int) -> list[Instance]:
        """Return the first `limit` scenes of each split with `noises` noises each; all scenes once before any twice.

        Raises InputError: an unknown split.
        """

    @abstractmethod
    def load(self, instance: Instance) -> tuple[str, Image.Image | None]:
        """Return the prompt and the first frame, if there is one."""

    def fit(self, image: Image.Image | None, reasoner: Reasoner) -> tuple[Image.Image | None, tuple[int, int]]:
        """Return the first frame as the Reasoner gets it, and height and width of the video: the Reasoner's own."""
        way = self.models.keywords.get("fit")
        if image is not None and way is not None:  # some methods sample without a call of the pipeline, which fits it
            image = fit_image(image, reasoner.height, reasoner.width, fit=way)
        return image, (reasoner.height, reasoner.width)

    @abstractmethod
    def score(self, instance: Instance, video: Tensor) -> Score:
        """Judge a video (F, 3, H, W) in [0, 1]."""

    def path(self, instance: Instance) -> str:
        """Return the path of an instance's video in a folder of one noise's videos, with "/" and its suffix."""
        return f"{instance.split}/{instance.task}/{instance.index:05d}.mp4"

    def final_frame(self, instance: Instance) -> Image.Image | None:
        """Return the last frame of the right video; None: it is not known."""
        return None

    def answers(self, instance: Instance, video: Tensor, queries: QuerySet) -> list[Any] | None:
        """Return the true answer to each query about a video, see `failures.explain`; None: they are not known."""
        return None

    def noise_seed(self, instance: Instance) -> int:
        return noise_seed(instance.index, self.seed, instance.noise)

    def described(self) -> dict[str, Any]:
        """Return what the results depend on as plain data for JSON: a sweep is only resumed with the same.

        A benchmark with files adds a fingerprint of its data.
        """
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "models"}
        given = {name: value for name, value in values.items() if value not in (None, False)}
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in given.items()
        } | self.models.described()

    def summarize(self, rows: Sequence[Row], missing: Sequence[Instance] = ()) -> dict[str, Any]:
        """Return means over rows, in all and for each split and task, and the causes of failures.

        missing: the instances without a row, for a benchmark that counts them.
        """
        tasks = dict.fromkeys(row["task"] for row in rows)
        return {
            **means(rows),
            "splits": {name: means([row for row in rows if row["split"] == name]) for name in self.splits},
            "tasks": {name: means([row for row in rows if row["task"] == name]) for name in tasks},
            **explain(rows),
        }

    def terms(self, scenes: Sequence[Row]) -> dict[str, list[float]]:
        """Return the overall scores by their names, the one of the paper first; none where the mean score is all.

        scenes: rows, one for each scene. Each score is the sum of its terms, one for each row, which have the same
        weight within a task.
        """
        return {}

    def caption(self) -> str:
        """Return what the caption of a table says about the benchmark, its scorer above all."""
        return self.name

    def printed_as(self) -> str:
        """Return the name under which the paper's figures are kept (see `paper`)."""
        return self.name

    def lines(self, results: Mapping[str, Any]) -> list[str]:
        """Return results.json as lines of text: a table by split."""
        lines = [f"{'split':10} {'n':>5} {'success':>8} {'score':>6}"]
        for name, row in {**results.get("splits", {}), "all": results}.items():
            if row["n"]:
                success = "-" if row["success_rate"] is None else f"{row['success_rate']:.2f}"
                lines.append(f"{name:10} {row['n']:5} {success:>8} {row['score']:6.3f}")
        return lines

    # ------------------------------------------------------------ models

    def check(self, method: Method) -> None:
        """Raise InputError if a method cannot be run with these settings."""
        if method.control:
            return
        if self.vlm is None:
            check_teacher(method, self.pair, self.models.teacher)
        self._check_lora(method)
        if method.many_step:
            self.find_many_step()
        blocks = self.models.keywords.get("lora_blocks")
        if blocks is not None:
            from vlmteacher.pipeline import read_pair
            from vlmteacher.settings import parse_blocks

            if method.name != "teacher":
                raise InputError(f"lora_blocks {blocks} is of the method teacher, not of {method.name}")
            if self.models.reasoner is not None:
                return
            directory, description = read_pair(self.pair)
            config = read_json(directory / description["reasoner"] / "transformer" / "config.json", "config")
            if parse_blocks(blocks) > config["num_layers"]:
                raise InputError(f"lora_blocks {blocks}: the transformer has {config['num_layers']} blocks")

    def _check_lora(self, method: Method) -> None:
        if self.models.lora is not None and method.lora != "lora":
            raise InputError(f"--lora {self.models.lora} is of the method base, not of {method.name}")
        if method.lora in ("post_lora", "grpo_lora") and getattr(self.models, method.lora) is None:
            kind = method.lora.removesuffix("_lora")
            raise InputError(f"method {method.name!r} needs --{kind}-lora FILE, which `vlmteacher train {kind}` makes")

    def find_many_step(self) -> str:
        """Return where the Reasoner before its few-step distillation is. Raises InputError if it is not given."""
        from vlmteacher.pipeline import read_pair

        if self.many_step is not None:
            return self.many_step
        directory, description = read_pair(self.pair)
        if self.models.reasoner is not None or "many_step" not in description:
            raise InputError("method 'many-step' needs --many-step ID: the pair has no Reasoner without distillation")
        return str(directory / description["many_step"])

    def teacher_source(self) -> str:
        """Return the directory or hub id of the Teacher."""
        from vlmteacher.pipeline import read_pair

        if self.models.teacher is not None:
            return self.models.teacher
        directory, description = read_pair(self.pair)
        return str(directory / description["teacher"])

    def rewriter(self) -> Rewriter | None:
        """Return what writes prompts in the Teacher's place; None: the Teacher does."""
        return None if self.vlm is None else find_vlm(self.vlm, self.vlm_url, VLM_KEY, "VLM").answer

    def load_models(self, method: Method) -> TeacherPipeline:
        """Return the models that a method runs with; each process loads them once."""
        pipe = load(self.models, self.pair, self.find_many_step() if method.many_step else None)
        use_lora(pipe, getattr(self.models, method.lora) if method.lora else None, self.models.lora_partial)
        return pipe


@dataclass(frozen=True, kw_only=True)
class FileBenchmark(Benchmark):
    """A benchmark whose scorer reads video files. All videos are generated first; then they are judged.

    Judging is resumed apart from generating, and can be done anew without it. A subclass says where the scorer looks
    for a video (`path`) and judges the files.
    """

    default_limit: ClassVar[int] = 10**6

    @abstractmethod
    def score_files(self, videos: Mapping[Instance, Path]) -> Iterator[tuple[Instance, Score]]:
        """Judge videos, in any order; each verdict is written to the disk before the next one is asked for.

        The videos are of different `path`: one noise of each scene. An instance that is left out counts as not judged.
        Raises InputError where the scorer itself does not work: no verdict is made of that.
        """

    def scorer(self) -> dict[str, Any]:
        """Return what the verdicts depend on as plain data for JSON, a fingerprint among it."""
        return {}

    def score(self, instance: Instance, video: Tensor) -> Score:
        raise TypeError(f"{self.name} is scored from files")

    def check(self, method: Method) -> None:
        if self.trace:
            raise InputError(f"--trace scores the video of every step; {self.name} scores finished files only")
        super().check(method)


def check_splits(splits: Sequence[str], known: Sequence[str]) -> None:
    """Raise InputError for a split that is none of a benchmark's."""
    if unknown := [name for name in splits if name not in known]:
        raise InputError(f"unknown split {unknown[0]!r}: choose from {', '.join(known)}")


def mean(rows: Sequence[Row], entry: str) -> float | None:
    """Return the mean of an entry; None without rows, or where a row has no value."""
    values: list[Any] = [row.get(entry) for row in rows]
    return None if not values or None in values else fmean(values)


def means(rows: Sequence[Row]) -> Row:
    """Return the number of rows and their mean success and score."""
    return {"n": len(rows), "success_rate": mean(rows, "success"), "score": mean(rows, "score")}


def cost_means(rows: Sequence[Row]) -> Row:
    """Return the mean cost of rows (see `Cost`); None where a row of an earlier release has no calls."""
    return {f"{entry}_mean": mean(rows, entry) for entry in ("seconds", "generator_calls", "vlm_calls")}


def noise_seed(index: int, seed: int, noise: int = 0) -> int:
    """Return the seed of the `noise`-th noise of the `index`-th instance that `seed` draws."""
    return 100_000 * seed + 100 * index + 10**9 * noise
