"""What the page does, without its controls."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from PIL import Image

from vlmteacher.app import views
from vlmteacher.app.examples import Example
from vlmteacher.app.folders import PUBLIC, Runs
from vlmteacher.app.jobs import Run, Worker
from vlmteacher.errors import InputError
from vlmteacher.media import fit_image, read_image
from vlmteacher.prompts import check_prompt
from vlmteacher.queries import QuerySet
from vlmteacher.settings import Keywords, Settings, types

Fit: TypeAlias = Literal["refuse", "crop", "pad"]
KEPT = 20  # ended runs whose messages are kept
REPORTS = 4  # of sweeps that are kept


@dataclass
class Service:
    """What all browsers share: the models, the line of runs, the folder, the reports of sweeps.

    settings, calls: keywords of every call, from the command line. uploads: the folder of uploaded files.
    reports: pages of sweeps by their number.
    """

    worker: Worker
    runs: Runs
    examples: list[Example]
    settings: Keywords
    calls: dict[str, Any]
    uploads: Path
    jobs: dict[str, Run] = field(default_factory=dict)
    reports: dict[str, str] = field(default_factory=dict)

    @property
    def packaged(self) -> bool:
        return bool(self.examples)

    def defaults(self, changed: Keywords | None = None) -> Settings:
        """The settings of a run."""
        return self.worker.pipe.defaults.updated(**self.settings).updated(**(changed or {}))

    def uploaded(self, path: str) -> Image.Image:
        """The picture that a browser has uploaded. Raises InputError, also for any other file of this machine."""
        if not Path(path).resolve().is_relative_to(self.uploads.resolve()):
            raise InputError("this picture was not uploaded here: upload it")
        try:
            return read_image(path)
        except InputError as error:
            raise InputError(str(error).replace(path, Path(path).name)) from error

    def fitted(self, image: Image.Image | None, fit: Fit) -> Image.Image | None:
        """The first frame in the size of the video. Raises InputError."""
        reasoner = self.worker.pipe.reasoner
        height, width = (self.calls.get(name) or getattr(reasoner, name) for name in ("height", "width"))
        return None if image is None else fit_image(image, height, width, fit=fit)

    def start(self, run: Run) -> str:
        """Put a run in the line. Returns its name."""
        self.worker.submit(run)
        name = self.runs.name(run.folder)
        self.jobs[name] = run
        for old in [key for key, job in self.jobs.items() if job.ended.is_set() and key != name][:-KEPT]:
            del self.jobs[old]
        return name

    def new_run(
        self, prompt: str, frame: Image.Image | None, queries: QuerySet | None, seed: int, changed: Keywords
    ) -> Run:
        """A run of its own folder. Raises InputError for what can be refused without the models.

        frame: the first frame in the size of the video.
        """
        check_prompt(prompt)
        self.defaults(changed)
        folder = self.runs.new(prompt, [job.folder for job in self.worker.line() if isinstance(job, Run)])
        values = cast(Keywords, {**self.settings, **changed})
        return Run(prompt, folder=folder, image=frame, queries=queries, seed=seed, calls=self.calls, settings=values)

    def resumed(self, name: str, max_steps: int) -> Run:
        """The run that goes on in the folder of this name. Raises InputError."""
        record, folder = self.runs.record(name), self.runs.folder(name)
        config = record["config"]
        values = {key: config[key] for key in types() if config.get(key) is not None} | {"max_steps": max_steps}
        calls = {**self.calls, **{key: config.get(key) for key in ("num_frames", "height", "width")}}
        return Run(
            record["prompt"],
            folder=folder,
            image=self.runs.first_frame(name),
            queries=QuerySet.from_dict(record["queries"]),
            seed=config["seed"],
            calls=calls,
            settings=cast(Keywords, values),
            resume=True,
            rows=list(record["steps"]),
        )

    def job(self, name: str | None) -> Run | None:
        """The run of this name that waits or is at work."""
        job = self.jobs.get(name or "")
        return None if job is None or job.ended.is_set() else job

    def failed(self, name: str | None) -> str:
        """Why the last attempt at a run failed; nothing where it did not."""
        job = self.jobs.get(name or "")
        return job.message if job is not None and job.ended.is_set() else ""

    def listed(self, chosen: str | None) -> str:
        """The list of runs."""
        jobs = [job for job in self.worker.line() if isinstance(job, Run)]
        return views.run_list(jobs, self.runs.entries(), chosen, {id(job): self.runs.name(job.folder) for job in jobs})

    def signature(self, name: str | None) -> tuple[Any, ...]:
        """What the view of a run depends on."""
        job = self.job(name)
        if job is None:
            return (name, self.worker.version)
        return (name, self.worker.version, len(job.rows), job.phase, job.stopping)

    def shown(self, name: str | None) -> str:
        """The view of a run."""
        if name is None:
            return views.render("empty.html", working=bool(self.worker.line()))
        if (job := self.job(name)) is not None:
            config = self.defaults(job.settings).to_dict()
            return views.live(job, self.worker.ahead(job), config)
        try:
            record, folder = self.runs.record(name), self.runs.folder(name)
            files = [file for file in PUBLIC if (folder / file).is_file()]
            return views.ended(name, record, files, self.failed(name))
        except InputError as error:
            if (old := self.jobs.get(name)) is not None and not old.message:
                return views.alert("the run was stopped before it began")
            return views.alert(self.failed(name) or str(error))

    def can_go_on(self, name: str | None) -> int | None:
        """The number of steps that a run that is not at work can go on to; None where it cannot."""
        if name is None or self.job(name) is not None:
            return None
        try:
            record = self.runs.record(name)
        except InputError:
            return None
        most = int(record["config"].get("max_steps", 0))
        if "p_yes_after" not in record:
            return most
        return most + max(10, most // 2) if record["stopped"] == "max_steps" else None

    def keep_report(self, names: list[str]) -> str:
        """Make the report of these sweeps. Returns the number that it is kept under. Raises InputError."""
        from vlmteacher.evaluation.gallery import report

        try:
            text = report(self.runs.sweep_folders(names))
        except InputError as error:
            raise InputError(str(error).replace(f"{self.runs.root}/", "")) from error
        key = str(time.monotonic_ns())
        self.reports[key] = text
        for old in list(self.reports)[:-REPORTS]:
            self.reports.pop(old, None)
        return key
