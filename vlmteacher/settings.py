"""The settings of a call: one field each.

Keywords, command-line flags, range checks, run.json's config and the table in docs/guides/settings.md are made from the
fields. A new setting is its field here and its use; then `python -m tools.settings` writes `Keywords` and the table.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack, cast, get_args, get_origin, get_type_hints

from vlmteacher import arguments
from vlmteacher.errors import InputError, Notice
from vlmteacher.files import check_text

Engine = Literal["eager", "compile", "cuda_graph"]
Attention = Literal["auto", "cudnn", "flash", "fa3", "efficient"]
Target = Literal["first_step", "last_step", "full"]
T = TypeVar("T")


def parse_blocks(text: str) -> int:
    """The n of "last:n". Raises InputError."""
    name, _, count = text.partition(":")
    if name != "last" or not count.isdecimal() or int(count) < 1:
        raise InputError(f"lora_blocks must be of the form last:n, n at least 1, not {text!r}")
    return int(count)


def parse_memory(text: str) -> float | None:
    """The GB of a number above 0; None for "auto". Raises InputError."""
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= arguments.LARGEST_NUMBER:
        raise InputError(f"memory must be auto, or a number of GB above 0, not {text!r}")
    return value


def check_folder(text: str) -> None:
    """Raise InputError for a path that is a file or no path at all; the folder may be new."""
    if not text or Path(check_text(text, "warm_start")).is_file():
        raise InputError(f"warm_start {arguments.show(text)} is no folder: give one, which may be new")


def setting(
    default: T,
    help: str,
    *,
    flag: str | None = None,
    old_flag: str | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float = arguments.LARGEST_NUMBER,
    metavar: str | None = None,
    parse: Callable[[str], object] | None = None,
) -> T:
    """A field of `Settings`.

    flag: on the command line, where it is not the field's name; old_flag: its name in the last release. least, above,
    most: the range of a number. metavar, parse: form of a text, and the function that raises InputError for other
    texts.
    """
    metadata = {"help": help, "flag": flag, "old_flag": old_flag, "least": least, "above": above, "most": most}
    return field(default=default, metadata={**metadata, "metavar": metavar, "parse": parse})


@dataclass(frozen=True)
class MethodSettings:
    """The method; the defaults are the paper's (arXiv 2606.02564, implementation details)."""

    max_steps: int = setting(40, "updates of the LoRA at most", least=0)
    threshold: float = setting(0.22, "stop when the loss is not above it; 0.22 is -ln 0.8", above=0)
    goal_weight: float = setting(0.5, "weight of the goal query; the process queries share the rest", least=0, most=1)
    teacher_weight: float = setting(
        1.0, "weight of the Teacher's loss beside rewards; 0 only records its answers", least=0
    )
    teacher_frames: int = setting(24, "frames of the video that the Teacher sees", old_flag="--frames", least=1)
    teacher_frames_by: Literal["uniform", "change"] = setting(
        "uniform", "spread these frames evenly, or more closely where the first one-step prediction changes more"
    )
    windows: int = setting(
        1,
        "parts of a long video, of teacher_frames each, that the Teacher judges one by one: the process queries on"
        " each, the goal query on as many frames of the whole",
        least=1,
    )
    window_loss: Literal["mean", "softmax"] = setting(
        "mean", "a process query's loss over the windows: the mean, or the soft maximum, which the worst window decides"
    )
    rank: int = setting(16, "rank of the LoRA", least=1)
    learning_rate: float = setting(5e-5, "learning rate of AdamW", flag="--lr", above=0)
    keep: Literal["last", "best"] = setting("last", "LoRA to use after the last step: the last, or the best by loss")
    check_final: bool = setting(False, "stop only when the loss of the few-step video is not above the threshold too")
    lora_blocks: str | None = setting(
        None,
        "adapt the last N blocks of the Reasoner only: faster, and another method than the paper's",
        metavar="last:N",
        parse=parse_blocks,
    )
    target: Target = setting(
        "first_step",
        "video that the Teacher judges at each step: the one-step prediction (the paper's), or the few-step video with"
        " a gradient through its last step or through all of them",
    )
    warm_start: str | None = setting(
        None,
        "folder of earlier instances' LoRAs: start from the one whose prompt and queries are the most similar, where"
        " its first loss is below that of a fresh LoRA; an instance that reaches the threshold adds its own",
        metavar="DIR",
        parse=check_folder,
    )
    warm_start_from: Literal["nearest", "mean"] = setting(
        "nearest", "LoRA to start from: that of the most similar instance, or the mean of all"
    )
    fit: Literal["refuse", "crop", "pad"] = setting(
        "refuse", "a first frame whose shape is not the video's: refuse it, crop its middle, or pad it with black"
    )


@dataclass(frozen=True)
class Execution:
    """How the method is computed: the results agree to rounding."""

    fused_lora: bool = setting(
        True, "compute the LoRA layers and what stands between them by our operators, not by PEFT's and diffusers'"
    )
    engine: Engine = setting(
        "eager", "run each step operator by operator, with compiled blocks of the Reasoner, or as a CUDA graph"
    )
    attention: Attention = setting(
        "auto", "attention of torch to take first on a GPU; fa3 needs FlashAttention 3's package and a Hopper GPU"
    )
    deterministic: bool = setting(False, "the same bytes for any number of threads: works on one thread, and is slower")
    before: bool = setting(
        True,
        "put the video before the first update into the run folder; without a folder it is made when it is asked for",
    )
    memory: str | None = setting(
        None,
        "memory for the steps, in GB (10^9 bytes), or auto for what the device has: keep the activations that"
        " `vlmteacher plan` would choose (default: the Reasoner's all, the Teacher's as fit)",
        metavar="auto|GB",
        parse=parse_memory,
    )


@dataclass(frozen=True)
class Remedies:
    """Remedies against videos that please only the Teacher; all are off by default."""

    preserve: bool = setting(False, "also ask the Teacher whether what the task does not change has stayed")
    frame_jitter: int = setting(0, "shift the Teacher's frames by up to N pixels, differently at each step", least=0)
    lora_decay: float = setting(0.0, "weight decay of the LoRA in AdamW", least=0)
    pull: float = setting(
        0.0, "weight of the mean squared distance of the latents from those before the first update", least=0
    )
    frame_statistics: float = setting(
        0.0,
        "weight of the mean squared relative change of the frames' low-level statistics (brightness, contrast, edges)"
        " since before the first update: a light regulariser of the visual quality",
        least=0,
    )
    final_samples: int = setting(
        1,
        "few-step videos to sample at the end, with different noise after the first sampling step: the later steps may"
        " spoil what was optimised, and the Teacher picks the best video",
        least=1,
    )


GROUPS = (MethodSettings, Execution, Remedies)


class Keywords(TypedDict, total=False):
    """The settings as keywords of a call; None stands for the default of the pair, or else of the paper."""

    # written by `python -m tools.settings`:
    max_steps: int | None
    threshold: float | None
    goal_weight: float | None
    teacher_weight: float | None
    teacher_frames: int | None
    teacher_frames_by: Literal["uniform", "change"] | None
    windows: int | None
    window_loss: Literal["mean", "softmax"] | None
    rank: int | None
    learning_rate: float | None
    keep: Literal["last", "best"] | None
    check_final: bool | None
    lora_blocks: str | None
    target: Target | None
    warm_start: str | None
    warm_start_from: Literal["nearest", "mean"] | None
    fit: Literal["refuse", "crop", "pad"] | None
    fused_lora: bool | None
    engine: Engine | None
    attention: Attention | None
    deterministic: bool | None
    before: bool | None
    memory: str | None
    preserve: bool | None
    frame_jitter: int | None
    lora_decay: float | None
    pull: float | None
    frame_statistics: float | None
    final_samples: int | None


@dataclass(frozen=True)
class Settings(Remedies, Execution, MethodSettings):
    """All settings of a call (`GROUPS`). Raises InputError for a value of another type or out of its range."""

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, _checked(each, getattr(self, each.name)))
        if self.engine == "cuda_graph" and self.frame_jitter:
            raise InputError('frame_jitter changes from step to step, a CUDA graph does not: take engine "eager"')

    @classmethod
    def of(cls, values: object, source: str) -> Settings:
        """Settings from a mapping. Raises InputError, which names `source`, for another type or an unknown name."""
        if not isinstance(values, Mapping):
            raise InputError(f"{source} must be settings by name, not {arguments.show(values)}")
        if unknown := [name for name in values if name not in types()]:
            raise InputError(
                f"{source}: there is no setting {arguments.show(unknown[0])}: it can be {', '.join(types())}"
            )
        return cls(**values)

    def updated(self, **values: Unpack[Keywords]) -> Settings:
        """These settings with the values that are not None. Raises TypeError for an unknown name."""
        for name in values:
            if name not in types():
                guess = arguments.did_you_mean(name, types())
                raise TypeError(f"got an unexpected keyword argument {name!r}{guess}")
        changes: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@cache
def types() -> dict[str, Any]:
    """The type of each setting, in the order of the fields."""
    hints = get_type_hints(Settings)
    return {each.name: hints[each.name] for each in fields(Settings)}


def choices(name: str) -> tuple[str, ...]:
    """The values that a setting of type Literal can have; else nothing."""
    return get_args(types()[name]) if get_origin(types()[name]) is Literal else ()


def flag(entry: Field[Any]) -> str:
    """The command-line flag of a setting."""
    return entry.metadata["flag"] or "--" + entry.name.replace("_", "-")


def range_text(entry: Field[Any]) -> str:
    """The range of a number, for an error and for the docs."""
    least, above, most = (entry.metadata[name] for name in ("least", "above", "most"))
    if above is not None:
        return f"greater than {above:g} and at most {most:g}"
    if most < arguments.LARGEST_NUMBER:
        return f"between {least:g} and {most:g}"
    if types()[entry.name] is int:
        return f"at least {least:g}"
    return f"{least:g}{' (off)' if entry.default == least else ''} or greater, at most {most:g}"


def _checked(entry: Field[Any], value: object) -> object:
    """The value as the setting's type. Raises InputError, which names the setting."""
    name, kind, known = entry.name, types()[entry.name], entry.metadata
    if kind is bool:
        return arguments.flag(name, value)
    if kind is int:
        return arguments.whole(name, value, known["least"])
    if kind is float:
        number = arguments.number(name, value)
        low = known["least"] if known["above"] is None else known["above"]
        if not (low <= number <= known["most"]) or number == known["above"]:
            raise InputError(f"{name} must be {range_text(entry)}, not {number}")
        return number
    if choices(name):
        return arguments.one_of(name, value, choices(name))
    if value is not None:
        value = f"{value:g}" if type(value) in (int, float) else value  # memory=48
        known["parse"](arguments.text(name, value))
    return value


class Renamed(argparse.Action):
    """A flag by its name of the last release: it still works, with a notice."""

    def __init__(self, *args: Any, new: str, **keywords: Any) -> None:
        super().__init__(*args, **{**keywords, "help": argparse.SUPPRESS})
        self.new = new

    def __call__(self, parser: object, namespace: argparse.Namespace, value: object, flag: str | None = None) -> None:
        warnings.warn(f"{flag} is now {self.new}: the old name goes with the next release", Notice, stacklevel=2)
        setattr(namespace, self.dest, value)


def add_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the command-line flags of these settings, or of all, in groups; a flag left out is None."""
    for group in GROUPS:
        chosen = [each for each in fields(group) if not names or each.name in names]
        title = (group.__doc__ or "").partition(";")[0].rstrip(".")
        place = parser if names else parser.add_argument_group(title)
        for each in chosen:
            kind = types()[each.name]
            options: dict[str, Any] = {"metavar": each.metadata["metavar"]}
            if kind is bool:
                options = {"action": argparse.BooleanOptionalAction}
            elif kind in (int, float):
                options = {"type": kind, "metavar": "N" if kind is int else "X"}
            elif choices(each.name):
                options = {"choices": choices(each.name)}
            place.add_argument(flag(each), dest=each.name, default=None, help=each.metadata["help"], **options)
            if old := each.metadata["old_flag"]:
                place.add_argument(old, dest=each.name, default=None, type=kind, action=Renamed, new=flag(each))


def given(namespace: argparse.Namespace) -> Keywords:
    """The settings that were given on the command line."""
    values = {name: getattr(namespace, name, None) for name in types()}
    return cast(Keywords, {name: value for name, value in values.items() if value is not None})
