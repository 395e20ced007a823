"""A training of a stage resumes exactly, continues another, and starts from known weights."""

import json
import shutil

import pytest
import torch
from torch import nn

from recipes.microworld import training
from recipes.microworld.training import Run, train
from vlmteacher.distillation.trainer import STATE
from vlmteacher.errors import InputError
from vlmteacher.microworld.tokenizer import build_tokenizer


def fit(out, stop_at: int | None = None, until=None, continues=None, **changes) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def step(index, rng):
        if index == stop_at:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.normal(size=(8, 3))).float()
        loss = (model(x)[:, 0] - x.sum(1)).square().mean()
        return loss, {"double": 2 * float(loss.detach())}

    config = {"steps": 30, "learning_rate": 0.05, "seed": 1} | changes
    run = Run(out.parent, out, config, until=until, continues=continues)
    train({"model": model}, step, run, save_every=5, log_every=10, ema=0.9)
    return model.weight.detach().clone()


def test_interrupted_training_resumes_to_the_same_weights(tmp_path):
    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", stop_at=17)
    assert torch.equal(fit(tmp_path / "cut"), whole)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_run_continues_another(tmp_path):
    """One that was stopped amid its schedule goes on to what it would have been; or with another seed elsewhere."""
    whole, half = fit(tmp_path / "whole"), fit(tmp_path / "half", until=12)
    same = fit(tmp_path / "same", continues=tmp_path / "half")
    assert torch.equal(same, whole) and not torch.equal(half, whole)
    assert not torch.equal(fit(tmp_path / "other", continues=tmp_path / "half", seed=2), whole)
    with pytest.raises(InputError, match=r"trained with other settings: seed \(1, now 2\)"):
        fit(tmp_path / "half", seed=2)


def test_the_state_of_an_earlier_release_resumes(tmp_path):
    """Stages had a loop of their own, with one optimizer and the state in another place."""
    whole = fit(tmp_path / "whole")
    fit(tmp_path / "old", until=12)
    state = torch.load(tmp_path / "old" / STATE, weights_only=True)
    state["optimizer"] = state.pop("optimizers")["adamw"]
    shutil.rmtree((tmp_path / "old" / STATE).parent)
    torch.save(state | {"form": training.EARLIER_FORM}, tmp_path / "old/state.pt")
    assert torch.equal(fit(tmp_path / "old"), whole)
    assert not (tmp_path / "old/state.pt").exists()


def test_known_weights_are_adopted_token_by_token():
    tokenizers = [build_tokenizer([text], 300) for text in ("the red red ball", "a red blue box the ball")]
    new, old = nn.Embedding(len(tokenizers[0]), 4), nn.Embedding(len(tokenizers[1]), 4)
    before = new.weight.detach().clone()
    training.adopt(new, old, *tokenizers)
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    assert vocabularies[0] != vocabularies[1]
    for token, index in vocabularies[0].items():
        same = old.weight[vocabularies[1][token]] if token in vocabularies[1] else before[index]
        assert torch.equal(new.weight[index], same), token
    with pytest.raises(InputError, match="no fitting weight"):
        training.adopt(nn.Linear(2, 3), nn.Linear(2, 4))
