"""The controls of a new task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import gradio as gr
from PIL import Image

from vlmteacher.app import views
from vlmteacher.app.controls import PICK, QUIETLY, Update, html, picked
from vlmteacher.app.jobs import Run, WriteQueries
from vlmteacher.app.service import Fit, Service
from vlmteacher.arguments import is_blank
from vlmteacher.errors import InputError, OutputError
from vlmteacher.microworld.known_tasks import unknown_task
from vlmteacher.prompts import check_prompt
from vlmteacher.queries import MAX_QUERIES, QuerySet
from vlmteacher.settings import Keywords

FITS = (("crop its middle", "crop"), ("pad it with black", "pad"), ("refuse it", "refuse"))
SETTINGS = ("max_steps", "threshold", "learning_rate", "final_samples", "check_final")


class TaskForm:
    """The task, its questions and its settings, and the button that runs it.

    Attributes:
        run, message: the button, and the place of refusals.
        inputs: the controls that `read` takes.
    """

    def __init__(self, app: Service) -> None:
        self.app = app
        self.frame = gr.State(None)  # the first frame, as it was given
        self._task()
        self._questions()
        self._settings()
        self.message = html(elem_id="message")
        self.run = gr.Button("Run", variant="primary", size="lg", elem_id="run")
        self.inputs = [self.prompt, self.frame, self.fit, self.seed, *self.values, *self.questions]
        self._connect()

    # ---------------------------------------------------------------- controls

    def _task(self) -> None:
        packaged = bool(self.app.examples)
        with gr.Column(elem_classes="vt-card"):
            html(_step(1, "The task", "a packaged example, or your own" if packaged else "what the video must show"))
            examples = views.examples(self.app.examples)
            self.examples = html(examples, js_on_load=PICK, visible=packaged, elem_id="examples")
            self.prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6, placeholder="What the video must show")
            self.hint = html()
            self.shown = html()
            with gr.Row(elem_classes="vt-buttons"):
                self.upload = gr.UploadButton("Upload a first frame", file_types=["image"], size="sm", elem_id="upload")
                self.upload.async_move_resource_to_block_cache = _never_fetched
                self.clear = gr.Button("Without a first frame", size="sm", visible=False, elem_id="clear")

    def _questions(self) -> None:
        with gr.Column(elem_classes="vt-card"):
            html(_step(2, "The questions", "empty: the Teacher writes them when the run begins"))
            self.write = gr.Button("Let the Teacher write them now", size="sm", elem_id="write")
            self.place = html()
            self.questions = [
                gr.Textbox(label=label, lines=1, max_lines=4, visible=index == 0, elem_id=f"question-{index}")
                for index, label in enumerate(self._labels(1))
            ]
            self.more = gr.Button("Add a question", size="sm", elem_id="more")

    def _settings(self) -> None:
        settings = self.app.defaults()
        with gr.Accordion("Settings", open=False, elem_classes="vt-card", elem_id="settings"):
            with gr.Row():
                steps = gr.Number(settings.max_steps, label="Steps at most", precision=0, min_width=120)
                self.seed = gr.Number(0, label="Seed", precision=0, min_width=120)
            with gr.Row():
                threshold = gr.Number(settings.threshold, label="Stop at a loss of", min_width=120)
                rate = gr.Number(settings.learning_rate, label="Learning rate", min_width=120)
            samples = gr.Number(settings.final_samples, label="Final videos to choose from", precision=0)
            chosen = self.app.settings.get("fit", "crop")
            self.fit = gr.Radio(FITS, value=chosen, label="A first frame of another shape")
            final = gr.Checkbox(settings.check_final, label="Stop only when the final video is good too")
        self.values = [steps, threshold, rate, samples, final]  # of `SETTINGS`

    def _connect(self) -> None:
        frame, message = [self.shown, self.clear, self.message], self.message
        chosen = [self.examples, self.prompt, self.frame, self.seed, self.hint, *frame, *self.questions]
        self.examples.click(self._choose, None, chosen, **QUIETLY)
        self.upload.upload(self._receive, [self.upload, self.fit], [self.frame, self.examples, *frame], **QUIETLY)
        self.clear.click(self._forget, None, [self.frame, *frame], **QUIETLY)
        self.fit.change(self._refit, [self.frame, self.fit], frame, **QUIETLY)
        self.prompt.blur(self._warn, self.prompt, self.hint, **QUIETLY)
        asked = [self.place, message, *self.questions]
        self.write.click(self._ask, [self.prompt, self.frame, self.fit], asked, **QUIETLY)
        self.more.click(self._add, self.questions, self.questions, **QUIETLY)

    def _labels(self, count: int) -> list[str]:
        """The labels of the questions: their role, and their share in the loss where there are `count` of them."""
        shares = views.shares(count, self.app.defaults().goal_weight) + [0.0] * (MAX_QUERIES - count)
        roles = ["Goal", *(f"Process {number}" for number in range(1, MAX_QUERIES))]
        return [f"{role} · {share:.0%} of the loss" for role, share in zip(roles, shares, strict=True)]

    # ---------------------------------------------------------------- what they do

    def read(self, *values: Any) -> Run:
        """The run of what the controls hold. Raises InputError."""
        prompt, image, fit, seed, *rest = values
        given = dict(zip(SETTINGS, rest, strict=False))
        goal, *process = (text or "" for text in rest[len(SETTINGS) :])  # None where a box was never shown
        process = [text for text in process if not is_blank(text)]
        if is_blank(goal) and process:
            raise InputError("the first question, about the goal, is empty: write it, or leave all empty")
        if seed is None or not 0 <= seed < 2**63:
            raise InputError(f"the seed must be a whole number from 0 to 2**63 - 1, not {seed}")
        queries = None if is_blank(goal) else QuerySet(goal, tuple(process))
        changed = cast(Keywords, {name: value for name, value in given.items() if value is not None})
        return self.app.new_run(prompt or "", self.app.fitted(image, fit), queries, int(seed), changed)

    def _boxes(self, texts: Sequence[str], count: int) -> Update:
        """`count` boxes for questions, the first of them with these texts."""
        padded = [*texts, *[""] * MAX_QUERIES]
        return {
            box: gr.update(value=text, visible=index < count, label=label)
            for index, (box, text, label) in enumerate(
                zip(self.questions, padded[:MAX_QUERIES], self._labels(count), strict=True)
            )
        }

    def _choose(self, event: gr.EventData) -> Update:
        index = picked(event)
        if not index.isdecimal() or int(index) >= len(self.app.examples):
            return {self.message: views.alert("there is no such example")}
        task = self.app.examples[int(index)]
        return {
            self.examples: views.examples(self.app.examples, int(index)),
            self.prompt: task.prompt,
            self.seed: task.seed,
            self.hint: "",
            self.frame: task.image,
            **self._preview(task.image, "crop"),
            **self._boxes([], 1),
        }

    def _receive(self, path: str | None, fit: Fit) -> Update:
        try:
            image = None if path is None else self.app.uploaded(path)
            examples = views.examples(self.app.examples)
            return {**self._preview(image, fit), self.frame: image, self.examples: examples}
        except InputError as error:
            return {self.message: views.alert(str(error))}

    def _preview(self, image: Image.Image | None, fit: Fit) -> Update:
        fitted = self.app.fitted(image, fit)
        size = None if image is None else image.size
        shown = views.first_frame(fitted, size)
        return {self.shown: shown, self.clear: gr.update(visible=image is not None), self.message: ""}

    def _refit(self, image: Image.Image | None, fit: Fit) -> Update:
        try:
            return self._preview(image, fit)
        except InputError as error:
            return {self.message: views.alert(str(error))}

    def _forget(self) -> Update:
        return {self.frame: None, **self._preview(None, "crop")}

    def _warn(self, text: str | None) -> str:
        note = unknown_task(text) if self.app.examples and text and not is_blank(text) else None
        return views.render("hint.html", text=note) if note else ""

    def _ask(self, text: str | None, image: Image.Image | None, fit: Fit) -> Iterator[Update]:
        """Let the Teacher write the queries; say the place in the line meanwhile."""
        try:
            check_prompt(text or "")
            job = WriteQueries(text or "", image=self.app.fitted(image, fit))
            self.app.worker.submit(job)
        except (InputError, OutputError) as error:
            yield {self.message: views.alert(str(error))}
            return
        try:
            while not job.ended.is_set():
                yield {self.place: views.line(job, self.app.worker.ahead(job)), self.message: ""}
                job.ended.wait(0.3)
        finally:
            self.app.worker.stop(job)  # the page was closed
        texts = list(job.queries.questions) if job.queries else None
        boxes = self._boxes(texts, len(texts)) if texts else {}
        yield {self.place: "", self.message: views.alert(job.message), **boxes}

    def _add(self, *texts: str | None) -> Update:
        kept = [text for text in texts if text and not is_blank(text)]
        return self._boxes(kept, min(len(kept) + 1, MAX_QUERIES))


def _step(number: int, title: str, hint: str) -> str:
    return views.render("step.html", number=number, title=title, hint=hint)


async def _never_fetched(path: str | Path | None) -> str | None:
    """The path of an upload as it is. Gradio would copy any file of this machine, and fetch addresses."""
    return None if path is None else str(path)
