"""Average the weights of Teachers."""

from __future__ import annotations

import shutil

import torch
from transformers import Qwen3VLForConditionalGeneration

from recipes.microworld.training import Run
from vlmteacher.checkpoints.pretrained import load_network
from vlmteacher.distillation.trainer import FORM, STATE
from vlmteacher.files import make_folder
from vlmteacher.state import write_state


def average(run: Run) -> None:
    """Write the weighted mean of the Teachers of other runs, the `shares` in the settings, as a Teacher and as a state.

    The training-only heads are those of the first run that has any.
    """
    shares: dict[str, float] = run.config["shares"]
    networks = [
        load_network(Qwen3VLForConditionalGeneration, run.path(name) / "teacher", dtype=torch.float32)
        for name in shares
    ]
    states = [network.state_dict() for network in networks]
    mean = {
        key: torch.stack([share * state[key] for share, state in zip(shares.values(), states, strict=True)]).sum(0)
        for key in states[0]
    }
    modules = {"teacher": mean}
    for name in shares:
        trained = torch.load(run.path(name) / STATE, weights_only=True)["modules"]
        if "heads" in trained:
            modules["heads"] = trained["heads"]
            break
    make_folder((run.out / STATE).parent)
    write_state(run.out / STATE, FORM, {"modules": modules})
    shutil.copytree(run.path(next(iter(shares))) / "teacher", run.out / "teacher", dirs_exist_ok=True)
    networks[0].load_state_dict(mean)
    networks[0].save_pretrained(run.out / "teacher")
