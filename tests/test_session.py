"""A session leaves the models as they were, and records nothing unless it is asked to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_pipeline import FAST, seed
from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher import TeacherPipeline
from vlmteacher.session import RecordedSession, Session, open_session


def start(pipe: TeacherPipeline, run_dir: Path | None = None, resume: bool = False, **keywords: Any) -> Session:
    values: Any = {**{name: value for name, value in FAST.items() if name != "progress"}, **keywords}
    own = (None, None, None)
    return open_session(pipe, PROMPT, (None, None, None), own, own, seed(), QUERIES, (), values, run_dir, resume)


def test_parts_of_the_algorithm_one_after_the_other(pipe: TeacherPipeline, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in pipe.reasoner.transformer.state_dict().items()}
    with start(pipe, tmp_path / "run") as session:
        assert isinstance(session, RecordedSession)
        session.encode()
        session.write_queries()
        session.draw_noise()
        session.add_lora()
        assert pipe.reasoner.transformer.state_dict().keys() != before.keys() and not (tmp_path / "run").exists()
        session.begin()
        assert json.loads((tmp_path / "run" / "run.json").read_text())["stopped"] == "interrupted"
        rows = list(session.steps())
        assert pipe.loop is session.loop and len(rows) == 2
        last = session.final_sample()
    output = session.output(last, "pt")
    assert pipe.loop is None and output.before_made and not torch.equal(output.frames_before, last.video)
    assert output.lora == (tmp_path / "run" / "lora.safetensors").read_bytes() and output.history == rows
    after = pipe.reasoner.transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_an_error_at_any_part_takes_the_lora_off(pipe: TeacherPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    names = pipe.reasoner.transformer.state_dict().keys()
    for part in ("begin", "_begin_loop", "final_sample"):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="enough"):
            patch.setattr(Session, part, _fail)
            pipe(PROMPT, generator=seed(), queries=QUERIES, **FAST)
        assert pipe.reasoner.transformer.state_dict().keys() == names and pipe.loop is None


def _fail(*_: Any) -> None:
    raise RuntimeError("enough")


def test_what_a_resumed_call_leaves_out_is_as_it_was(pipe: TeacherPipeline, tmp_path: Path) -> None:
    pipe(PROMPT, generator=seed(5), queries=QUERIES, run_dir=tmp_path / "run", **FAST)
    own = (None, None, None)
    keywords: Any = {name: value for name, value in FAST.items() if name not in ("progress", "max_steps")}
    session = open_session(pipe, PROMPT, (None, None, None), own, own, None, None, (), keywords, tmp_path / "run", True)
    assert (session.instance.seed, session.settings.max_steps) == (5, 2)
    assert session.instance.queries is not None and session.instance.queries.goal == QUERIES["goal"]
