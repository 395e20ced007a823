import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from vlmteacher.errors import InputError, OutputError
from vlmteacher.microworld.questions import STYLE
from vlmteacher.pipeline import PACKAGED_PAIR
from vlmteacher.queries import (
    MAX_QUERIES,
    QUERY_INSTRUCTION,
    QuerySet,
    QueryStyle,
    ask_for_queries,
    check_wording,
    check_written,
    parse_queries,
    query_prompt,
)

DOCS = (Path(__file__).parents[1] / "docs" / "guides" / "queries.md").read_text("utf-8")

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
        ('{"goal": "\\u200b"}', "non-empty"),
        ('{"goal": "g?", "proces": ["p?"]}', "unknown entry 'proces': there are goal and process"),
        ('{"goal": null}', "non-empty"),
        ('{"goal": "g?", "process": ["p?", 3]}', "3"),
        ('{"goal": "g?", "process": ["  "]}', "non-empty"),
        ('{"goal": "g?", "process": "p?"}', "list"),
        ('{"goal": "g?", "process": null}', "list"),
        (json.dumps({"goal": "g?", "process": ["p?"] * MAX_QUERIES}), "9 questions"),
        ('{"goal": ["g?"]}', "non-empty"),
        ('{"goal": {"a": "g?"}}', "non-empty"),
        ('{"goal": "g?", "process": [["p?"]]}', "non-empty"),
        ('{"goal": "g?", "process": {"p?": 1}}', "list"),
        ('{"goal": "g?", "goal": "h?"}', "twice"),
        ("[" * 100_000, "nested too deep"),
        ('{"goal": ' + "9" * 400 + "}", "64 bits"),
        (r'{"goal": "\ud800"}', "half a character"),
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
    with pytest.raises(InputError, match=r"queries file .*missing.json does not exist"):
        QuerySet.load(tmp_path / "missing.json")
    (tmp_path / "latin.json").write_bytes(b'{"goal": "\xe4"}')
    with pytest.raises(InputError, match=r"latin.json is no UTF-8 text"):
        QuerySet.load(tmp_path / "latin.json")
    with pytest.raises(InputError, match="/dev/zero is larger than"):
        QuerySet.load("/dev/zero")
    with pytest.raises(OutputError, match="cannot be written"):
        SET.save(tmp_path / "missing" / "q.json")


def test_a_byte_order_mark_is_read_over(tmp_path):
    (tmp_path / "q.json").write_text(SET.to_json(), "utf-8-sig")
    assert QuerySet.load(tmp_path / "q.json") == SET


@pytest.mark.parametrize("question", ["Is it \ud800?", "Is it \udcff?", "Is it\0?"])
def test_what_is_no_text_is_refused(question):
    for make in (
        lambda: QuerySet(question),
        lambda: QuerySet("Is it?", (question,)),
        lambda: QuerySet.from_json(json.dumps({"goal": question})),
    ):
        with pytest.raises(InputError, match=r"(half a character|a NUL)") as error:
            make()
        str(error.value).encode()


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
    assert len(QUERY_INSTRUCTION.split()) < 300


@pytest.mark.parametrize("around", ['The form is {"goal": "...", "process": ["..."]}. So: {} Done.', "{{{}"])
def test_the_form_that_a_model_repeats_is_not_taken_for_its_answer(around):
    assert parse_queries(around.replace("{}", SET.to_json()), check_written) == SET


def test_a_deeply_nested_answer_is_refused():
    with pytest.raises(InputError, match="no JSON object with a goal"):
        parse_queries('{"a":' * 20_000)


def tables() -> dict[str, list[tuple[str, str]]]:
    """The rows of the tables in docs/guides/queries.md, by the first heading."""
    rows = re.findall(r"^\| (.+) \| (.+) \|$(\n\|---)?", DOCS, re.MULTILINE)
    found: dict[str, list[tuple[str, str]]] = {}
    for first, second, is_heading in rows:
        if is_heading:
            table = found[first] = []
        else:
            table.append((first, second))
    return found


@pytest.mark.parametrize("question", [row[0] for row in tables()["good"]])
def test_the_documented_good_queries_pass(question):
    check_wording(question)


@pytest.mark.parametrize(("question", "told"), tables()["refused"])
def test_the_documented_bad_queries_are_refused_for_the_documented_reason(question, told):
    with pytest.raises(InputError, match=re.escape(told)) as error:
        check_wording(question)
    assert question in str(error.value) and "\n" not in str(error.value)


def test_the_documented_files_can_be_used(tmp_path):
    files = re.findall(r"```json\n(.*?)```", DOCS, re.DOTALL)
    assert len(files) == 3 and sum("teacher.json" in text for text in DOCS.split("```json")) >= 1
    for text in files[:2]:
        check_written(replace(QuerySet.from_json(text), process=QuerySet.from_json(text).process or ("Is it there?",)))
    (tmp_path / "teacher.json").write_text(files[2])
    assert QueryStyle.load(tmp_path / "teacher.json").own_wording


@pytest.mark.parametrize(
    "question",
    [
        "Is the andiron on the orange mat?",  # holds and, or, no, not only inside of words
        "Is the knot in the nose of the boat tight?",
        "Is the black-and-white ball in the box?",
        "Does the display show 'stop and go' in every frame?",
        "Is the ball between the posts?",
        "Is the robot's hand on the cup's handle?",
        "Does the sign say “no entry”?",
        "Does the ball stay where it is?",
        "球は箱の中にありますか\uff1f",
    ],
)
def test_words_that_only_look_like_it_are_left_alone(question):
    check_wording(question)


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ("Is the ball NOT moving?", '("NOT")'),
        ("Isn\u2019t it red?", '("Isn\u2019t")'),
        ("Is there no car?", '("no")'),
        ("Does it go left & right?", '("&")'),
        ("Is it red and/or blue?", '("and/or")'),
        ("Is it between the posts and does it and its shadow fall?", '("and")'),
        ("How does it end?", '("How")'),
        ("What?", '("What")'),
        ("Is the robot's hand and the dog's paw seen?", '("and")'),  # two apostrophes quote nothing
    ],
)
def test_what_the_rules_find(question, told):
    with pytest.raises(InputError, match=re.escape(told)):
        check_wording(question)


@pytest.mark.parametrize(
    ("process", "told"),
    [
        ((), "0 process questions"),
        (("Is it one?", "Is it two?", "Is it three?", "Is it four?"), "4 process questions"),
        (("Is it one?", "is  it one ?"), "appears twice"),
        (("Is the ball on the square?",), "appears twice"),
        (("Is it one?", "Does it never fall?"), "fall?' is negated"),
    ],
)
def test_a_written_set_is_held_to_the_rules(process, told):
    with pytest.raises(InputError, match=re.escape(told)):
        check_written(QuerySet(SET.goal, process))


def test_peoples_own_wording_is_allowed(tmp_path):
    own = QuerySet("Is it in the box and never out?", ("Is it red? Or blue?",))
    own.save(tmp_path / "q.json")
    assert QuerySet.load(tmp_path / "q.json") == own


def test_the_example_in_the_instruction_follows_its_own_rules():
    (example,) = re.findall(r'^\{"goal": "Is.*', QUERY_INSTRUCTION, re.MULTILINE)
    check_written(QuerySet.from_json(example))


def test_the_retry_tells_what_was_wrong_and_a_model_with_its_own_wording_is_not_told():
    bad = QuerySet("Does it never fall?", ("Is it red?",))
    heard = []

    def answer(later, sample):
        heard.append((list(later), sample))
        return SET.to_json() if sample else bad.to_json()

    assert ask_for_queries(QueryStyle(), answer) == SET
    (first, second) = heard
    assert first == ([], False) and second[1]
    said, reply = second[0]
    assert said == bad.to_json() and "'Does it never fall?' is negated (\"never\")" in reply and "{reason}" not in reply
    assert ask_for_queries(QueryStyle(own_wording=True), answer) == bad
    heard.clear()
    with pytest.raises(InputError, match=r"twice .*no JSON object.*give your own.*'what\?'"):
        ask_for_queries(QueryStyle(own_wording=True), lambda later, sample: heard.append(later) or "what?")
    assert heard == [[], []]


def test_the_packaged_teacher_is_asked_as_it_was_trained():
    """Byte for byte: with another text it writes no queries."""
    style = QueryStyle.load(PACKAGED_PAIR / "teacher" / "teacher.json")
    assert style == replace(STYLE, writer="writer")
    assert query_prompt("Move {it}.", style.query_instruction) == (
        "A video must carry out this task: Move {it}.\n"
        "Write questions to check the video. Each is answered yes or no by watching the video, and Yes means "
        "satisfied. Write one goal question about the final result and one to three process questions about rules "
        "that must hold all the way. "
        'Answer only with JSON: {"goal": "...", "process": ["...", "..."]}'
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "cannot be used"),
        ("[]", "no JSON object"),
        ('{"prompt": "x"}', "unknown entry 'prompt'"),
        ('{"query_instruction": "Write queries."}', r"\{prompt\}"),
        ('{"query_instruction": 3}', r"\{prompt\}"),
        ('{"preservation_query": " "}', "preservation_query must be a question"),
        ('{"own_wording": "yes"}', "own_wording must be true or false, not 'yes'"),
        ('{"writer": "../other"}', "writer must be the name of a subfolder, not '../other'"),
    ],
)
def test_a_bad_style_names_the_file(tmp_path, text, what):
    (tmp_path / "teacher.json").write_text(text)
    with pytest.raises(InputError, match=what) as error:
        QueryStyle.load(tmp_path / "teacher.json")
    assert "teacher.json" in str(error.value)
