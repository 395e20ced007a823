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
HOMES = {  # in reasoners/; HunyuanVideo shares an attention with 1.5
    "Wan": "wan/",
    "Wan VACE": "wan/vace.py",
    "SkyReels-V2": "wan/skyreels.py",
    "ChronoEdit": "wan/chronoedit.py",
    "LTX-Video": "ltx.py",
    "LTX-2": "ltx2.py",
    "HunyuanVideo-1.5": "hunyuan_video",
    "HunyuanVideo": "hunyuan_video",
    "CogVideoX": "cogvideox.py",
    "Cosmos-Predict 2.5": "cosmos25.py",
}
WORDS = {
    "Wan": r"\bWan\b|Wan(?=[A-Z])|(?i:\bwan(?=[\d_.])|fastwan)",
    "Wan VACE": "(?i:vace)",
    "SkyReels-V2": "(?i:skyreels)",
    "ChronoEdit": "(?i:chronoedit)",
    "LTX-Video": "(?i:ltx(?!v?2|[-_]2|_pipelines))",
    "LTX-2": "(?i:ltx-?v?2)",
    "HunyuanVideo-1.5": "(?i:hunyuan)",
    "HunyuanVideo": "(?i:hunyuan)",
    "CogVideoX": "(?i:cogvideo)",
    "Cosmos-Predict 2.5": "(?i:cosmos)",
}
MENTIONS = {  # of one family, where something that all share is named after it
    "moved.py",  # old import paths
    "cli/flags.py",  # the help of a flag for models with two experts
    "evaluation/paper.py",  # the paper's figures, by its models
    "ops/qk_norm_rope.py",  # a source in diffusers
    "reasoners/ltx.py",  # the decoder of LTX-2
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
    assert all(hasattr(diffusers, name) and name not in family.pipelines for name in family.refused)
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
    for name in ("pipelines", "presets", "hub_ids"):
        declared = [entry for family in FAMILIES for entry in getattr(family, name)]
        assert len(declared) == len(set(declared)), name


def test_unknown_classes() -> None:
    with pytest.raises(InputError, match="x is a FluxPipeline: the known Reasoners are WanPipeline, "):
        family_of_pipeline("FluxPipeline", "x")
    with pytest.raises(InputError, match="x is a HunyuanVideoFramepackPipeline, which samples a video in sections"):
        family_of_pipeline("HunyuanVideoFramepackPipeline", "x")
    with pytest.raises(InputError, match="unknown transformer Linear: choose from WanTransformer3DModel, "):
        family_of(torch.nn.Linear(1, 1))


def test_the_registry_imports_no_models() -> None:
    code = "import sys, vlmteacher.reasoners.registry; print(*{'diffusers', 'transformers', 'peft'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=LIBRARY.parent, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


NEW_FAMILY = """
import dataclasses, json, sys
from types import SimpleNamespace
import torch
from vlmteacher.reasoners import registry
from vlmteacher.reasoners.family import DecoderFile, LayerNames
from vlmteacher.reasoners.sampling import SamplerSettings

class NewTransformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = {}
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"query": torch.nn.Linear(4, 4)}) for _ in range(2)])

def load(path, index, settings, dtype, local_files_only, **parts):
    ones = torch.ones(1, 3, 1, 1, 1)
    return SimpleNamespace(transformer=NewTransformer(), settings=settings, latents_mean=ones, latents_std=ones)

registry.FAMILIES += (dataclasses.replace(
    registry.LTX, name="New", pipelines=("NewPipeline",), transformer="NewTransformer", blocks="layers", load=load,
    build=lambda configs, settings, dtype: (configs["vae"], settings), presets={"new": SamplerSettings((1000.0,))},
    hub_ids={"me/new": "new"}, lora_targets=["query"], layers=LayerNames("stack", {"query": "q"}), musubi="new.lora",
    decoders={(3, 2, 2): "me/decoders/new.pth"}, decoder_files=(DecoderFile("new", options={"slope": 0.5}),),
),)
"""


@pytest.mark.slow
def test_one_declaration_is_all_of_a_family(tmp_path: Path) -> None:
    """Loading, presets, LoRAs, checkpointing, plans and decoders work for a family that is only declared."""
    code = f"""{NEW_FAMILY}
from vlmteacher.decoders.find import known_decoder
from vlmteacher.lora.adapter import lora_size
from vlmteacher.lora.formats import LoRA, Factors, read_lora
from vlmteacher.planning.models import build_reasoner
from vlmteacher.reasoners.checkpointing import block_list
from vlmteacher.reasoners.loading import load_reasoner

reasoner = load_reasoner({str(tmp_path)!r}, preset="new")
assert reasoner.settings.timesteps == (1000.0,)
assert len(block_list(reasoner.transformer)) == 2
assert lora_size(reasoner.transformer, 1) == 2 * 8
lora = LoRA({{"layers.1.query": Factors(torch.ones(1, 4), torch.ones(4, 1), 1.0)}})
for style in ("diffusers", "comfyui", "musubi"):
    data = lora.to_bytes(style)
    assert style == "diffusers" or b"stack" in data
    assert set(read_lora(data).fitted(reasoner.transformer).layers) == {{"layers.1.query"}}
assert build_reasoner({str(tmp_path)!r})[0] == ({{"z": 1}}, SamplerSettings())
latents = SimpleNamespace(latent_channels=3, temporal_stride=2, spatial_stride=2, transformer=reasoner.transformer)
assert known_decoder(latents) == "me/decoders/new.pth"
assert registry.decoder_file("new_2.pth").options == {{"slope": 0.5}}
"""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NewPipeline"}))
    for part in ("transformer", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps({"z": 1}))
    run = subprocess.run([sys.executable, "-c", code], cwd=LIBRARY.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
