from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core: one thread in each, and in what it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a shell that started the suite in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The tiny pairs' weights are random: VAE and surrogate decoder agree on nothing (but see decoders/test_agreement.py).
os.environ["VLMTEACHER_CHECK_DECODER"] = "0"
os.environ["VLMTEACHER_COSMOS_GUARDRAIL"] = "0"  # the models of that safety checker cannot be downloaded

import pytest
import torch

from tests.progress_output import without_loading
from tests.reasoners import tiny_checkpoints
from tests.slow import (  # noqa: F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_report_header,
)
from tests.tiny_pair import PROMPT, QUERIES, tiny_pair
from vlmteacher import placement
from vlmteacher.cli import main
from vlmteacher.lora.adapter import add_lora, remove_lora
from vlmteacher.optimization.loop import Optimization
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.queries import QuerySet
from vlmteacher.settings import Settings

Run = Callable[..., tuple[int, str, str]]
Solve = Callable[..., list[str]]

placement.default_device = lambda: "cpu"  # whose numbers the tests know; tests of GPUs say so


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of a random Reasoner, Teacher and decoder that fit together."""
    return tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def pipe(models: dict[str, str]) -> TeacherPipeline:
    """These models as a pipeline, for the tests of one file."""
    return TeacherPipeline.from_pretrained(**models)


@pytest.fixture(scope="session")
def queries_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("queries") / "queries.json"
    path.write_text(json.dumps(QUERIES))
    return path


@pytest.fixture(scope="session")
def solve(models: dict[str, str], queries_file: Path) -> Solve:
    """Arguments of a small `solve`; a keyword changes one of them, None leaves it out."""

    def solve(out: Path, *flags: str, **changed: Any) -> list[str]:
        values: dict[str, Any] = {
            **models,
            "prompt": PROMPT,
            "queries": queries_file,
            "max_steps": 3,
            "rank": 2,
            "teacher_frames": 4,
            "lr": 0.03,
            "out": out,
            **changed,
        }
        pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in values.items() if value is not None)
        return ["solve", *(part for pair in pairs for part in pair), *flags]

    return solve


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: exit status, stdout, stderr without the loading of models."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return status, out, without_loading(err)

    return run


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan 2.1 T2V pipeline in its hub layout."""
    return tiny_checkpoints.wan21_t2v(tmp_path_factory.mktemp("t2v"))


@pytest.fixture(scope="module")
def a14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan 2.2 T2V A14B pipeline, of two experts."""
    return tiny_checkpoints.wan22_t2v_a14b(tmp_path_factory.mktemp("a14b"))


@pytest.fixture
def make_loop(pipe: TeacherPipeline) -> Iterator[Any]:
    """A fresh loop on the same instance; keywords replace its settings."""
    reasoner = pipe.reasoner
    condition = reasoner.encode(PROMPT, None, 5, 32, 48)
    noise = reasoner.noise(condition, torch.Generator().manual_seed(0))

    def make(**settings: Any) -> Optimization:
        values: dict[str, Any] = {
            "max_steps": 4,
            "threshold": 1e-6,
            "teacher_frames": 4,
            "rank": 2,
            "learning_rate": 1e-2,
        }
        chosen = Settings(**values | settings)
        add_lora(reasoner.transformer, 2, seed=0, blocks=chosen.lora_blocks)
        parts = (reasoner, pipe.decoder, pipe.teacher, condition, noise)
        return Optimization(*parts, QuerySet.from_dict(QUERIES), chosen)

    yield make
    remove_lora(reasoner.transformer)
