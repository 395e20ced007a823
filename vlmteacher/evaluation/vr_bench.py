"""VR-Bench: mazes, whose paths its own kit tracks in the videos and compares with the right ones.

Data and kit are public (MIT). The kit is cloned by the user; it writes the prompts, from the descriptions of the skins,
and judges by ``evaluation/videomodel_eval/batch_evaluate.py``, without any model.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from PIL import Image

from vlmteacher.errors import InputError
from vlmteacher.evaluation.benchmark import Instance, Score
from vlmteacher.evaluation.kit import Kit, KitBenchmark, hash_files
from vlmteacher.evaluation.methods import Row
from vlmteacher.files import read_text
from vlmteacher.media import read_clip, read_image

SPLITS = ("eval", "train")
DIFFICULTIES = ("easy", "medium", "hard")
METRICS = ("pr", "sr", "em", "mf")
"""Precision of the path, whether the goal is reached, exact match, fidelity of the maze; each in [0, 1].

``sd`` beside them is by how much the path is longer than the right one, where the goal is reached.
"""
LAYOUT = "eval or train, then GAME/SKIN/easy|medium|hard/{images, states, videos}/DIFFICULTY_NUMBER..."
NUMBER = re.compile(r"(easy|medium|hard)_[A-Za-z0-9]+")
RESULTS_LIMIT = 2**28  # bytes of the kit's results
PROMPT = "import sys; from prompts import get_dynamic_prompt; print(get_dynamic_prompt(*sys.argv[1:]))"


@dataclass(frozen=True, kw_only=True)
class Bench(KitBenchmark):
    """The mazes of a data folder: the first one of every game, skin and difficulty, then the second ones.

    Attributes:
        path_tracker: of the kit: ncc, csrt or optical_flow.
        path_tolerance: see the flag.

    Raises InputError: another layout of the data, which names what was looked for.
    """

    name: ClassVar[str] = "vr-bench"
    splits: ClassVar[tuple[str, ...]] = SPLITS
    default_splits: ClassVar[tuple[str, ...]] = ("eval",)
    test_splits: ClassVar[tuple[str, ...]] = ("eval",)
    tuning_splits: ClassVar[tuple[str, ...]] = ("train",)
    layout: ClassVar[str] = LAYOUT
    path_tracker: str = "ncc"
    path_tolerance: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.path_tolerance < 1:
            raise InputError(f"--path-tolerance must be greater than 0 and less than 1, not {self.path_tolerance}")
        if not any((self.root / split).is_dir() for split in SPLITS):
            raise InputError(f"--data {self.data} is not VR-Bench's layout: looked for {LAYOUT}")

    @property
    def kit(self) -> Kit:
        script = "evaluation/videomodel_eval/batch_evaluate.py"
        return Kit("VR-Bench", self.evalkit or "", script, self.evalkit_python)

    def caption(self) -> str:
        return f"VR-Bench, scored by {Path(self.kit.script).name} of its kit, tracker {self.path_tracker}."

    def scenes(self, split: str) -> Iterator[Instance]:
        mazes: list[tuple[int, tuple[str, str, str, str]]] = []
        for folder in sorted((self.root / split).glob("*/*/*/images")):
            game, skin, difficulty = folder.parts[-4:-1]
            for rank, image in enumerate(sorted(folder.glob("*.png"))):
                stem, parent = image.stem, folder.parent
                if not NUMBER.fullmatch(stem) or not stem.startswith(f"{difficulty}_"):
                    raise InputError(f"{image} is not named {difficulty}_NUMBER.png, which the kit needs")
                if not (parent / "states" / f"{stem}.json").is_file():
                    raise InputError(f"{parent} has no states/{stem}.json: looked for {LAYOUT}")
                if not right_videos(parent, stem):
                    raise InputError(f"{parent} has no videos/{stem}.mp4 or {stem}_0.mp4: looked for {LAYOUT}")
                mazes.append((rank, (game, skin, difficulty, stem)))
        for index, (_, (game, skin, difficulty, stem)) in enumerate(sorted(mazes)):
            meta = {"skin": skin, "stem": stem}
            yield Instance(f"{split}/{game}/{skin}/{stem}", split, index, 0, game, difficulty, meta)

    def load(self, instance: Instance) -> tuple[str, Image.Image]:
        image = self._folder(instance) / "images" / f"{instance.meta['stem']}.png"
        return prompt(self.kit, instance.task, instance.meta["skin"]), read_image(image)

    def final_frame(self, instance: Instance) -> Image.Image:
        import imageio_ffmpeg

        path = right_videos(self._folder(instance), instance.meta["stem"])[0]
        count, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
        return Image.fromarray(read_clip(path, count)[-1])

    def _folder(self, instance: Instance) -> Path:
        return self.root / instance.split / instance.task / instance.meta["skin"] / instance.category

    def path(self, instance: Instance) -> str:
        return f"{instance.split}/{instance.task}/{instance.meta['skin']}/{instance.meta['stem']}.mp4"

    def described(self) -> dict[str, Any]:
        scoring = ("path_tracker", "path_tolerance")
        given = {name: value for name, value in super().described().items() if name not in scoring}
        return given | {"prompts_sha256": hash_files(self.kit.path, ["prompts", "skins"], "description.json")}

    def scorer(self) -> dict[str, Any]:
        return {**super().scorer(), "tracker": self.path_tracker, "path_tolerance": self.path_tolerance}

    # ------------------------------------------------------------ scoring

    def score_files(self, videos: Mapping[Instance, Path]) -> Iterator[tuple[Instance, Score]]:
        """Judge the videos of one game and skin at a time: that many an interruption of the kit costs."""
        groups: dict[Path, dict[Instance, Path]] = {}
        for one, path in videos.items():
            groups.setdefault(self._folder(one).parent, {})[one] = path
        for group in groups.values():
            yield from self.judge(group)

    def run_kit(self, videos: Mapping[Instance, Path]) -> tuple[str | None, dict[Instance, Score]]:
        skin = self._folder(next(iter(videos))).parent.absolute()
        with tempfile.TemporaryDirectory(prefix="vlmteacher-vr-bench-") as scratch:
            made, results = Path(scratch) / "videos", Path(scratch) / "results"
            made.mkdir()
            for one, path in videos.items():
                (made / f"{one.meta['stem']}.mp4").symlink_to(path.absolute())
            words = ["--threshold", str(self.path_tolerance), "--workers", "2", "--tracker-type", self.path_tracker]
            why = self.kit.run([str(skin), str(made), str(results), *words])
            entries = {} if why is not None else read_results(results)
        named = {one: entries.get(f"{one.meta['stem']}.mp4") for one in videos}
        return why, {one: verdict(entry) for one, entry in named.items() if entry is not None}

    # ------------------------------------------------------------ results

    def summarize(self, rows: Sequence[Row], missing: Sequence[Instance] = ()) -> dict[str, Any]:
        """Return the kit's means over the judged videos, and the same with zeros for every missing one."""
        zeros = [{"category": one.category, "subscores": dict.fromkeys(METRICS, 0.0)} for one in missing]
        return {
            **super().summarize(rows, missing),
            "missing": len(missing),
            "as_the_kit": kit_means(rows),
            "missing_is_0": kit_means([*rows, *zeros]),
        }

    def lines(self, results: Mapping[str, Any]) -> list[str]:
        scorer = results["scorer"]
        lines = [
            f"{scorer['kit']}, {scorer['entry_point']}, tracker {scorer['tracker']}, tolerance"
            f" {scorer['path_tolerance']}, sources {scorer['sha256'][:16]}",
            f"{'':33} {'n':>4} {'PR':>6} {'SR':>6} {'EM':>6} {'MF':>6} {'SD':>6}",
        ]
        for label, entry in (("as the kit", "as_the_kit"), ("missing = 0", "missing_is_0")):
            for name, cell in results[entry].items():
                values = ("-" if cell[metric] is None else f"{cell[metric]:.3f}" for metric in (*METRICS, "sd"))
                lines.append(f"{f'{label}, {name}':33} {cell['n']:4} " + " ".join(f"{value:>6}" for value in values))
        lines.append("Compare with --method static and --method final-frame: a still maze is of high fidelity.")
        return lines


@lru_cache(maxsize=256)
def prompt(kit: Kit, game: str, skin: str) -> str:
    """Return the prompt that the kit writes for a game and a skin. Raises InputError."""
    return kit.ask(PROMPT, game, skin).strip()


def right_videos(folder: Path, stem: str) -> list[Path]:
    """Return the videos of the right paths of a maze."""
    several = sorted(path for path in (folder / "videos").glob(f"{stem}_*.mp4") if path.stem[len(stem) + 1 :].isdigit())
    return several or [path for path in (folder / "videos" / f"{stem}.mp4",) if path.is_file()]


def read_results(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Return the kit's entries by the names of the videos. Raises InputError for another format."""
    entries: dict[str, Mapping[str, Any]] = {}
    try:
        for difficulty in DIFFICULTIES:
            file = folder / difficulty / "evaluation_results.json"
            if file.exists():
                content = json.loads(read_text(file, "the kit's results", RESULTS_LIMIT))
                entries |= {entry["video"]: entry for entry in content["results"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"the kit's results are not of the known format ({type(error).__name__}: {error})") from error
    return entries


def verdict(entry: Mapping[str, Any]) -> Score:
    """Return the kit's metrics of a video: success by SR, the score is PR; none where the kit failed."""
    if entry.get("status") != "success":
        return Score(None, None, error=f"the kit could not judge: {entry.get('error')}")
    values = {name: entry.get(name) for name in (*METRICS, "sd")}
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    if any(name not in numbers or not math.isfinite(numbers[name]) for name in METRICS):
        return Score(None, None, error=f"the kit's metrics are {values}")
    return Score(numbers["sr"] >= 1, numbers["pr"], numbers)


def kit_means(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the means of the metrics in all, by difficulty, and over the difficulties, as the kit prints them.

    SD is a mean over the rows that have it.
    """

    def means(group: Sequence[Row]) -> dict[str, Any]:
        values = {
            name: [row["subscores"][name] for row in group if name in row["subscores"]] for name in (*METRICS, "sd")
        }
        return {"n": len(group), **{name: fmean(numbers) if numbers else None for name, numbers in values.items()}}

    groups = [(name, [row for row in rows if row["category"] == name]) for name in DIFFICULTIES]
    by = {name: means(group) for name, group in groups if group}
    over: dict[str, Any] = {"n": len(rows)}
    for name in (*METRICS, "sd"):
        numbers = [cell[name] if cell[name] is not None else 0.0 for cell in by.values()]
        over[name] = fmean(numbers) if numbers else None
    return {**by, "all": means(rows), "mean of difficulties": over}
