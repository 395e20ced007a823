"""PE and VideoTPO with a VLM outside of the pipeline: a stand-in behind a URL, and the packaged pair's Reasoner."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.evaluation.loopback import Endpoint, Reply, parts, serve
from tests.evaluation.test_tables import pair, written  # noqa: F401 (fixtures)
from vlmteacher.evaluation import microworld
from vlmteacher.evaluation.microworld import Bench
from vlmteacher.evaluation.tables import Table, run_table
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.teachers import load_teacher

PROMPT = "move the red ball to the green square"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serve() as served:
        yield served


def test_pe_with_the_packaged_reasoner(endpoint: Endpoint, run: Run, tmp_path: Path) -> None:
    """Its own Teacher writes queries only, and judges as before."""
    command = ["bench", "microworld", "--method", "pe", "--limit", 1, "--out", tmp_path / "out"]
    status, _, err = run(*command)
    assert status == 2 and "--vlm" in err
    endpoint.replies = [Reply(f"<think>Let me see.</think>{PROMPT}")]
    status, text, _ = run(*command, "--vlm", "o", "--vlm-url", endpoint.url)
    assert status == 0 and "method pe" in text
    (request,) = endpoint.requests
    task, first = Bench().load(Bench().instances(["id"], 1, 1)[0])
    shown, asked = parts(request)
    assert not isinstance(shown, str) and shown.size == first.size and f"this prompt: {task}\n" in str(asked)
    assert request["max_completion_tokens"] == 300
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["vlm"], results["vlm_url"]) == ("o", endpoint.url)
    (row,) = results["instances"]
    assert row["new_prompt"] == PROMPT and (row["generator_calls"], row["vlm_calls"]) == (1, 1)
    status, _, err = run(*command, "--vlm", "p", "--vlm-url", endpoint.url, "--resume")
    assert status == 2 and "holds other results" in err


@pytest.mark.parametrize("rounds", [1, 3])
def test_videotpo_makes_2r_videos(
    pair: Path,  # noqa: F811
    endpoint: Endpoint,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rounds: int,
) -> None:
    sampled = []
    sample = TeacherPipeline.sample
    monkeypatch.setattr(TeacherPipeline, "sample", lambda *args: sampled.append(1) or sample(*args))
    monkeypatch.setattr(
        "vlmteacher.teachers.vlm.VLMTeacher.answer", lambda *_: pytest.fail("the Teacher was asked for a text")
    )
    endpoint.replies = lambda _: Reply(f"text {len(endpoint.requests)}")
    method = f"videotpo@{rounds}"
    flags = ["--vlm", "o", "--vlm-url", endpoint.url, "--pair", pair]
    status, _, err = run("bench", "microworld", "--method", method, "--limit", 1, *flags, "--out", tmp_path / "out")
    assert status == 0, err
    assert len(sampled) == 2 * rounds and len(endpoint.requests) == 4 * (rounds - 1)
    images = [sum(not isinstance(part, str) for part in parts(request)) for request in endpoint.requests]
    assert images == [8, 0, 0, 0] * (rounds - 1)  # four frames of two videos for the critique
    (row,) = json.loads((tmp_path / "out/results.json").read_text())["instances"]
    assert (row["generator_calls"], row["vlm_calls"]) == (2 * rounds, 2 * rounds + 4 * (rounds - 1))
    prompts = [one["prompt"] for one in row["rounds"]]
    assert prompts == [row["prompt"], *(f"text {4 * k}" for k in range(1, rounds))]


def test_a_local_vlm_writes_what_it_would_as_a_teacher(models: dict[str, str]) -> None:
    rewriter = Bench(vlm=f"local:{models['teacher']}").rewriter()
    assert rewriter is not None and rewriter("the red ball", (), 6) == load_teacher(models["teacher"]).answer(
        "the red ball", (), 6
    )


def test_a_table_runs_what_the_teacher_cannot_write(pair: Path, endpoint: Endpoint, tmp_path: Path) -> None:  # noqa: F811
    endpoint.replies = [Reply(PROMPT)]
    table = Table(main=("base",), others=("pe",), against=("base",))
    bench = microworld.Bench(pair=str(pair), vlm="o", vlm_url=endpoint.url)
    content = run_table(table, bench, 1, 1, tmp_path / "table")
    assert list(content["methods"]) == ["base", "pe"] and content["missing"] == {} and content["vlm"] == "o"


def test_an_instance_without_a_text_is_set_aside(
    pair: Path,  # noqa: F811
    endpoint: Endpoint,
    run: Run,
    tmp_path: Path,
) -> None:
    endpoint.replies = [Reply(status=400, body="{}")]
    flags: list[Any] = [
        "--limit",
        1,
        "--pair",
        pair,
        "--vlm",
        "o",
        "--vlm-url",
        endpoint.url,
        "--out",
        tmp_path / "out",
    ]
    status, _, err = run("bench", "microworld", "--method", "pe", *flags)
    assert status == 1 and "1 of the instances failed" in err and len(endpoint.requests) == 3
    endpoint.replies = [Reply(status=403, body="{}")]
    status, _, err = run("bench", "microworld", "--method", "pe", *flags, "--resume")
    assert status == 2 and "set VLMTEACHER_VLM_KEY" in err and not (tmp_path / "out/results.json").exists()
