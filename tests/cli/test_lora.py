from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.conftest import Run
from vlmteacher import cli
from vlmteacher.cli import parser


def test_a_lora_is_converted_and_gone_on_from(run: Run, solve: Any, tmp_path: Path) -> None:
    assert run(*solve(out=tmp_path / "run"))[0] == 0
    lora, musubi, back = tmp_path / "run" / "lora.safetensors", tmp_path / "m.safetensors", tmp_path / "d.safetensors"
    status, out, err = run("lora", "convert", lora, "--to", "musubi", "-o", musubi)
    assert (status, err) == (0, "") and out == f"20 layers, rank 2, alpha 2, as musubi names them: {musubi}\n"
    assert run("lora", "convert", musubi, "--to", "diffusers", "-o", back)[0] == 0
    theirs, ours = load_file(back), load_file(lora)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], value) for name, value in ours.items())
    status, out, _ = run(*solve(out=tmp_path / "more", rank=None, max_steps=1), "--lora", musubi)
    first, second = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "more"))
    assert status == 0 and second["p_yes_before"] == first["p_yes_after"] and second["config"]["rank"] == 2
    for arguments, message in (
        (("lora", "convert", tmp_path / "x", "--to", "musubi", "-o", back), "x cannot be read (No such file"),
        (("lora", "convert", lora, "--to", "musubi", "-o", tmp_path), "give the name of a file"),
        (("lora", "convert", lora, "--to", "kohya", "-o", back), "invalid choice: 'kohya'"),
        ((*solve(out=tmp_path / "bad"), "--lora", tmp_path / "run" / "run.json"), "give a complete .safetensors file"),
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "") and message in err and err.count("\n") == 1
    assert not (tmp_path / "bad").exists()


def test_the_documented_commands_for_loras() -> None:
    text = (Path(__file__).parents[2] / "docs" / "guides" / "lora_files.md").read_text()
    commands = re.findall(r"^    (vlmteacher .+)$", text, re.MULTILINE)
    parsed = [parser().parse_args(shlex.split(command)[1:]) for command in commands]
    convert, solve = cli.lora.run, cli.solve.run
    expected = [convert, convert, solve, solve, cli.bench.run, cli.lora.push]
    assert [arguments.run for arguments in parsed] == expected
