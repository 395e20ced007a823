"""The forms of diffusers in which a call may be made: lists of instances, and callbacks of four arguments."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vlmteacher import arguments
from vlmteacher.errors import InputError
from vlmteacher.output import TeacherPipelineOutputs
from vlmteacher.progress import listening, track
from vlmteacher.queries import QuerySet
from vlmteacher.torch_modes import plain_torch
from vlmteacher.trackers import LOGS, Trackers, tracking

F = TypeVar("F", bound=Callable[..., Any])
LISTS = (
    "image",
    "last_image",
    "goal_image",
    "generator",
    "negative_prompt",
    "queries",
    "num_frames",
    "height",
    "width",
)
"""Arguments that may be a list with an entry for each prompt."""


def any_form(call: F) -> F:
    """Decorate a pipeline's `__call__`, which answers one instance.

    A list of prompts is answered one after the other, with one progress bar: see `instances`. With `run_dir` each is
    recorded in its own folder in it, by its number. A callback may take four arguments (`three_arguments`).
    """

    @functools.wraps(call)
    def run(self: Any, prompt: object, image: object = None, **keywords: Any) -> Any:
        keywords = {"image": image, **keywords}
        check_options(keywords)
        if (callback := keywords.get("callback_on_step_end")) is not None:
            keywords["callback_on_step_end"] = three_arguments(callback)
        tracker = keywords.pop("tracker", None)
        with self.showing(arguments.flag("progress", keywords.pop("progress", True))):
            if not isinstance(prompt, list | tuple) or len(prompt) == 1:
                return one_call(self, prompt, keywords, tracker)
            calls = instances(list(prompt), keywords)
            run_dir, outputs = keywords.pop("run_dir", None), TeacherPipelineOutputs()
            for index, (one, its) in enumerate(zip(track(prompt, "instances", "instance"), calls, strict=True)):
                if run_dir is not None:
                    its["run_dir"] = Path(arguments.path("run_dir", run_dir), str(index))
                with listening():
                    outputs.append(one_call(self, one, {**its, "return_dict": True}, tracker))
            return outputs if keywords.get("return_dict", True) else (outputs.frames,)

    def one_call(pipe: Any, prompt: object, keywords: dict[str, Any], tracker: Trackers) -> Any:
        run_dir = keywords.get("run_dir")
        folder = None if run_dir is None or tracker is None else Path(arguments.path("run_dir", run_dir), LOGS)
        with tracking(tracker, folder):
            return call(pipe, prompt, **keywords)

    return run  # type: ignore[return-value]


def instances(prompts: list[Any], keywords: dict[str, Any]) -> list[dict[str, Any]]:
    """The keywords of each of several calls: entry k of every list of `LISTS`, and all that is no list.

    A list of questions is one set of queries for all. Raises InputError for no prompt, and a list of another length.
    """
    if not prompts:
        raise InputError("prompt is an empty list: give a prompt, or one for each instance")
    calls = [dict(keywords) for _ in prompts]
    for name in LISTS:
        values = keywords.get(name)
        if not isinstance(values, list | tuple) or (name == "queries" and all(isinstance(v, str) for v in values)):
            continue
        if len(values) != len(prompts):
            raise InputError(f"{name} is a list of {len(values)} for {len(prompts)} prompts: give one for each")
        for call, value in zip(calls, values, strict=True):
            call[name] = value
    for call in calls:  # what needs no model is refused before the first instance
        if not isinstance(call.get("queries"), str | os.PathLike):
            QuerySet.of(call.get("queries"))
    return calls


def three_arguments(callback: object) -> Any:
    """A callback `(pipe, step, row)`, in torch's plain modes, of one that takes these or diffusers' four.

    The four are (pipe, step, timestep, callback_kwargs): the timestep of the one-step prediction, and the row.
    """
    if not callable(callback):
        return callback
    four = takes(callback, 4) and not takes(callback, 3)

    def run(pipe: Any, step: int, row: dict[str, Any]) -> None:
        with plain_torch():
            if four:
                callback(pipe, step, 1000.0, dict(row))
            else:
                callback(pipe, step, row)

    return run


def check_options(keywords: Mapping[str, Any]) -> None:
    """Raise InputError for an option of a call, by its keyword, that cannot be used."""
    for name in ("return_dict", "resume"):
        arguments.flag(name, keywords.get(name, False))
    arguments.one_of("output_type", keywords.get("output_type", "pil"), ("pil", "np", "pt"))
    callback = keywords.get("callback_on_step_end")
    if callback is not None and not callable(callback):
        raise InputError(f"callback_on_step_end must be a function, not {arguments.show(callback)}")


def takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with this number of positional arguments."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # of C, without a signature
        return count == 3
    return True
