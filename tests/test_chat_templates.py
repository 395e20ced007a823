"""Chats are rendered in one process, and are those of transformers."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from vlmteacher import chat_templates
from vlmteacher.chat_templates import KEPT, render, render_all
from vlmteacher.errors import InputError
from vlmteacher.pipeline import TeacherPipeline


def chat(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that were made since, with nothing rendered before."""
    made, fork = [], os.fork
    monkeypatch.setattr(chat_templates, "_rendered", {})

    def counted() -> int:
        made.append(child := fork())
        return child

    monkeypatch.setattr(os, "fork", counted)
    return made


def test_all_chats_in_one_process_and_none_twice(pipe: TeacherPipeline, forks: list[int]) -> None:
    tokenizer = pipe.teacher.tokenizer
    chats = [chat(f"Is it {i}?") for i in (1, 2, 1)]
    texts = render_all(tokenizer, chats, "it")
    assert len(forks) == 1 and len(chat_templates._rendered) == 2
    keywords = {"tokenize": False, "add_generation_prompt": True}
    assert texts == [tokenizer.apply_chat_template(each, **keywords) for each in chats]
    assert render(tokenizer, chats[1], "it") == texts[1] and render_all(tokenizer, [], "it") == [] and len(forks) == 1
    assert render(tokenizer, chats[1], "it", asks=False) != texts[1] and len(forks) == 2
    many = [chat(str(i)) for i in range(KEPT + 3)]
    assert len(render_all(tokenizer, many, "it")) == len(many) and len(chat_templates._rendered) == KEPT


def test_a_question_s_chat_costs_no_process_of_its_own(pipe: TeacherPipeline, forks: list[int]) -> None:
    teacher = pipe.teacher
    clip = teacher.clip(range(4), 8.0, 64, 64)
    assert len(teacher.chats(clip, [f"Is it {i}?" for i in range(5)])) == 5 and len(forks) == 1


def test_one_bad_chat_of_several_is_an_error_and_nothing_is_kept(pipe: TeacherPipeline, forks: list[int]) -> None:
    with pytest.raises(InputError, match="the template cannot be used"):
        render_all(pipe.teacher.tokenizer, [chat("Is it?"), [{"role": "user", "content": 3}]], "the template")
    assert not chat_templates._rendered


def test_a_process_that_hangs_is_tried_again(
    pipe: TeacherPipeline, forks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one may that is forked while another thread holds a lock."""
    render_one = pipe.teacher.tokenizer.apply_chat_template

    def hang(*arguments: Any, **keywords: Any) -> Any:
        if len(forks) < chat_templates.TRIES:  # the forks up to this one
            time.sleep(600)
        return render_one(*arguments, **keywords)

    monkeypatch.setattr(chat_templates, "MOST_SECONDS", 2)
    monkeypatch.setattr(pipe.teacher.tokenizer, "apply_chat_template", hang)
    text = render(pipe.teacher.tokenizer, chat("Is it?"), "it")
    assert "Is it?" in text and len(forks) == chat_templates.TRIES
    for child in forks:
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)
