"""Flags of a command from a file: a YAML file of one's own, what run.json of a run records, or what a plan wrote."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmteacher.arguments import did_you_mean, show
from vlmteacher.errors import InputError
from vlmteacher.files import read_json, read_yaml

READY_REWARDS = ("temporal_smoothness", "clip_similarity")  # those that --reward takes


class DefaultsFile(argparse.Action):
    """A flag whose file holds defaults of other flags: what the command line gives takes precedence.

    read: (path) -> values by the names of the flags, without dashes. Two such flags add up; the later wins.
    """

    def __init__(self, *args: Any, read: Callable[[str], dict[str, Any]], **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.read = read

    def __call__(self, parser: object, namespace: argparse.Namespace, value: object, flag: str | None = None) -> None:
        setattr(namespace, self.dest, value)  # `apply` has read it

    def apply(self, parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
        """Set the defaults of the parser that the file names. Raises InputError."""
        for index, text in enumerate(given):
            flag, equals, path = text.partition("=")
            if flag not in self.option_strings:
                continue
            if not equals:
                path = given[index + 1] if index + 1 < len(given) else ""
            if path:
                actions = {action.dest: action for action in parser._actions}
                for name, value in self.read(path).items():
                    default = checked(name, value, actions, path)
                    parser.set_defaults(**{name: default})
                    if name in actions:
                        actions[name].required = False


def checked(name: str, value: Any, actions: Mapping[str, argparse.Action], path: str) -> Any:
    """The value of a flag as argparse would make it of text. Raises InputError, which names the file."""
    if name.startswith("recorded_"):  # for the command itself
        return value
    action = actions.get(name)
    if action is None or isinstance(action, DefaultsFile) or name == "help":
        raise InputError(f"{path}: there is no flag {show(name)}{did_you_mean(name, actions)}")
    where = f"{path}: {name}"
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f"{where} must be true or false, not {show(value)}")
        return value
    if name == "queries" and isinstance(value, dict | list):
        return value
    several = action.nargs == "+" or isinstance(action, argparse._AppendAction)
    values = value if several and isinstance(value, list) else [value]
    if not all(isinstance(each, str | int | float) and not isinstance(each, bool) for each in values):
        raise InputError(
            f"{where} must be a text or a number{' or a list of them' if several else ''}, not {show(value)}"
        )
    kind: Any = action.type or str
    try:
        values = [kind(str(each)) for each in values]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise InputError(f"{where} cannot be {show(value)} ({error})") from error
    if action.choices is not None and (wrong := [each for each in values if each not in action.choices]):
        raise InputError(f"{where} must be {' or '.join(map(str, action.choices))}, not {show(wrong[0])}")
    return values if several else values[0]


def read_config(path: str) -> dict[str, Any]:
    """The flags of a YAML or JSON file, by their names with dashes or underscores; of run.json those of the run."""
    values = read_json(path, "configuration") if Path(path).suffix == ".json" else read_yaml(path, "configuration")
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"configuration {path} must be a mapping of `flag: value`")
    if {"config", "models", "prompt"} <= values.keys():
        return recorded(values, path)
    values = {name.removeprefix("--").replace("-", "_"): value for name, value in values.items()}
    return {{"lr": "learning_rate"}.get(name, name): value for name, value in values.items()}


def recorded(record: dict[str, Any], path: str) -> dict[str, Any]:
    """The flags of the run that a run.json records. Raises InputError for a reward that a flag cannot give."""
    from vlmteacher import settings
    from vlmteacher.reasoners.presets import PRESETS
    from vlmteacher.reasoners.sampling import even_timesteps

    config, models, queries = (record.get(name) for name in ("config", "models", "queries"))
    if not all(isinstance(part, dict) for part in (config, models, queries)):
        raise InputError(f"{path} is not run.json of a run")
    assert isinstance(config, dict) and isinstance(models, dict) and isinstance(queries, dict)
    names = [*settings.types(), "num_frames", "height", "width", "seed", "dtype"]
    values = {name: config[name] for name in names if config.get(name) is not None}
    values |= {"prompt": record["prompt"], "queries": queries}
    for name in ("reasoner", "teacher", "decoder", "transformer", "few_step_lora"):
        if isinstance(model := models.get(name), str) and not model.startswith("packaged/"):
            values[name] = model.split(", ") if name in ("transformer", "few_step_lora") else model
    sampling = config.get("sampling")
    if isinstance(sampling, dict):
        steps = sampling.get("timesteps") or []
        if {"transformer", "few_step_lora"} & values.keys():
            same = (name for name, preset in PRESETS.items() if _plain(preset.sampling) == sampling)
            if preset_name := next(same, None):
                values["preset"] = preset_name
        if steps == list(even_timesteps(max(len(steps), 1))):
            values["num_inference_steps"] = len(steps)
        values |= {
            name: sampling[name] for name in ("guidance_scale", "negative_prompt") if sampling.get(name) is not None
        }
    if own := config.get("rewards"):
        if foreign := [name for name in own if name not in READY_REWARDS]:
            raise InputError(f"{path}: the run had a reward of its own, {foreign[0]}: repeat it in Python")
        values["reward"] = [f"{name}={weight}" for name, weight in own.items()]
    needed = [name for name in ("image", "last_image", "goal_image", "lora") if config.get(name) is not None]
    if "goal_image" in needed and config["goal_image"] == config.get("last_image"):
        needed.remove("goal_image")  # it is by default the last frame
    return values | {"recorded_files": needed}


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    return {name: list(each) if isinstance(each, tuple) else each for name, each in value.items()}


def read_plan(path: str) -> dict[str, Any]:
    """The flags that `vlmteacher plan -o` wrote. Raises InputError."""
    plan = read_json(path, "plan")
    if not isinstance(plan, dict) or not isinstance(plan.get("solve"), dict):
        raise InputError(f"plan {path} was not written by `vlmteacher plan -o FILE`")
    return plan["solve"]
