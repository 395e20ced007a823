"""Every Reasoner family stands in its own file and in the registry, and nowhere else in the library."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

from vlmteacher.errors import InputError
from vlmteacher.reasoners.registry import FAMILIES, family_of, family_of_pipeline

LIBRARY = Path(__file__).parents[2] / "vlmteacher"
HOMES = {"Wan": "wan/", "LTX-Video": "ltx.py", "HunyuanVideo-1.5": "hunyuan_video15/"}  # in reasoners/
WORDS = {
    "Wan": r"\bWan\b|Wan(?=[A-Z])|(?i:\bwan(?=[\d_.])|fastwan)",
    "LTX-Video": "(?i:ltx)",
    "HunyuanVideo-1.5": "(?i:hunyuan)",
}
MENTIONS = {  # of one family, where something that all share is named after it
    "moved.py",  # old import paths
    "cli/solve.py",  # the help of a flag for models with two experts
    "ops/qk_norm_rope.py",  # a source in diffusers
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_stands_in_its_own_file(family) -> None:
    word, home = re.compile(WORDS[family.name]), f"reasoners/{HOMES[family.name]}"
    places = [
        f"{path.relative_to(LIBRARY)}:{number}: {line}"
        for path in LIBRARY.glob("**/*.py")
        if (name := path.relative_to(LIBRARY).as_posix()) not in {"reasoners/registry.py", *MENTIONS}
        and not name.startswith((home, "microworld/"))  # the world's packaged models are of one family
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if word.search(line)
    ]
    assert places == []


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_a_family_declares(family) -> None:
    assert all(hasattr(diffusers, name) for name in (*family.pipelines, family.transformer))
    assert set(family.hub_ids.values()) <= set(family.presets)
    for preset in family.presets.values():
        preset.check()
    for pipeline in family.pipelines:
        assert family_of_pipeline(pipeline, "a pipeline") is family
    transformer = torch.nn.Module()
    transformer.__class__ = type(family.transformer, (torch.nn.Module,), {})
    assert family_of(transformer) is family
    known = [json.loads(path.read_text()) for path in LIBRARY.glob("known_models/*.json")]
    decoders = {path.stem for path in LIBRARY.glob("known_models/*.json")}
    models = [model for model in known if model.get("pipeline") in family.pipelines]
    assert models and all(model["decoder"] in decoders for model in models)


def test_no_two_families_declare_the_same() -> None:
    for name in ("pipelines", "presets", "hub_ids", "decoders"):
        declared = [entry for family in FAMILIES for entry in getattr(family, name)]
        assert len(declared) == len(set(declared)), name


def test_unknown_classes() -> None:
    with pytest.raises(InputError, match="x is a FluxPipeline: the known Reasoners are WanPipeline, "):
        family_of_pipeline("FluxPipeline", "x")
    with pytest.raises(InputError, match="unknown transformer Linear: choose from WanTransformer3DModel, "):
        family_of(torch.nn.Linear(1, 1))


def test_the_registry_imports_no_models() -> None:
    code = "import sys, vlmteacher.reasoners.registry; print(*{'diffusers', 'transformers', 'peft'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=LIBRARY.parent, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
