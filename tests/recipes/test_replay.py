"""The manifest of the packaged models is consistent, and a command replays it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from recipes.microworld import stages, training
from recipes.microworld.__main__ import parser
from recipes.microworld.manifest import AVERAGE
from recipes.microworld.replay import JOURNAL, MANIFESTS, SINGLE, describe, listing, replay, stage_of
from vlmteacher.cli import run
from vlmteacher.errors import InputError

TINY = {
    "vae": {"base_dim": 8},
    "vae_decoder": {"batch": 1},
    "decoder": {"widths": [16, 8, 8, 8], "batch": 1},
    "reasoner": {"layers": 1, "heads": 1, "ffn_dim": 64, "batch": 2},
}
OWN_SETTINGS = {"shares", "adapter"}  # that no packaged configuration has


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Networks of a few thousand parameters, so that a shortened replay takes seconds."""
    folder = tmp_path / "configs"
    folder.mkdir()
    for path in training.CONFIGS.iterdir():
        (folder / path.name).write_text(json.dumps(json.loads(path.read_text()) | TINY.get(path.stem, {})))
    monkeypatch.setattr(training, "CONFIGS", folder)


@pytest.mark.parametrize("name", MANIFESTS)
def test_entries_refer_to_earlier_ones_and_to_known_settings(name):
    manifest, seen = MANIFESTS[name], set()
    for entry in manifest.entries:
        used = [name for name in (entry.start, entry.continues, *entry.instead.values()) if name]
        assert seen.union(manifest.of_pair).issuperset([*used, *entry.settings.get("shares", ())]), entry.name
        assert entry.stage == AVERAGE or entry.stage in stages.STAGES
        assert entry.settings.keys() - OWN_SETTINGS <= stages.settings_of(stage_of(manifest, entry)).keys(), entry.name
        assert entry.stage != AVERAGE or sum(entry.settings["shares"].values()) == 1
        assert entry.name not in seen
        seen.add(entry.name)
    assert all(entry.name in listing(manifest) for entry in manifest.entries)


def test_the_teacher_before_was_fine_tuned_fifteen_times():
    names = [entry.name for entry in SINGLE.entries]
    assert sum(name.startswith("teacher-finetune-") and "begun" not in name for name in names) == 15


@pytest.mark.slow
def test_a_shortened_replay_resumes_and_keeps_what_is_finished(tiny, tmp_path, monkeypatch, capsys):
    arguments = ["replay", "--manifest", "single", "--to", "reasoner", "--shorten", "1000", "--out"]
    assert run(parser, [*arguments, str(tmp_path / "whole")]) == 0
    printed = capsys.readouterr().out
    assert "[5/6] reasoner-begun: stage reasoner; 3 steps" in printed
    assert "[6/6] reasoner: stage reasoner; continues reasoner-begun; 11 steps" in printed

    def stopped(modules, step, run, **options):
        def until_third(index, rng):
            if index == 2:
                raise KeyboardInterrupt
            return step(index, rng)

        train(modules, until_third, run, **options)

    train = training.train
    with monkeypatch.context() as patch:
        patch.setattr("recipes.microworld.reasoner.train", stopped)
        assert run(parser, [*arguments, str(tmp_path / "cut")]) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    assert run(parser, [*arguments, str(tmp_path / "cut")]) == 0
    assert "[4/6] latents: finished" in capsys.readouterr().out
    whole, cut = (
        load_file(tmp_path / name / "reasoner/reasoner/transformer/diffusion_pytorch_model.safetensors")
        for name in ("whole", "cut")
    )
    assert all(torch.equal(cut[name], value) for name, value in whole.items())
    assert json.loads((tmp_path / "cut" / JOURNAL).read_text())["reasoner-begun"]["until"] == 3
    with pytest.raises(InputError, match="holds vae with other settings"):
        replay(tmp_path / "cut", "vae", "vae", shorten=500, manifest=SINGLE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["replay", "--from", "vea"], "unknown run 'vea': choose from latents, reasoner"),
        (["replay", "--to", "vea"], "unknown run 'vea': choose from latents, reasoner"),
        (["replay", "--from", "distil", "--to", "latents"], "--to latents comes before --from distil"),
        (["replay", "--shorten", "0"], "--shorten must be at least 1, not 0"),
        (["replay", "--manifest", "single", "--from", "decoder"], "stage decoder needs"),
        (["replay", "--manifest", "single", "--from", "before-pointing"], "stage average needs"),
        (["stage", "vea"], "unknown stage 'vea': choose from vae, vae-decoder"),
        (["replay", "--manifest", "none"], "unknown manifest 'none': choose from both, single"),
        (["replay"], "from a pair: give its folder as --init"),
        (["replay", "--init", "."], "holds no pair.json: --init takes the folder of a pair"),
        (["keep", "--to", "kept"], "holds no finished run of a replay: give the --out of one"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert run(parser, [*arguments, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_list_says_what_cannot_be_repeated(capsys):
    assert run(parser, ["list", "--manifest", "single"]) == 0
    printed = capsys.readouterr().out
    assert "teacher-finetune-13: stage teacher-point; from pointing-begun; 640 steps" in printed
    assert "not exactly repeatable: pointing was an option" in printed


def test_shortening_divides_steps_and_videos_alone():
    entry = SINGLE.find("reasoner-begun")
    whole, short = describe(SINGLE, entry), describe(SINGLE, entry, 1000)
    assert (short["steps"], short["until"]) == (8, 3)
    assert {name for name, value in whole.items() if short[name] != value} == {"steps", "until"}
