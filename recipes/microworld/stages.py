"""The stages in which the packaged models are made, and one run of a stage.

Every stage reads the results of earlier ones from the same folder, in which it has a folder of its own, and resumes
where it was stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from recipes.microworld.training import Run, load_config
from vlmteacher.errors import InputError


@dataclass(frozen=True)
class Stage:
    """A stage of the recipe.

    Attributes:
        name: the stage's name on the command line.
        function: the function that runs it, as ``module:function`` of this package.
        makes: its results, all in one folder.
        needs: results of earlier stages.
        config: names of the files in ``configs/`` that hold its settings; a later one takes precedence.
        start: the result of an earlier stage that this one trains further.
        part: the part of a pair whose weights it can start from.
        gpu: whether it can train on a GPU.
    """

    name: str
    function: str
    makes: tuple[str, ...]
    needs: tuple[str, ...] = ()
    config: tuple[str, ...] = ()
    start: str | None = None
    part: str | None = None
    gpu: bool = False

    @property
    def folder(self) -> str:
        """The stage's own folder."""
        return self.makes[0].split("/")[0]


VAE, DECODER, REASONER, STUDENT = "vae/vae", "decoder/decoder.safetensors", "reasoner/reasoner", "distil/pipeline"
VOCABULARY = "teacher/tokenizer"
TABLE = (
    Stage("vae", "vae:train_vae", (VAE,), config=("world", "vae"), part="reasoner/vae"),
    Stage("vae-decoder", "vae:refine_decoder", ("vae_decoder/vae",), (VAE,), ("world", "vae_decoder")),
    Stage("decoder", "decoder:train_decoder", (DECODER,), (VAE,), ("world", "decoder"), part="decoder.safetensors"),
    Stage("latents", "reasoner:encode_latents", ("latents",), (VAE,), ("world", "latents")),
    Stage("reasoner", "reasoner:train_reasoner", (REASONER,), (VAE, "latents"), ("reasoner",), part="reasoner"),
    Stage("distil", "reasoner:distil", (STUDENT,), (REASONER,), ("world", "distil")),
    Stage("teacher", "teacher.train:pretrain", ("teacher", VOCABULARY), config=("teacher",), part="teacher"),
    Stage("collect", "collect:collect", ("collect",), (STUDENT, DECODER), ("world", "collect")),
    Stage(
        "teacher-finetune",
        "teacher.train:finetune",
        makes=("finetune/teacher",),
        needs=(VOCABULARY, "collect"),
        config=("teacher", "teacher_finetune"),
        start="teacher",
    ),
    Stage(
        "optimise", "collect:optimise", ("collect",), (STUDENT, DECODER), ("world", "collect"), start="finetune/teacher"
    ),
    Stage(
        "teacher-point",
        "teacher.point:train_pointing",
        makes=("point/teacher",),
        needs=(VOCABULARY, STUDENT, DECODER),
        config=("world", "teacher", "teacher_point"),
        start="finetune/teacher",
        gpu=True,
    ),
    Stage(
        "writer",
        "teacher.writer:train_writer",
        makes=("writer/writer",),
        needs=(VOCABULARY,),
        config=("teacher", "writer"),
        start="point/teacher",
    ),
    Stage(
        "package",
        "package:package",
        makes=("pair",),
        needs=(STUDENT, REASONER, "vae_decoder/vae", DECODER, "point/teacher", "writer/writer"),
    ),
    Stage("encoder", "encoder:train_encoder", ("encoder/encoder.safetensors",), config=("encoder",)),
)
STAGES = {stage.name: stage for stage in TABLE}


def find_stage(name: str) -> Stage:
    """The stage of a name. Raises InputError for an unknown one."""
    if name not in STAGES:
        raise InputError(f"unknown stage {name!r}: choose from {', '.join(STAGES)}")
    return STAGES[name]


def run(name: str, out: Path, init: Path | None = None, device: str = "cpu") -> None:
    """Run one stage in the folder `out`, from scratch or from the weights of the pair in the folder `init`.

    Raises InputError: the stage is unknown, cannot use the device or cannot start from a pair; the result of an earlier
    stage does not exist; `init` is no pair, or its part has other sizes.
    """
    stage = find_stage(name)
    start = out / stage.start if stage.start else None
    if init:
        start = part_of_pair(stage, init)
    execute(stage, Run(out, out / stage.folder, settings_of(stage), start, device))


def settings_of(stage: Stage) -> dict[str, Any]:
    """The packaged settings of a stage."""
    return {key: value for source in stage.config for key, value in load_config(source).items()}


def check_pair(pair: Path) -> None:
    """Raise InputError where a folder holds no pair."""
    if not (pair / "pair.json").exists():
        raise InputError(f"{pair} holds no pair.json: --init takes the folder of a pair")


def part_of_pair(stage: Stage, pair: Path) -> Path:
    """The part of a pair whose weights the stage can start from. Raises InputError."""
    check_pair(pair)
    if not stage.part:
        starting = ", ".join(other.name for other in TABLE if other.part)
        raise InputError(f"stage {stage.name} starts from no other weights: leave out --init ({starting} take it)")
    return pair / stage.part


def execute(stage: Stage, run: Run) -> None:
    """Run a stage as `run` says. Raises InputError: see `run`."""
    if run.device != "cpu" and not stage.gpu:
        able = ", ".join(other.name for other in TABLE if other.gpu)
        raise InputError(f"stage {stage.name} is for the CPU: leave out --device {run.device}, which only {able} takes")
    needed = [run.path(need) for need in stage.needs]
    if stage.start and run.start:
        needed.append(run.start)
    for path in needed:
        if not path.exists():
            raise InputError(f"stage {stage.name} needs {path}: run the stage that makes it first")
    module, function = stage.function.split(":")
    getattr(import_module(f"recipes.microworld.{module}"), function)(run)
