"""The page: controls on the left, the open run on the right, and the reports of sweeps in a tab of their own."""

from __future__ import annotations

from typing import Any

import gradio as gr

from vlmteacher.app import views
from vlmteacher.app.controls import PICK, QUIETLY, Update, html, picked
from vlmteacher.app.form import TaskForm
from vlmteacher.app.service import Service
from vlmteacher.errors import InputError, OutputError

TICK = 0.7  # seconds between two looks at the run


def build(app: Service) -> gr.Blocks:
    """The page of a service."""
    with gr.Blocks(title="vlmteacher", analytics_enabled=False) as page:
        html(views.render("head.html"))
        with gr.Tabs():
            with gr.Tab("Solve"), gr.Row(equal_height=False):
                with gr.Column(scale=5, min_width=320), gr.Tabs():
                    with gr.Tab("New task"):
                        form = TaskForm(app)
                    with gr.Tab("Runs") as runs, gr.Column(elem_classes="vt-card"):
                        run_list = html(js_on_load=PICK, elem_id="runs")
                with gr.Column(scale=7, min_width=320, elem_classes="vt-viewer"):
                    viewer = Viewer(app, run_list)
            with gr.Tab("Sweeps") as sweeps:
                Sweeps(app, sweeps)
        gr.Timer(TICK).tick(viewer.look, [viewer.opened, viewer.drawn], viewer.outputs, **QUIETLY)
        page.load(viewer.draw, viewer.opened, viewer.outputs, **QUIETLY)
        runs.select(viewer.draw, viewer.opened, viewer.outputs, **QUIETLY)

        def begin(*values: Any) -> Update:
            try:
                name = app.start(form.read(*values))
            except (InputError, OutputError) as error:
                return {form.message: views.alert(str(error))}
            return {form.message: "", **viewer.open(name)}

        form.run.click(begin, form.inputs, [form.message, *viewer.outputs], **QUIETLY)
    page.queue(max_size=64, api_open=False)
    return page


class Viewer:
    """The open run with its buttons, and the list of runs.

    Attributes:
        opened: the name of the open run, of this browser. drawn: the signature of what it shows.
        outputs: what `draw` and the others change.
    """

    def __init__(self, app: Service, run_list: gr.HTML) -> None:
        self.app, self.run_list = app, run_list
        self.opened, self.drawn = gr.State(None), gr.State(None)
        with gr.Row(elem_classes="vt-buttons"):
            self.stop = gr.Button("Stop", variant="stop", scale=0, visible=False, elem_id="stop")
            self.steps = gr.Number(label="Steps at most", precision=0, scale=0, min_width=140, visible=False)
            self.go_on = gr.Button("Go on", variant="primary", scale=0, visible=False, elem_id="go-on")
        self.refusal = html(elem_id="refusal")
        self.view = html(elem_id="view")
        shown = [self.stop, self.steps, self.go_on, self.refusal, self.view]
        self.outputs: list[Any] = [*shown, run_list, self.opened, self.drawn]
        run_list.click(self._pick, None, self.outputs, **QUIETLY)
        self.stop.click(self._stop, self.opened, self.outputs, **QUIETLY)
        self.go_on.click(self._go_on, [self.opened, self.steps], self.outputs, **QUIETLY)

    def draw(self, name: str | None) -> Update:
        """Show a run as it is now."""
        last, job = self.app.can_go_on(name), self.app.job(name)
        return {
            self.view: self.app.shown(name),
            self.stop: gr.update(visible=job is not None, interactive=job is not None and not job.stopping),
            self.steps: gr.update(visible=last is not None, value=last),
            self.go_on: gr.update(visible=last is not None),
            self.run_list: self.app.listed(name),
            self.drawn: self.app.signature(name),
        }

    def look(self, name: str | None, drawn: Any) -> Update:
        """Show a run where it has changed."""
        if drawn is not None and tuple(drawn) == self.app.signature(name):
            return {self.drawn: gr.skip()}
        return self.draw(name)

    def open(self, name: str) -> Update:
        """Open a run."""
        return {self.opened: name, self.refusal: "", **self.draw(name)}

    def _pick(self, event: gr.EventData) -> Update:
        return self.open(picked(event))

    def _stop(self, name: str | None) -> Update:
        if (job := self.app.job(name)) is not None:
            self.app.worker.stop(job)
        return self.draw(name)

    def _go_on(self, name: str | None, most: float | None) -> Update:
        try:
            if name is None or self.app.can_go_on(name) is None:
                raise InputError("this run cannot go on")
            self.app.start(self.app.resumed(name, int(most or 0)))
        except (InputError, OutputError) as error:
            return {self.refusal: views.alert(str(error))}
        return self.open(name)


class Sweeps:
    """The tab with the reports of sweeps."""

    def __init__(self, app: Service, tab: gr.Tab) -> None:
        self.app = app
        with gr.Column(elem_classes="vt-card"):
            html(views.render("sweeps.html"))
            chosen = gr.CheckboxGroup([], label="Sweeps", elem_id="sweeps")
            show = gr.Button("Make the report", variant="primary", elem_id="report")
        self.message = html(elem_id="sweeps-message")
        self.frame = html(elem_id="gallery")
        tab.select(lambda: gr.update(choices=app.runs.sweeps()), None, chosen, **QUIETLY)
        one_at_a_time: dict[str, Any] = {**QUIETLY, "show_progress": "full", "concurrency_limit": 1}
        show.click(self._report, chosen, [self.message, self.frame], **one_at_a_time)

    def _report(self, names: list[str]) -> Update:
        try:
            address = f"reports/{self.app.keep_report(names)}"
        except (InputError, OutputError) as error:
            return {self.message: views.alert(str(error)), self.frame: ""}
        return {self.message: "", self.frame: views.render("gallery_frame.html", address=address)}
