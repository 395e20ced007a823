"""`vlmteacher ui`: a page in the browser to solve tasks, edit the questions, and look at runs and sweeps."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmteacher import settings
from vlmteacher.cli.flags import Commands, add_command, add_reasoner, add_teacher
from vlmteacher.errors import InputError

CALLS = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt")


def add(commands: Commands) -> None:
    sub = add_command(commands, "ui", run, "a page in the browser: tasks, questions, runs, sweeps")
    sub.usage = "vlmteacher ui [--port N] [--runs DIR] [OPTION ...]"
    page, models, sampling, place = (
        sub.add_argument_group(title) for title in ("The page", "Models", "Sampling and size", "Devices and memory")
    )
    page.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default: 127.0.0.1)")
    page.add_argument("--port", type=int, default=7860, metavar="N", help="default: 7860; 0: a free one")
    page.add_argument("--runs", default="runs", metavar="DIR", help="folder of all runs and sweeps (default: runs)")
    add_teacher(models)
    add_reasoner(models, sampling, place)
    settings.add_flags(sub)
    sub.set_defaults(lora_partial=False, vae_dtype=None, fp8=False, quantize_reasoner=None)  # flags of `solve` alone


def run(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.port < 65536:
        raise InputError(f"--port must be from 0 to 65535, not {arguments.port}")
    from vlmteacher.app.server import import_gradio, listen, serve
    from vlmteacher.cli.solve import keep_activations, load_pipeline
    from vlmteacher.quiet import quiet
    from vlmteacher.runs.folder import checked

    import_gradio()
    runs = checked(arguments.runs)
    quiet()
    keywords = settings.given(arguments)
    settings.Settings().updated(**keywords)  # raises for bad values before any model is loaded
    with listen(arguments.host, arguments.port) as sock:
        pipe = load_pipeline(arguments)
        keep_activations(arguments, pipe)
        calls = {name: getattr(arguments, name) for name in CALLS}
        with serve(pipe, sock, Path(runs), keywords, calls, arguments.host) as served:
            print(f"Open {served.url} in a browser (Ctrl-C ends; a run at work keeps its state)", flush=True)
            while served.thread.is_alive():
                served.thread.join(0.5)
