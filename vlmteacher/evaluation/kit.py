"""An evaluation kit that a user has cloned, run by its own command, and the benchmarks that are judged by one."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from vlmteacher.errors import InputError
from vlmteacher.evaluation.benchmark import FileBenchmark, Instance, Score, check_splits
from vlmteacher.evaluation.methods import Method

SECONDS = 3600  # for one run of a kit, which judges a few videos
NO_PACKAGE = re.compile(r"(?:ModuleNotFoundError|ImportError): (.*)")
INFRASTRUCTURE = re.compile(
    r"no module named|cannot import|cuda error|out of memory|cannot allocate|no space left|too many open files"
    r"|permission denied|read-only file system|connection (refused|reset|error)|timed out",
    re.IGNORECASE,
)
"""What an evaluator says when it, and not the video, is at fault: no verdict is made of that."""


@dataclass(frozen=True)
class Kit:
    """A kit's folder, the script that is its entry point, and the Python that runs it; None: this one."""

    name: str
    folder: str
    script: str
    python: str | None = None

    @property
    def path(self) -> Path:
        return Path(self.folder).absolute()

    def check(self, hint: str = "") -> None:
        """Ask the entry point for its help, which imports all that it needs.

        hint: where to get the kit. Raises InputError: no such folder or script, or it does not start.
        """
        if not (self.path / self.script).is_file():
            others = sorted(path.name for path in self.path.glob("*.py")) if self.path.is_dir() else []
            has = f"it has {', '.join(others[:5])}" if others else "it is no folder of a kit"
            raise InputError(f"--evalkit {self.folder}: there is no {self.script} of {self.name} ({has}){hint}")
        if (why := self.run(["--help"])) is not None:
            raise InputError(f"--evalkit {self.folder}: {self.script} does not start: {why}")

    def sources(self) -> list[Path]:
        """Return the kit's Python files, without those of an environment in its folder."""
        files: list[Path] = []
        for folder, folders, names in os.walk(self.path):
            inside = [name for name in folders if not (name[0] == "." or Path(folder, name, "pyvenv.cfg").exists())]
            folders[:] = sorted(inside)
            files += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
        return files

    def fingerprint(self) -> str:
        """Return the SHA-256 over names and contents of the kit's sources."""
        digest = hashlib.sha256()
        for path in self.sources():
            data = path.read_bytes()
            digest.update(f"{path.relative_to(self.path).as_posix()}\0{len(data)}\0".encode() + data)
        return digest.hexdigest()

    def described(self) -> dict[str, str]:
        """Return what the kit's verdicts depend on."""
        return {"kit": self.name, "entry_point": self.script, "sha256": self.fingerprint()}

    def run(self, words: Sequence[str]) -> str | None:
        """Run the entry point in the kit's folder; return why it failed, or None.

        Raises InputError where the Python cannot be run, or lacks a package that the kit needs.
        """
        return self._start([str(self.path / self.script), *words])[1]

    def ask(self, code: str, *words: str) -> str:
        """Return what Python code prints in the kit's folder, with `words` as its arguments. Raises InputError."""
        said, why = self._start(["-c", code, *words])
        if why is not None:
            raise InputError(f"--evalkit {self.folder}: {why}")
        return said

    def _start(self, words: Sequence[str]) -> tuple[str, str | None]:
        """Run the Python with these arguments; return its standard output, and why it failed, or None."""
        python = self.python or sys.executable
        if os.sep in python:  # the kit's folder is another one than this
            python = os.path.abspath(python)
        # A kit's folder stays as it was cloned: no __pycache__.
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8"}
        options: dict[str, Any] = {"cwd": self.path, "env": environment, "stdin": subprocess.DEVNULL}
        try:
            done = subprocess.run([python, *words], capture_output=True, timeout=SECONDS, **options)
        except subprocess.TimeoutExpired:
            return "", f"it took more than {SECONDS} seconds"
        except OSError as error:
            raise InputError(f"--evalkit-python {python} cannot be run ({error.strerror})") from error
        if done.returncode == 0:
            return done.stdout.decode(errors="replace"), None
        said = done.stderr.decode(errors="replace")
        if missing := NO_PACKAGE.search(said):
            raise InputError(
                f"{self.name} needs a package that {python} has not ({missing[1]}): install {self.folder}/"
                "requirements.txt into an environment, and give its Python as --evalkit-python"
            )
        last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "it says nothing")
        return "", f"{self.name} ended with exit status {done.returncode}: {last[:200]}"


def hash_files(root: Path, folders: Iterable[str], whole: str = "") -> str:
    """Return the SHA-256 over the names and sizes of the files in some folders of `root`.

    whole: name of files whose content counts too.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
                digest.update(path.read_bytes() if path.name == whole else b"")
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class KitBenchmark(FileBenchmark):
    """A benchmark with a folder of data, whose videos its own kit judges.

    A subclass says which kit (`kit`), which scenes the data have (`scenes`), and how the kit judges a few videos in one
    run (`run_kit`).

    Attributes:
        layout: of the data, for messages.
        prompt_file: name of the data's files whose content counts in the fingerprint.
        data: folder of the data.
        evalkit: folder of the kit.
        evalkit_python: the Python that runs it; None: this one.
    """

    layout: ClassVar[str]
    prompt_file: ClassVar[str] = ""
    data: str | None = None
    evalkit: str | None = None
    evalkit_python: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("data", self.data), ("evalkit", self.evalkit)):
            if value is None:
                raise InputError(f"the benchmark {self.name} needs --{name} DIR")

    @property
    def root(self) -> Path:
        return Path(self.data or "")

    @property
    @abstractmethod
    def kit(self) -> Kit:
        """Return the kit that judges."""

    @abstractmethod
    def scenes(self, split: str) -> Iterator[Instance]:
        """Yield the scenes of a split in their order, with the first noise.

        Raises InputError: a scene that lacks a file, or that the kit would not find.
        """

    @abstractmethod
    def run_kit(self, videos: Mapping[Instance, Path]) -> tuple[str | None, dict[Instance, Score]]:
        """Return why one run of the kit over videos broke down, or None, and the verdicts that it gave."""

    def instances(self, splits: Sequence[str], limit: int, noises: int) -> list[Instance]:
        check_splits(splits, self.splits)
        chosen = [scene for split in splits for scene in list(self.scenes(split))[:limit]]
        if not chosen:
            raise InputError(f"--data {self.data} has no instances in {' and '.join(splits)}: looked for {self.layout}")
        return [replace(scene, noise=noise) for noise in range(noises) for scene in chosen]

    def described(self) -> dict[str, Any]:
        paths = ("data", "evalkit", "evalkit_python")  # folders may be moved
        given = {name: value for name, value in super().described().items() if name not in paths}
        return given | {"data_sha256": hash_files(self.root, self.splits, self.prompt_file)}

    def scorer(self) -> dict[str, Any]:
        return dict(self.kit.described())

    def check(self, method: Method) -> None:
        super().check(method)
        self.kit.check(self.kit_hint())

    def kit_hint(self) -> str:
        """Return what to say where the folder has another kit; "": nothing."""
        return ""

    def judge(self, videos: Mapping[Instance, Path]) -> Iterator[tuple[Instance, Score]]:
        """Judge videos by one run of the kit; by a run for each of them where that breaks down."""
        why, scores = self.run_kit(videos)
        if why is not None and len(videos) > 1:
            for one, path in videos.items():
                yield from self.judge({one: path})
            return
        for one in videos:
            reason = why or f"{self.kit.name} skipped the video; has it an evaluator for the task {one.task}?"
            yield one, scores.get(one) or Score(None, None, error=reason)
