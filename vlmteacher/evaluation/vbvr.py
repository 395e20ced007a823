"""VBVR-Bench and VBVR-Pro-Bench: their data folders, and the scores of their own evaluation kits.

The kits are public (Apache-2.0) and cloned by the user; each is run by its own command, on videos in its own layout.
VBVR-EvalKit has two entry points that disagree: this is ``run_evaluation.py``, the task-specific score alone, and not
``evaluate.py``, a mix of five terms. VBVR-Pro-Bench's is ``run_evaluation_video.py``.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from PIL import Image

from vlmteacher.errors import InputError, Notice
from vlmteacher.evaluation.benchmark import Instance, Score
from vlmteacher.evaluation.kit import INFRASTRUCTURE, Kit, KitBenchmark
from vlmteacher.evaluation.methods import Method, Row
from vlmteacher.files import read_text
from vlmteacher.media import read_image

SPLITS = ("In-Domain_50", "Out-of-Domain_50")
FILES = ("first_frame.png", "final_frame.png", "ground_truth.mp4", "prompt.txt")
LAYOUT = f"{SPLITS[0]} or {SPLITS[1]}, then TASK/00000/{{{', '.join(FILES)}}}"
CHUNK = 25  # videos of one run of a kit
RESULTS_LIMIT = 2**28  # bytes of a kit's results


@dataclass(frozen=True, kw_only=True)
class Bench(KitBenchmark):
    """The tasks of a data folder, in the order of their instances: the first one of every task, then the second ones.

    Attributes:
        pro: VBVR-Pro-Bench.

    Raises InputError: another layout of the data, which names what was looked for.
    """

    name: ClassVar[str] = "vbvr"
    splits: ClassVar[tuple[str, ...]] = SPLITS
    controls: ClassVar[tuple[str, ...]] = ("static", "final-frame")
    layout: ClassVar[str] = LAYOUT
    prompt_file: ClassVar[str] = "prompt.txt"
    pro: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layout(self.root)

    @property
    def kit(self) -> Kit:
        if self.pro:
            return Kit("VBVR-Pro-Bench", self.evalkit or "", "run_evaluation_video.py", self.evalkit_python)
        return Kit("VBVR-EvalKit", self.evalkit or "", "run_evaluation.py", self.evalkit_python)

    def scenes(self, split: str) -> Iterator[Instance]:
        folders = [path for path in (self.root / split).glob("*/*") if path.is_dir() and path.name[0] != "."]
        needed = FILES + (("metadata.json",) if self.pro else ())
        for folder in sorted(folders):
            if not re.fullmatch(r"\d{5}", folder.name):
                raise InputError(f"{folder}: an instance is named by five digits, as 00000; the kit ignores others")
            if missing := [name for name in needed if not (folder / name).is_file()]:
                raise InputError(f"{folder} has no {' and no '.join(missing)}: looked for {LAYOUT}")
        for index, (number, task) in enumerate(sorted((path.name, path.parent.name) for path in folders)):
            yield Instance(f"{split}/{task}/{number}", split, index, 0, task, meta={"number": number})

    def load(self, instance: Instance) -> tuple[str, Image.Image]:
        folder = self._folder(instance)
        return read_text(folder / "prompt.txt", "prompt").strip(), read_image(folder / "first_frame.png")

    def final_frame(self, instance: Instance) -> Image.Image:
        return read_image(self._folder(instance) / "final_frame.png")

    def _folder(self, instance: Instance) -> Path:
        return self.root / instance.split / instance.task / instance.meta["number"]

    def path(self, instance: Instance) -> str:
        return f"{instance.split}/{instance.task}/{instance.meta['number']}.mp4"

    def check(self, method: Method) -> None:
        super().check(method)
        sources = "".join(path.read_text(errors="replace") for path in self.kit.sources())
        tasks = {path.name for split in SPLITS for path in (self.root / split).glob("*") if path.is_dir()}
        if unknown := sorted(task for task in tasks if task not in sources):
            warnings.warn(
                f"{len(unknown)} of {len(tasks)} tasks are not named in the sources of {self.kit.name}, {unknown[0]} "
                "first: it may have no evaluator for them",
                Notice,
                stacklevel=2,
            )

    def kit_hint(self) -> str:
        other = not self.pro and (self.kit.path / "run_evaluation_video.py").exists()
        return "; it is VBVR-Pro-Bench's kit: give --pro" if other else ""

    # ------------------------------------------------------------ scoring

    def score_files(self, videos: Mapping[Instance, Path]) -> Iterator[tuple[Instance, Score]]:
        """Judge `CHUNK` videos at a time, task by task: that many an interruption of the kit costs."""
        ordered = sorted(videos, key=self.path)
        for start in range(0, len(ordered), CHUNK):
            yield from self.judge({one: videos[one] for one in ordered[start : start + CHUNK]})

    def run_kit(self, videos: Mapping[Instance, Path]) -> tuple[str | None, dict[Instance, Score]]:
        with tempfile.TemporaryDirectory(prefix="vlmteacher-vbvr-") as scratch:
            model = Path(scratch) / "videos"
            for one, path in videos.items():  # of the wanted ones alone
                link = model / self.path(one)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.absolute())
            data = str(self.root.absolute())
            why = self.kit.run(
                ["--model_path", str(model), "--gt_base", data, "--output_dir", scratch, "--device", "cpu"]
            )
            results = Path(scratch) / "videos_vbvr_results.json"  # none where the kit knows none of the tasks
            samples = read_samples(results) if why is None and results.exists() else {}
        named = {one: samples.get(self.path(one)) for one in videos}
        return why, {one: verdict(sample, scratch) for one, sample in named.items() if sample is not None}

    # ------------------------------------------------------------ results

    def summarize(self, rows: Sequence[Row], missing: Sequence[Instance] = ()) -> dict[str, Any]:
        """Return the kit's plain means over the judged videos, and the same with a 0 for every missing one.

        The kit of VBVR-Pro-Bench counts a missing video as 0 itself.
        """
        categories = {row["task"]: row["category"] for row in rows if "category" in row}
        zeros = [
            {"split": one.split, "task": one.task, "category": categories.get(one.task, "unknown"), "score": 0.0}
            for one in missing
        ]
        return {
            **super().summarize(rows, missing),
            "missing": len(missing),
            "errors": sum("error" in row for row in rows),
            "as_the_kit": kit_means([*rows, *zeros] if self.pro else rows),
            "missing_is_0": kit_means([*rows, *zeros]),
        }

    def terms(self, scenes: Sequence[Row]) -> dict[str, list[float]]:
        """Return the paper's overall score, the mean of the splits' means."""
        sizes = Counter(row["split"] for row in scenes)
        return {"overall": [row["score"] / (len(sizes) * sizes[row["split"]]) for row in scenes]}

    def caption(self) -> str:
        name = "VBVR-Pro-Bench" if self.pro else "VBVR-Bench"
        return f"{name}, scored by {self.kit.script} of {self.kit.name}; overall: the mean of both splits."

    def printed_as(self) -> str:
        return "" if self.pro else self.name

    def lines(self, results: Mapping[str, Any]) -> list[str]:
        kit, zero = results["as_the_kit"], results["missing_is_0"]
        scorer = results["scorer"]
        lines = [
            f"{scorer['kit']}, entry point {scorer['entry_point']}, sources {scorer['sha256'][:16]}",
            f"{'':32} {'n':>4} {'as the kit':>10} {'missing = 0':>11}",
        ]
        cells = [(name, kit["splits"].get(name), cell) for name, cell in zero["splits"].items()]
        cells += [("all", kit, zero)]
        cells += [(name, kit["categories"].get(name), cell) for name, cell in zero["categories"].items()]
        for name, own, cell in cells:
            own = own or {"n": 0, "score": None}
            lines.append(f"{name[:32]:32} {own['n']:4} {_number(own['score']):>10} {_number(cell['score']):>11}")
        both = (_number(each["mean_of_splits"]) for each in (kit, zero))
        lines.append("{:32} {:4} {:>10} {:>11}".format("mean of both splits", "", *both))
        if failed := [row for row in results["instances"] if "error" in row]:
            first = failed[0]
            lines.append(f"{len(failed)} evaluator errors, each a 0 by the kit's rule; {first['id']}: {first['error']}")
        lines.append("A still first frame scores high: compare with --method static and --method final-frame.")
        return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def check_layout(root: Path) -> None:
    """Raise InputError unless `root` has the folder of a split."""
    if any((root / split).is_dir() for split in SPLITS):
        return
    inside = sorted(path.name for path in root.iterdir())[:5] if root.is_dir() else None
    has = "does not exist" if inside is None else f"has {', '.join(inside) or 'nothing'}"
    deeper = [path.parent.name for path in root.glob(f"*/{SPLITS[0]}")] if root.is_dir() else []
    remedy = f"; give {root / deeper[0]}" if deeper else ""
    raise InputError(f"--data {root} {has}, which is not VBVR-Bench's layout: looked for {LAYOUT}{remedy}")


def read_samples(path: Path) -> dict[str, Mapping[str, Any]]:
    """Return the samples of a kit's results by the path of their video. Raises InputError for another format."""
    try:
        content = json.loads(read_text(path, "the kit's results", RESULTS_LIMIT))
        samples: dict[str, Mapping[str, Any]] = {}
        for sample in content["samples"]:
            if sample.get("video_path") is not None:  # VBVR-Pro-Bench lists those that it did not find
                samples[f"{sample['folder']}/{sample['task_name']}/{sample['video_file']}"] = sample
                sample["score"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"the kit's results are not of the known format ({type(error).__name__}: {error})") from error
    return samples


def verdict(sample: Mapping[str, Any], scratch: str = "") -> Score:
    """Return a sample's score as the kit gives it; none where the kit itself was at fault.

    scratch: folder that the kit has worked in, which its texts name.
    """
    error, score = sample.get("error"), sample["score"]
    said = str(error).replace(f"{scratch}/", "") if scratch else str(error)
    text = None if error is None else " ".join(said.split())[:300]
    if text is not None and INFRASTRUCTURE.search(text):
        return Score(None, None, error=f"the kit could not judge: {text}")
    if not isinstance(score, int | float) or not math.isfinite(score):
        return Score(None, None, error=f"the kit's score is {score}")
    parts = sample.get("dimensions") or {}
    subscores = {name: float(value) for name, value in parts.items() if isinstance(value, int | float)}
    return Score(None, float(score), subscores, text, str(sample.get("category", "unknown")).lower())


def kit_means(rows: Sequence[Row]) -> dict[str, Any]:
    """Return plain means over rows, in all, by split, category and task; the paper's overall is `mean_of_splits`."""

    def mean(group: Sequence[Row]) -> dict[str, Any]:
        return {"n": len(group), "score": fmean(row["score"] for row in group) if group else None}

    def by(entry: Callable[[Row], str]) -> dict[str, Any]:
        names = sorted({entry(row) for row in rows})
        return {name: mean([row for row in rows if entry(row) == name]) for name in names}

    splits = by(lambda row: row["split"])
    whole = [splits[name]["score"] for name in SPLITS] if set(splits) == set(SPLITS) else []
    return {
        **mean(rows),
        "mean_of_splits": fmean(whole) if whole else None,
        "splits": splits,
        "categories": by(lambda row: row.get("category", "unknown")),
        "tasks": by(lambda row: row["task"]),
    }
