from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import Run
from tests.tiny_pair import PROMPT


def test_help_comes_at_once() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "vlmteacher", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "solve" in result.stdout and "demo" in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "transformers", "diffusers", "peft", "PIL"}
    assert len(imported) < 250  # of Python's own: 0.1 s


def test_version_and_usage_errors(run: Run) -> None:
    status, out, _ = run("--version")
    assert status == 0 and re.fullmatch(r"vlmteacher \d+\.\d+\.\d+\n", out)
    for arguments in ([], ["nothing"], ["solve", "--out", "x"], ["bench", "chess", "--method", "base", "--out", "x"]):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1


def test_notices_and_texts_on_a_narrow_terminal(tmp_path: Path) -> None:
    """A notice is a line, and no text fails to be printed: run as a process, for a test's own streams are others."""
    Image.new("RGBA", (8, 8)).save(tmp_path / "cle\u00e4r.png")
    arguments = ["--prompt", PROMPT, "--image", tmp_path / "cle\u00e4r.png", "-o", tmp_path / "none" / "q.json"]
    command = [sys.executable, "-m", "vlmteacher", "queries", *map(str, arguments)]
    for encoding in ("ascii:strict", "utf-8:strict"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        result = subprocess.run(command, capture_output=True, env=environment)
        warning, error = result.stderr.splitlines()
        name = b"cle\\xe4r.png" if encoding.startswith("ascii") else "cle\u00e4r.png".encode()
        assert result.returncode == 2 and error.startswith(b"error: queries file") and result.stdout == b""
        assert warning.startswith(b"warning: image /") and warning.endswith(
            name + b" is transparent in places: they are taken as white"
        )


def test_an_unknown_flag_is_one_line(run: Run) -> None:
    status, _, err = run("queries", "--prompt", "x", "--what\x85ever\nelse")
    assert status == 2 and len(err.splitlines()) == 1 and "--what ever else" in err


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_the_extra_for_quantised_teachers_is_named(run: Run, solve: Any, tmp_path: Path) -> None:
    for command in (["queries", "--prompt", PROMPT], solve(out=tmp_path / "run")):
        status, out, err = run(*command, "--quantize", "4bit")
        assert status == 2 and re.fullmatch(r"(cpu \(.*\), float32\n)?", out)
        assert "pip install 'vlmteacher[quantized]'" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "guess"),
    [
        ("slove", "solve"),
        ("env --jsn", "--json"),
        ("solve --prompt x --out y --guidence-scale=3", "--guidance-scale"),
        ("solve --prompt x --out y --keep bst", "best"),
        ("env --entirely-different", None),
    ],
)
def test_what_was_meant_is_guessed(run: Run, arguments: str, guess: str | None) -> None:
    status, out, err = run(*arguments.split())
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert (f"did you mean {guess}?" in err) if guess else "did you mean" not in err


def test_the_completion_of_a_shell_knows_commands_and_flags(run: Run) -> None:
    status, out, _ = run("--print-completion", "bash")
    assert status == 0 and "distill" in out and "--guidance-scale" in out
    subprocess.run(["bash", "-n"], input=out, text=True, check=True)


def test_downloads_are_shown_and_loading_is_not() -> None:
    code = (
        "from vlmteacher.quiet import quiet; quiet();"
        "from huggingface_hub.utils import are_progress_bars_disabled as hub;"
        "from transformers.utils.logging import is_progress_bar_enabled as loading;"
        "assert not hub() and not loading()"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_PROGRESS_BARS"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parents[2])
