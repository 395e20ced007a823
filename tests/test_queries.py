import json

import pytest

from vlmteacher.errors import InputError
from vlmteacher.queries import MAX_QUERIES, QUERY_INSTRUCTION, QuerySet, parse_queries, query_prompt

SET = QuerySet("Is the ball on the square?", ("Does it stay one ball?", "Does it go around the wäll?"))


def test_goal_comes_first_and_json_returns_the_same_set(tmp_path):
    assert SET.questions == (SET.goal, *SET.process)
    assert QuerySet.from_json(SET.to_json()) == SET
    SET.save(tmp_path / "queries.json")
    assert QuerySet.load(tmp_path / "queries.json") == SET
    assert json.loads((tmp_path / "queries.json").read_text("utf-8"))["process"][1].endswith("wäll?")
    assert [file.name for file in tmp_path.iterdir()] == ["queries.json"]


def test_process_questions_may_be_missing():
    assert QuerySet.from_json('{"goal": "g?"}') == QuerySet("g?", ())


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("goal: yes", "not JSON"),
        ("[1, 2]", "no goal"),
        ('{"process": ["p?"]}', "no goal"),
        ('{"goal": ""}', "non-empty"),
        ('{"goal": null}', "non-empty"),
        ('{"goal": "g?", "process": ["p?", 3]}', "3"),
        ('{"goal": "g?", "process": ["  "]}', "non-empty"),
        ('{"goal": "g?", "process": "p?"}', "list"),
        ('{"goal": "g?", "process": null}', "list"),
        (json.dumps({"goal": "g?", "process": ["p?"] * MAX_QUERIES}), "9 questions"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, text, what):
    file = tmp_path / "q.json"
    file.write_text(text)
    with pytest.raises(InputError, match=what) as error:
        QuerySet.load(file)
    assert "q.json" in str(error.value) and "\n" not in str(error.value)


def test_the_most_queries_are_allowed():
    assert len(QuerySet("g?", ("p?",) * (MAX_QUERIES - 1)).questions) == MAX_QUERIES


def test_unreadable_and_unwritable_files(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        QuerySet.load(tmp_path / "missing.json")
    (tmp_path / "latin.json").write_bytes(b'{"goal": "\xe4"}')
    with pytest.raises(InputError, match="cannot be read"):
        QuerySet.load(tmp_path / "latin.json")
    with pytest.raises(InputError, match="cannot be written"):
        SET.save(tmp_path / "missing" / "q.json")


@pytest.mark.parametrize("around", ["{}", "```json\n{}\n```", "Sure {{ok}}: {} Done.", '{{"x": {}}}'])
def test_queries_are_found_inside_an_answer(around):
    assert parse_queries(around.format(SET.to_json())) == SET


@pytest.mark.parametrize("answer", ["", "no", '{"goal": "g?", "process": ["p?"', '{"a": 1}', '{"goal": 1}'])
def test_an_answer_without_queries_is_refused(answer):
    with pytest.raises(InputError):
        parse_queries(answer)


def test_the_instruction_carries_the_prompt_as_it_is():
    text = query_prompt('Move {it} "there".')
    assert 'Move {it} "there".' in text and '{"goal": "...", "process": ["...", "..."]}' in text
    assert len(QUERY_INSTRUCTION.split()) < 90
