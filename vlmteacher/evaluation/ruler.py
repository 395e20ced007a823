"""RULER-Bench: a VLM rates each video by the questions of its checklist.

Data, order of the judge's message, form of its answer and arithmetic are those of the published evaluation
(github.com/hexmSeeU/RULER-Bench); the wording of the request is the project's own.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import fsum
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from PIL import Image

from vlmteacher import arguments
from vlmteacher.errors import InputError, Notice
from vlmteacher.evaluation.benchmark import FileBenchmark, Instance, Score, check_splits, means
from vlmteacher.evaluation.judge import KEY, InvalidReply, Judge, at_a_time, user_cache
from vlmteacher.evaluation.methods import Row
from vlmteacher.evaluation.models import cover
from vlmteacher.evaluation.vlm import (
    LOCAL,
    TIMEOUT,
    EndpointError,
    Part,
    check_vlm,
    find_vlm,
    is_local,
    same_model,
    without_thought,
)
from vlmteacher.files import check_text, parse_json, read_text
from vlmteacher.media import read_image, resize, sample_clip
from vlmteacher.reasoners.base import Reasoner

DATA_LIMIT = 2**28  # bytes of data.jsonl; the published one has 1.7 MB
FOLLOWING = "Instruction Following"
DIMENSIONS = (FOLLOWING, "Visual Consistency", "Visual Fidelity", "Rule Coherence")
VISION = "vision rule"  # the category without instruction following
GAME = "game"
CATEGORIES = ("science", GAME, "semantic", "hypothetical", "humanity", VISION)
RATINGS = {"Good": 1.0, "Medium": 0.5, "Poor": 0.0}
FRAMES_PER_SECOND = 2  # of a video that the judge sees
LONGEST_SIDE = 512  # of such a frame
ANSWER = re.compile(r"<answer>\s*\[(.*?)\]\s*</answer>", re.DOTALL)

VERSION = "ruler-1"  # of the request below; a new one makes the replies to the earlier one void
REQUEST = """\
You are an expert in judging videos. A video model made a video for a task, and you rate the video by a list of \
questions. You see in this order, as far as the task has them: the image that the video model started from, its \
prompt, an image of the right result, an explanation of the right result, frames of the video that the video model \
started from, and then frames of the video that you rate, in the order of time.
Rate every question by itself, by what can be seen in the frames:
Good: the video fulfils what is asked, in full.
Medium: it fulfils a part of it, or all of it with small flaws.
Poor: it does not fulfil it, or with large flaws. What a question takes for granted but the video does not show is \
Poor too.
Answer in exactly this form, with one rating for each question, in the order of the questions:
<think>the task in one sentence, what happens in the video, and one short reason for each rating</think>
<answer>["Good", "Poor", "Medium"]</answer>"""


@dataclass(frozen=True)
class Task:
    """One line of data.jsonl, checked.

    Attributes:
        line: its number, from 0.
        name, index: name of the task, and of the video in it.
        checklist: dimensions and questions.
        image, truth, video: the first frame, an image of the right result, and a video to start from.
    """

    line: int
    name: str
    index: str
    category: str
    prompt: str
    explanation: str
    checklist: tuple[tuple[str, str], ...]
    image: Path | None
    truth: Path | None
    video: Path | None

    @property
    def media(self) -> list[Path]:
        return [path for path in (self.image, self.truth, self.video) if path is not None]


# ---------------------------------------------------------------- data


@lru_cache(maxsize=2)
def read_tasks(data: Path) -> list[Task]:
    """Read the data set's folder. Raises InputError for another layout, and for a line that cannot be used."""
    file = data / "data.jsonl"
    if not file.is_file():
        raise InputError(f"{data} has no data.jsonl: give the folder of a whole copy of the data set of RULER-Bench")
    tasks: dict[tuple[str, str], Task] = {}
    lines = read_text(file, "data", DATA_LIMIT).splitlines()
    for number, line in enumerate(lines):
        if line.strip():
            task = _task(parse_json(line, f"{file}, line {number + 1}"), number, data)
            tasks.setdefault((task.name, task.index), task)  # one video stands for both, as in the published evaluation
    if not tasks:
        raise InputError(f"{file} is empty: give the folder of a whole copy of the data set of RULER-Bench")
    return list(tasks.values())


def _task(row: Any, number: int, data: Path) -> Task:
    where = f"{data / 'data.jsonl'}, line {number + 1}"
    if not isinstance(row, dict):
        raise InputError(f"{where} is no JSON object")
    missing = [name for name in ("prompt", "index", "checklist", "task_name", "category") if name not in row]
    if missing:
        raise InputError(f"{where} has no {' and no '.join(missing)}: is it the data of RULER-Bench?")
    prompt, category = row["prompt"], row["category"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{where}: the prompt is empty")
    if category not in CATEGORIES:
        raise InputError(f"{where}: unknown category {arguments.show(category)}: choose from {', '.join(CATEGORIES)}")
    return Task(
        number,
        _file_name(row["task_name"], f"{where}: task_name"),
        _file_name(row["index"], f"{where}: index"),
        category,
        prompt,
        str(row.get("implicit_explanation") or ""),
        _checklist(row["checklist"], where),
        *(_media(row.get(f"{name}_path"), data, where) for name in ("input_image", "gt_image", "input_video")),
    )


def _file_name(value: Any, label: str) -> str:
    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w .-]{0,99}", name):
        raise InputError(f"{label} {arguments.show(value)} cannot be part of a file's name")
    return name


def _checklist(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    """Dimensions and questions, from a list of ``{dimension: question}`` or a text of one, in JSON or Python."""
    if isinstance(value, str):
        try:
            value = parse_json(value, f"{where}: checklist")
        except InputError:
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise InputError(f"{where}: the checklist is no list of dimensions and questions") from error
    questions = []
    for entry in value if isinstance(value, list) and value else [None]:
        pair = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (None, None)
        if pair[0] not in DIMENSIONS or not isinstance(pair[1], str) or not pair[1].strip():
            raise InputError(
                f"{where}: {arguments.show(entry)} is no question of a checklist: give {{dimension: question}}, of the"
                f" dimensions {', '.join(DIMENSIONS)}"
            )
        questions.append((str(pair[0]), check_text(pair[1], f"{where}: checklist")))
    return tuple(questions)


def _media(value: Any, data: Path, where: str) -> Path | None:
    if not value:
        return None
    path, shown = data / str(value), arguments.show(value)
    if not path.resolve().is_relative_to(data.resolve()):
        raise InputError(f"{where}: {shown} is outside of {data}")
    if not os.path.isfile(path):  # False for a name that is too long
        raise InputError(f"{where}: {shown} does not exist in {data}: download the data set whole")
    return path


def fingerprint(tasks: Sequence[Task], data: Path) -> str:
    """Return a hash of data.jsonl, and of the names and sizes of the media."""
    digest = hashlib.sha256((data / "data.jsonl").read_bytes())
    for task in tasks:
        for path in task.media:
            digest.update(f"{path.relative_to(data)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- the judge's message


def message(task: Task, video: Path) -> list[Part]:
    """Return texts and images for the judge about a video. Raises InputError for a video that cannot be read."""
    parts: list[Part] = []
    if task.image is not None:
        parts += ["The image that the video model started from:", read_image(task.image, "input image")]
    parts.append(f"The prompt of the video model:\n{task.prompt}")
    if task.truth is not None:
        parts += ["An image of the right result:", read_image(task.truth, "ground-truth image")]
    if task.explanation:
        parts.append(f"The right result, explained:\n{task.explanation}")
    if task.video is not None:
        parts += ["Frames of the video that the video model started from:", *_frames(task.video, "input video")]
    parts += ["Frames of the video that you rate:", *_frames(video, "video")]
    questions = (f"{number}. {question}" for number, (_, question) in enumerate(task.checklist, 1))
    parts.append("\n".join(["The questions:", *questions]))
    return parts


def _frames(video: Path, name: str) -> list[Image.Image]:
    frames = sample_clip(video, FRAMES_PER_SECOND, name)
    scale = min(1.0, LONGEST_SIDE / max(frames[0].size))
    width, height = (max(1, int(side * scale)) for side in frames[0].size)
    return [resize(frame, height, width) for frame in frames]


def parse_ratings(questions: int) -> Callable[[str], list[str]]:
    """Return the function that reads the ratings of so many questions in a judge's reply.

    It raises ValueError, with the reason, for a reply of another form or number, and for any other word.
    """

    def parse(reply: str) -> list[str]:
        answers = ANSWER.findall(without_thought(reply))
        if not answers:
            raise ValueError("it has no <answer>[...]</answer> after its thoughts")
        ratings = [word.strip().strip("\"'") for word in answers[-1].split(",")]
        if wrong := [word for word in ratings if word not in RATINGS]:
            raise ValueError(f"{wrong[0][:40]!r} is none of {', '.join(RATINGS)}")
        if len(ratings) != questions:
            raise ValueError(f"it has {len(ratings)} ratings for {questions} questions")
        return ratings

    return parse


# ---------------------------------------------------------------- arithmetic


def dimensions_of(category: str) -> tuple[str, ...]:
    return DIMENSIONS[1:] if category == VISION else DIMENSIONS


def rate(task: Task, ratings: Sequence[str]) -> dict[str, float]:
    """Return the mean rating of each dimension, in [0, 1]; a dimension without questions counts 0."""
    points: dict[str, list[float]] = {name: [] for name in dimensions_of(task.category)}
    for (dimension, _), rating in zip(task.checklist, ratings, strict=True):
        if dimension in points:
            points[dimension].append(RATINGS[rating])
    return {name: fmean(values) if values else 0.0 for name, values in points.items()}


def overall_terms(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Return the three overall scores, from 0 to 100, as sums of one term for each rated row.

    overall: the mean of the dimensions, each of which is the mean of the categories that have it (the published
    evaluation's). category_mean: of the categories, each the mean of its dimensions. task_mean: of the tasks, each the
    mean of its videos.
    """
    category, task = (Counter(row[kind] for row in rows) for kind in ("category", "task"))
    having = Counter(name for each in category for name in dimensions_of(each))
    shares = [sum(value / having[name] for name, value in row["subscores"].items()) / len(having) for row in rows]
    return {
        "overall": [100 * share / category[row["category"]] for share, row in zip(shares, rows, strict=True)],
        "task_mean": [100 * row["score"] / (len(task) * task[row["task"]]) for row in rows],
        "category_mean": [100 * row["score"] / (len(category) * category[row["category"]]) for row in rows],
    }


def arithmetic(rows: Sequence[Row]) -> Row:
    """Return the three overall scores of rated rows, None without rows, and those of dimensions and categories."""
    categories: dict[str, Row] = {}
    for name in CATEGORIES:
        if group := [row for row in rows if row["category"] == name]:
            scores = {each: 100 * fmean(row["subscores"][each] for row in group) for each in dimensions_of(name)}
            categories[name] = {**scores, "average": fmean(scores.values()), "n": len(group)}
    having = {name: [scores[name] for scores in categories.values() if name in scores] for name in DIMENSIONS}
    return {
        **{name: fsum(terms) if rows else None for name, terms in overall_terms(rows).items()},
        "dimensions": {name: fmean(values) for name, values in having.items() if values},
        "categories": categories,
    }


# ---------------------------------------------------------------- the benchmark


@dataclass(frozen=True, kw_only=True)
class Bench(FileBenchmark):
    """RULER-Bench on a copy of its data, rated by any VLM.

    The split ``main`` has the five categories that the method's paper reports, ``game`` the sixth. Videos get the
    proportions of the first frame and about as many pixels as the Reasoner's own. The Reasoner gets prompt and first
    frame; a video to start from is shown to the judge alone.

    Attributes:
        data: folder with data.jsonl and the media that it names.
        judge: the model's name at an endpoint, or ``local:`` and a directory or hub id.
        judge_url: the endpoint, compatible with OpenAI's.
        judge_cache: folder of replies; None: vlmteacher/judge in the user's folder of caches.
        judge_timeout: seconds of one attempt at a request.
        judge_requests: number of requests to an endpoint at a time.

    Raises InputError: a data folder, a judge or a URL that cannot be used; MissingExtra.
    """

    name: ClassVar[str] = "ruler"
    splits: ClassVar[tuple[str, ...]] = ("main", GAME)
    test_splits: ClassVar[tuple[str, ...]] = ("main",)
    scale: ClassVar[float] = 100
    data: str = ""
    judge: str = ""
    judge_url: str | None = None
    judge_cache: str | None = None
    judge_timeout: float = TIMEOUT
    judge_requests: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise InputError("bench ruler needs --data DIR, a copy of the data set of RULER-Bench")
        if not self.judge:
            raise InputError(f"bench ruler needs --judge MODEL and its --judge-url URL, or --judge {LOCAL}DIR")
        check_vlm(self.judge, self.judge_url, "--judge", KEY)
        for name, value in (("timeout", self.judge_timeout), ("requests", self.judge_requests)):
            if not value > 0:
                raise InputError(f"--judge-{name} must be greater than 0, not {value}")
        read_tasks(self._data)
        if same_model(self.judge, self.teacher_source()):
            warnings.warn(f"--judge {self.judge} is the Teacher too: it rates what was optimised for it", Notice, 2)

    def instances(self, splits: Sequence[str], limit: int, noises: int) -> list[Instance]:
        """See `Benchmark.instances`. The tasks of a split take turns, so that few instances are of many tasks."""
        check_splits(splits, self.splits)
        chosen = []
        for split in splits:
            turns: Counter[str] = Counter()
            here = []
            for task in read_tasks(self._data):
                if (task.category == GAME) == (split == GAME):
                    here.append((turns[task.name], task))
                    turns[task.name] += 1
            chosen += [(split, task) for _, task in sorted(here, key=lambda pair: pair[0])[:limit]]
        return [
            Instance(f"{task.name}/{task.index}", split, task.line, k, task.name, task.category)
            for k in range(noises)
            for split, task in chosen
        ]

    def load(self, instance: Instance) -> tuple[str, Image.Image | None]:
        task = self._task(instance)
        return task.prompt, None if task.image is None else read_image(task.image, "input image")

    def fit(self, image: Image.Image | None, reasoner: Reasoner) -> tuple[Image.Image | None, tuple[int, int]]:
        return cover(image, reasoner)

    def path(self, instance: Instance) -> str:
        return f"{instance.id}.mp4"

    def final_frame(self, instance: Instance) -> Image.Image | None:
        truth = self._task(instance).truth
        return None if truth is None else read_image(truth, "ground-truth image")

    def described(self) -> dict[str, Any]:
        judging = ("judge", "judge_url", "judge_cache", "judge_timeout", "judge_requests")
        given = {name: value for name, value in super().described().items() if name not in judging}
        return given | {"data": fingerprint(read_tasks(self._data), self._data)}  # the folder may be moved

    def scorer(self) -> dict[str, Any]:
        url = {} if self.judge_url is None else {"judge_url": self.judge_url}
        return {"judge": self.judge, **url, "version": VERSION}

    def score_files(self, videos: Mapping[Instance, Path]) -> Iterator[tuple[Instance, Score]]:
        vlm = find_vlm(self.judge, self.judge_url, KEY, "judge", self.judge_timeout)
        cache = Path(self.judge_cache) if self.judge_cache else user_cache() / "judge"
        judge = Judge(vlm, cache, VERSION)

        def score(instance: Instance) -> Score:
            task = self._task(instance)
            try:
                content = message(task, videos[instance])
            except InputError as error:
                return Score(None, None, error=str(error))
            try:
                ratings = judge.ask(REQUEST, content, parse_ratings(len(task.checklist)))
            except (EndpointError, InvalidReply) as error:
                return Score(None, None, error=str(error))
            subscores = rate(task, ratings)
            return Score(None, fmean(subscores.values()), subscores, details={"ratings": ratings})

        yield from at_a_time(score, list(videos), 1 if is_local(self.judge) else self.judge_requests)

    def summarize(self, rows: Sequence[Row], missing: Sequence[Instance] = ()) -> dict[str, Any]:
        """Return the judge's name, the published arithmetic and two others over rated rows, in all and by split.

        `score` is `overall` in [0, 1]. Instances without a rating are not counted as Poor: `excluded` is their number.
        """

        def summary(rows: Sequence[Row]) -> Row:
            values = arithmetic(rows)
            score = None if values["overall"] is None else values["overall"] / 100
            return {"n": len(rows), "success_rate": None, "score": score, **values}

        tasks = dict.fromkeys(row["task"] for row in rows)
        return {
            "judge": self.judge,
            **summary(rows),
            "excluded": len(missing),
            "splits": {name: summary([row for row in rows if row["split"] == name]) for name in self.splits},
            "tasks": {name: means([row for row in rows if row["task"] == name]) for name in tasks},
        }

    def terms(self, scenes: Sequence[Row]) -> dict[str, list[float]]:
        return overall_terms(scenes)

    def caption(self) -> str:
        return f"RULER-Bench, rated by {self.judge}."

    def lines(self, results: Mapping[str, Any]) -> list[str]:
        """Return the judge's name, a table by category and dimension, and the three overall scores."""
        short = ["".join(word[0] for word in name.split()) for name in DIMENSIONS]
        lines = [f"{self.caption()} From 0 to 100:", f"{'category':14} {'n':>4} {'   '.join(short)}   mean"]
        every = {**results["dimensions"], "average": results["overall"], "n": results["n"]}
        for name, row in {**results["categories"], "all": every}.items():
            cells = [row.get(column) for column in (*DIMENSIONS, "average")]
            shown = " ".join("   -" if cell is None else f"{cell:4.1f}" for cell in cells)
            lines.append(f"{name:14} {row['n']:4} {shown}")
        for name, row in {**results["splits"], "all": results}.items():
            if row["n"]:
                lines.append(
                    f"{name}: mean of the dimensions {row['overall']:.1f} (the published evaluation's), of the tasks"
                    f" {row['task_mean']:.1f}, of the categories {row['category_mean']:.1f}"
                )
        return [*lines, f"{results['excluded']} videos are not rated and count as nothing"]

    @property
    def _data(self) -> Path:
        return Path(self.data)

    def _task(self, instance: Instance) -> Task:
        return next(task for task in read_tasks(self._data) if task.line == instance.index)
