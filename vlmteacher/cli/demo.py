"""`vlmteacher demo`: solve one packaged example with the packaged pair of models."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmteacher import settings
from vlmteacher.cli.console import add_tracker, tracked
from vlmteacher.cli.flags import Commands, add_command
from vlmteacher.cli.run_folder import check_converged, check_run_folder, print_folder, print_result


def add(commands: Commands) -> None:
    sub = add_command(commands, "demo", run, "solve one packaged example with the packaged pair of models")
    sub.add_argument("--out", metavar="DIR", help="run folder to write (default: runs/demo, runs/demo-2, ...)")
    sub.add_argument("--resume", action="store_true", help="continue the interrupted run in --out (default: runs/demo)")
    settings.add_flags(sub, "fused_lora")
    add_tracker(sub)


def run(arguments: argparse.Namespace) -> None:
    if arguments.out is None:
        arguments.out = "runs/demo" if arguments.resume else _first_free("runs/demo")
    out = Path(arguments.out)
    check_run_folder(arguments)
    from vlmteacher.quiet import quiet

    quiet(notices=not arguments.quiet)
    import numpy as np
    import torch

    from vlmteacher.microworld.example import packaged_example
    from vlmteacher.microworld.scorer import score
    from vlmteacher.pipeline import TeacherPipeline
    from vlmteacher.placement import describe, find_devices, find_dtype

    example = packaged_example()
    devices = find_devices(None)
    print(describe(devices, find_dtype(devices)))
    with tracked(arguments, out):
        pipe = TeacherPipeline.from_pretrained()
        print(f"Task: {example.prompt}", flush=True)
        output = pipe(
            example.prompt,
            example.image,
            generator=torch.Generator().manual_seed(example.seed),
            output_type="np",
            fused_lora=arguments.fused_lora,
            run_dir=out,
            resume=arguments.resume,
        )
    print_result(output)
    scores = {}
    for name, frames in (("before", output.frames_before), ("after", output.frames)):
        verdict = score(np.asarray(frames), example.scene)
        scores[name] = {"success": verdict.success, "score": verdict.score, "subscores": verdict.subscores}
        parts = ", ".join(f"{part} {value:.2f}" for part, value in verdict.subscores.items())
        print(f"Rule scorer {name}: {'success' if verdict.success else 'failure'}, score {verdict.score:.2f} ({parts})")
    print_folder(arguments, output, scores=scores)
    check_converged(output)


def _first_free(path: str) -> Path:
    number = 1
    while (candidate := Path(path if number == 1 else f"{path}-{number}")).exists():
        number += 1
    return candidate
