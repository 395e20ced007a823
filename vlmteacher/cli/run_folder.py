"""What `demo` and `solve` share: the check of the run folder, and the result as they print it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmteacher.pipeline import TeacherPipelineOutput


def check_run_folder(arguments: argparse.Namespace) -> None:
    """Raise InputError for a folder that cannot be used, before any model is loaded."""
    from vlmteacher.files import claimed
    from vlmteacher.runs.folder import RunFolder, checked

    with claimed(checked(arguments.out)):
        RunFolder(arguments.out, arguments.resume)


def print_result(output: TeacherPipelineOutput) -> None:
    """Print the number of updates, the seconds, P(Yes) of each question and each reward before and after."""
    reasons = {"threshold": "the threshold was reached", "max_steps": "no step was left", "diverged": "diverged"}
    reason = reasons[output.stopped]
    steps, total = output.seconds["steps"], output.seconds["total"]
    print(f"{output.updates} updates in {steps:.1f} s ({reason}), {total:.1f} s in all")
    first = output.p_yes_before if output.config["before"] else None
    print("P(Yes) before -> after" if first else "P(Yes)")
    for number, (question, after) in enumerate(zip(output.queries.questions, output.p_yes_after, strict=True)):
        print(f"  {f'{first[number]:.2f} -> ' if first else ''}{after:.2f}  {question}")
    if own := output.rewards:
        print("rewards before -> after, times their weight")
        for name, weight in own["weights"].items():
            print(f"  {own['before'][name]:.4g} -> {own['after'][name]:.4g}  {weight:g} x {name}")


def print_folder(arguments: argparse.Namespace, output: TeacherPipelineOutput, **more: Any) -> None:
    """Print the names of the files in the run folder, and the verdict: the result. more: entries of its JSON."""
    path, console = Path(arguments.out), arguments.console
    files = sorted(file.name for file in path.iterdir() if file.suffix != ".pt")
    console.last(f"Run folder {path}: {' '.join(files)}")
    console.last(str(output.verdict))
    record = output.record()
    names = ("stopped", "updates", "loss_before", "loss_after", "p_yes_before", "p_yes_after", "rewards", "seconds")
    entries = {name: record.get(name) for name in names}
    command = arguments.command.prog.split()[-1]
    console.result(command, out=str(path), files=files, verdict=record["verdict"], **entries, **more)


def check_converged(output: TeacherPipelineOutput) -> None:
    """Raise ArithmeticError when the optimisation diverged."""
    if output.stopped == "diverged":
        why = output.history[-1]["rolled_back"]
        raise ArithmeticError(f"the optimisation diverged ({why}); the best LoRA before is kept: try a lower --lr")
