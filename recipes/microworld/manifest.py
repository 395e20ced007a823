"""The runs by which the packaged models were made, in their order: which stage, from what, with which settings.

They were made by hand from the stages, and not everything about them was written down. What an entry lacks or replaces
stands in its `unlike`; a replay gives models of the same kind, not the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recipes.microworld.stages import STAGES
from vlmteacher.errors import InputError

AVERAGE = "average"  # the stage of an entry that averages the weights of others


@dataclass(frozen=True)
class Entry:
    """One run of the manifest.

    Attributes:
        name: the run's name.
        stage: the stage that it runs.
        start: the run whose result it trains further.
        settings: those that differ from the stage's packaged ones; an average has the shares of the averaged runs.
        until: the step it stopped at, where its schedule was made for more.
        continues: the run that it continues, optimizer included.
        instead: runs that take the place of a stage's own result, by the stage's folder.
        result: what the run gave.
        unlike: what the record lacks, or what a replay does in another way; empty where it repeats the run as it was.
    """

    name: str
    stage: str
    start: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    until: int | None = None
    continues: str | None = None
    instead: Mapping[str, str] = field(default_factory=dict)
    result: str = ""
    unlike: str = ""

    @property
    def folder(self) -> str:
        """The run's folder in the folder of all runs: that of its stage, where it is the only run of it."""
        return STAGES[self.name].folder if self.name in STAGES else self.name


@dataclass(frozen=True)
class Manifest:
    """The runs that make a pair.

    Attributes:
        entries: the runs, in their order.
        settings: for every stage that has them, in place of the packaged ones.
        of_pair: results that no run makes but the pair before has, and where it has them.
    """

    entries: tuple[Entry, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    of_pair: Mapping[str, str] = field(default_factory=dict)

    def find(self, name: str) -> Entry:
        """The entry of a name. Raises InputError for an unknown one."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise InputError(f"unknown run {name!r}: choose from {', '.join(entry.name for entry in self.entries)}")

    def folder(self, name: str) -> str:
        """The folder of the run of a name."""
        return self.find(name).folder

    def selected(self, first: str | None, last: str | None) -> tuple[Entry, ...]:
        """The entries from `first` to `last`, by default all. Raises InputError: unknown; `last` before `first`."""
        names = [entry.name for entry in self.entries]
        for name in (first, last):
            if name is not None:
                self.find(name)
        begin, end = names.index(first or names[0]), names.index(last or names[-1])
        if end < begin:
            raise InputError(f"--to {last} comes before --from {first}: exchange them")
        return self.entries[begin : end + 1]


EARLIER_PAIR = "started from the weights of the pair before this one, of two families: --init PAIR, where you have it"
MIXTURE = "the mixture of collected videos, the learning rate and the seed are not recorded, but assumed here"
OPTION = "pointing was an option of teacher-finetune then, one optimisation after the other, beside its own losses"
POINTING = {"mix": 1.0, "longest": 40, "runs": 64, "outside": 0.25}
RELEARNT = {
    "steps": 1400,
    "learn": ["deliver", "rotate", "sort", "connect"],
    "keep": 8.0,
    "outside": 0.35,
    "write_every": 0,
    "blend_every": 0,
}
PLAIN = {"adversary": 0.0, "blend_every": 0, "learning_rate": 7e-4, "seed": 21}

ENTRIES = (
    Entry("vae", "vae", result="PSNR of 28.7 on its clips (logs/vae.jsonl)", unlike=EARLIER_PAIR),
    Entry("vae-decoder", "vae-decoder", result="PSNR of 29.5 (logs/vae_decoder.jsonl)"),
    Entry("decoder", "decoder", result="PSNR of 25.8 (logs/decoder.jsonl)", unlike=EARLIER_PAIR),
    Entry("latents", "latents", result="24,000 latents with their prompts"),
    Entry(
        "reasoner-begun",
        "reasoner",
        settings={"steps": 8000},
        until=3000,
        result="the many-step model, its first 3,000 steps scheduled for 8,000",
        unlike=EARLIER_PAIR,
    ),
    Entry(
        "reasoner",
        "reasoner",
        continues="reasoner-begun",
        result="many_step/: a velocity error of .124, of .088 at the first noise level (logs/reasoner.jsonl)",
    ),
    Entry("distil", "distil", result="the Reasoner (logs/distil.jsonl)"),
    Entry("teacher", "teacher", result="a Teacher of rendered videos (logs/teacher.jsonl)", unlike=EARLIER_PAIR),
    Entry("collect", "collect", result="lessons and predictions to fine-tune on"),
    Entry(
        "teacher-finetune-1",
        "teacher-finetune",
        start="teacher",
        settings={**PLAIN, "steps": 1500},
        result="logs/teacher_finetune_1.jsonl",
        unlike=f"the predictions were those of the many-step model; {MIXTURE}",
    ),
    Entry(
        "optimise",
        "optimise",
        start="teacher-finetune-1",
        result="predictions in the course of optimisations",
        unlike="new ones were collected by the Teacher of then, at times that are not recorded; a replay collects once",
    ),
    Entry(
        "teacher-finetune-2",
        "teacher-finetune",
        start="teacher-finetune-1",
        settings={**PLAIN, "steps": 1500},
        result="logs/teacher_finetune_2.jsonl",
        unlike=MIXTURE,
    ),
    Entry(
        "teacher-finetune-3",
        "teacher-finetune",
        start="teacher-finetune-2",
        settings={**PLAIN, "steps": 2400},
        result="hard negatives alone: success on .38 of 40 validation scenes (logs/teacher_finetune_3.jsonl)",
        unlike=MIXTURE,
    ),
    Entry(
        "teacher-finetune-4",
        "teacher-finetune",
        start="teacher-finetune-3",
        settings={**PLAIN, "steps": 2400, "adversary": 0.1, "write_every": 6},
        result="the first with adversarial steps (logs/teacher_finetune_4.jsonl)",
        unlike=MIXTURE,
    ),
    Entry(
        "teacher-finetune-5",
        "teacher-finetune",
        start="teacher-finetune-4",
        settings={**PLAIN, "steps": 1600, "adversary": 0.1, "write_every": 6},
        result="adversarial steps: .42 of 40 validation scenes (logs/teacher_finetune_5.jsonl)",
        unlike=MIXTURE,
    ),
    Entry(
        "teacher-finetune-6",
        "teacher-finetune",
        start="teacher-finetune-5",
        settings={"steps": 1400},
        result="the first with fading (logs/teacher_finetune_6.jsonl)",
        unlike=MIXTURE,
    ),
    Entry(
        "teacher-finetune-7",
        "teacher-finetune",
        start="teacher-finetune-6",
        settings={"steps": 1200},
        result="fading: .42 of 40 validation scenes (logs/teacher_finetune_7.jsonl)",
        unlike=MIXTURE,
    ),
    Entry(
        "teacher-finetune-8",
        "teacher-finetune",
        start="teacher-finetune-7",
        result="logs/teacher_finetune_8.jsonl",
        unlike="which of the two has the packaged seed is not recorded",
    ),
    Entry(
        "teacher-finetune-9",
        "teacher-finetune",
        start="teacher-finetune-7",
        settings={"seed": 32},
        result="as teacher-finetune-8 but for the seed (logs/teacher_finetune_9.jsonl)",
        unlike="the seed is not recorded: the one here is assumed",
    ),
    Entry(
        "before-pointing",
        AVERAGE,
        settings={"shares": {"teacher-finetune-8": 0.5, "teacher-finetune-9": 0.5}},
        result=".52 of 40 and of 80 validation scenes",
    ),
    Entry(
        "teacher-finetune-10-begun",
        "teacher-point",
        start="before-pointing",
        settings={**POINTING, "steps": 1000, "learning_rate": 6e-4},
        until=500,
        result="the first 500 steps of teacher-finetune-10",
        unlike=OPTION,
    ),
    Entry(
        "teacher-finetune-10",
        "teacher-point",
        start="before-pointing",
        settings={**POINTING, "steps": 1000, "learning_rate": 6e-4},
        continues="teacher-finetune-10-begun",
        result="logs/teacher_finetune_10.jsonl",
        unlike=OPTION,
    ),
    Entry(
        "teacher-finetune-11",
        "teacher-point",
        start="teacher-finetune-10-begun",
        settings={**POINTING, "steps": 500, "learning_rate": 6e-4, "seed": 61},
        result="logs/teacher_finetune_11.jsonl",
        unlike=f"{OPTION}; the seed is not recorded: the one here is assumed",
    ),
    Entry(
        "pointing-begun",
        AVERAGE,
        settings={"shares": {"teacher-finetune-10": 0.5, "teacher-finetune-11": 0.5}},
    ),
    Entry(
        "teacher-finetune-12",
        "teacher-point",
        start="pointing-begun",
        settings={**POINTING, "steps": 640, "learning_rate": 5e-4, "seed": 62},
        result="logs/teacher_finetune_12.jsonl",
        unlike=OPTION,
    ),
    Entry(
        "teacher-finetune-13",
        "teacher-point",
        start="pointing-begun",
        settings={**POINTING, "steps": 640, "learning_rate": 5e-4, "seed": 63},
        result="logs/teacher_finetune_13.jsonl",
        unlike=f"{OPTION}; the seed is not recorded: the one here is assumed",
    ),
    Entry(
        "pointing",
        AVERAGE,
        settings={"shares": {"teacher-finetune-12": 0.5, "teacher-finetune-13": 0.5}},
        result="pointing alone: .42 of 40 validation scenes",
    ),
    Entry(
        "before-relearning",
        AVERAGE,
        settings={"shares": {"before-pointing": 0.25, "pointing": 0.75}},
        result=".60 of 80 validation scenes; .56 with half of pointing and .50 with a quarter of it",
        unlike="the training-only heads are those of before-pointing; the others' were trained further",
    ),
    Entry(
        "teacher-finetune-14",
        "teacher-finetune",
        start="before-relearning",
        settings={**RELEARNT, "learning_rate": 2e-4},
        result="logs/teacher_finetune_14.jsonl",
        unlike="the seed is not recorded, and one question about all balls of deliver was asked that is gone",
    ),
    Entry(
        "teacher-finetune-15",
        "teacher-finetune",
        start="before-relearning",
        settings={**RELEARNT, "learning_rate": 4e-4},
        result="logs/teacher_finetune_15.jsonl",
        unlike="the seed is not recorded, and one question about all balls of deliver was asked that is gone",
    ),
    Entry(
        "relearnt",
        AVERAGE,
        settings={"shares": {"teacher-finetune-14": 0.5, "teacher-finetune-15": 0.5}},
        result=".62 of 80 validation scenes; 59 and 44 of 100 test scenes in and out of domain",
    ),
    Entry("writer", "writer", start="relearnt", result="right queries for 117 of 120 scenes (logs/writer.jsonl)"),
    Entry(
        "teacher-point",
        "teacher-point",
        start="relearnt",
        result="its mean with relearnt: .615 of 200 scenes in domain, .475 out of it; 66 and 50 of 100 test scenes",
        unlike="it was stopped by time, at 366 steps and .3 of its learning rate; its videos through the surrogate"
        " decoder were 2,000 made beforehand",
    ),
    Entry(
        "writer-2",
        "writer",
        start="teacher-point",
        settings={"steps": 900, "learning_rate": 5e-4, "adapter": "writer"},
        result="right queries for all of 160 scenes (logs/writer_2.jsonl)",
        unlike="the seed is not recorded: the packaged one is assumed",
    ),
    Entry("package", "package", instead={"point": "teacher-point", "writer": "writer-2"}, result="the packaged pair"),
    Entry(
        "encoder",
        "encoder",
        result="the encoder of the video distance (logs/encoder.jsonl)",
        unlike="the packaged one was trained when the world had two families, and other readouts",
    ),
)

SINGLE = Manifest(ENTRIES, settings={"flaws": "single"})
