"""Average the weights of Teachers."""

from __future__ import annotations

import copy
import shutil

import torch
from transformers import Qwen3VLForConditionalGeneration

from recipes.microworld.training import Run, adopt
from vlmteacher.checkpoints.pretrained import load_network, load_tokenizer
from vlmteacher.distillation.trainer import FORM, STATE
from vlmteacher.files import make_folder
from vlmteacher.state import write_state


def average(run: Run) -> None:
    """Write the weighted mean of the Teachers of other runs, the `shares` in the settings, as a Teacher and as a state.

    A share may name the Teacher of a pair, a result that the run is given; embeddings are averaged token by token, for
    the words of the first. The training-only heads are those of the first run that has any.
    """
    shares: dict[str, float] = run.config["shares"]
    folders = [run.path(name) if name in run.given else run.path(name) / "teacher" for name in shares]
    networks = [load_network(Qwen3VLForConditionalGeneration, folder, dtype=torch.float32) for folder in folders]
    tokenizers = [load_tokenizer(folder) for folder in folders]
    for place, tokenizer in enumerate(tokenizers):
        if tokenizer.get_vocab() != tokenizers[0].get_vocab():
            network = copy.deepcopy(networks[0])
            adopt(network, networks[place], tokenizers[0], tokenizer)
            networks[place] = network
    states = [network.state_dict() for network in networks]
    mean = {
        key: torch.stack([share * state[key] for share, state in zip(shares.values(), states, strict=True)]).sum(0)
        for key in states[0]
    }
    modules = {"teacher": mean}
    for name in [name for name in shares if name not in run.given]:
        trained = torch.load(run.path(name) / STATE, weights_only=True)["modules"]
        if "heads" in trained:
            modules["heads"] = trained["heads"]
            break
    make_folder((run.out / STATE).parent)
    write_state(run.out / STATE, FORM, {"modules": modules})
    shutil.copytree(folders[0], run.out / "teacher", dirs_exist_ok=True)
    networks[0].load_state_dict(mean)
    networks[0].save_pretrained(run.out / "teacher")
