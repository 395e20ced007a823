"""A judge behind an endpoint: faults of the server, invalid replies, the cache, and the key."""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.evaluation.loopback import Endpoint, Reply, parts, serve
from vlmteacher.errors import InputError, MissingExtra
from vlmteacher.evaluation.judge import KEY, InvalidReply, Judge
from vlmteacher.evaluation.ruler import parse_ratings
from vlmteacher.evaluation.vlm import EndpointError, RemoteVLM, check_vlm, find_vlm, without_thought
from vlmteacher.pipeline import PACKAGED_PAIR

GOOD = '<think>It rolls. <answer>["Poor"]</answer> is the form.</think>\n<answer>["Good", "Poor"]</answer>'
CONTENT = ["first", Image.new("RGB", (48, 32), "red"), "then"]
SECRET = "sk-a-secret-that-is-written-nowhere"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serve() as served:
        yield served


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of the client before its retries, none of which is waited for.

    Threads of other tests may pause too: `time.sleep` is one for all.
    """
    waited: list[float] = []
    own, sleep = threading.get_ident(), time.sleep

    def pause(seconds: float) -> None:
        waited.append(seconds) if threading.get_ident() == own else sleep(seconds)

    monkeypatch.setattr("openai._base_client.time.sleep", pause)
    return waited


def judge(endpoint: Endpoint, cache: Path, model: str = "o", version: str = "1", timeout: float = 30.0) -> Judge:
    return Judge(RemoteVLM(model, endpoint.url, KEY, "judge", timeout), cache, version)


def ask(judge: Judge, content: Any = CONTENT) -> list[str]:
    return judge.ask("the rules", content, parse_ratings(2))


def test_texts_and_images_arrive_in_their_order(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.replies = [Reply(GOOD)]
    assert ask(judge(endpoint, tmp_path)) == ["Good", "Poor"]
    (request,) = endpoint.requests
    assert request["model"] == "o" and request["messages"][0] == {"role": "system", "content": "the rules"}
    first, image, then = parts(request)
    assert (first, then) == ("first", "then") and image.format == "JPEG" and image.size == (48, 32)
    assert set(request) == {"model", "messages"}  # nothing that a reasoning model refuses


def test_faults_of_the_server_are_tried_again(endpoint: Endpoint, tmp_path: Path, pauses: list[float]) -> None:
    wait = Reply(status=429, headers={"Retry-After": "7"}, body='{"error": {"message": "slow down"}}')
    endpoint.replies = [wait, Reply(status=500, body="oh"), Reply(status=503, body="<html>"), Reply(GOOD)]
    assert ask(judge(endpoint, tmp_path)) == ["Good", "Poor"]
    assert len(endpoint.requests) == 4 and pauses[0] == 7.0 and len(pauses) == 3


@pytest.mark.parametrize(
    ("reply", "requests", "message"),
    [
        (Reply(status=500, body="oh"), 9, "gives no answer: "),
        (Reply(status=429, body='{"error": {"message": "slow down"}}'), 9, "slow down"),
        (Reply(status=400, body=f'{{"error": {{"message": "too long for {SECRET}"}}}}'), 1, r"too long for \.\.\."),
        (Reply(body="<html>a login page</html>", headers={"Content-Type": "text/html"}), 1, "no chat completion"),
        (Reply(body='{"choices": []}'), 1, "no chat completion"),
        (Reply(body='{"choices": [{"mes'), 1, "judge o at http"),
        (Reply(body="null"), 1, "no chat completion"),
    ],
)
def test_a_request_without_an_answer_is_no_verdict(
    endpoint: Endpoint,
    tmp_path: Path,
    pauses: list[float],
    monkeypatch: pytest.MonkeyPatch,
    reply: Reply,
    requests: int,
    message: str,
) -> None:
    monkeypatch.setenv(KEY, SECRET)
    endpoint.replies = [reply]
    with pytest.raises(EndpointError, match=message) as error:
        ask(judge(endpoint, tmp_path))
    assert len(endpoint.requests) == requests and "\n" not in str(error.value) and SECRET not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_hang_ends_with_the_time_limit(endpoint: Endpoint, tmp_path: Path, pauses: list[float]) -> None:
    endpoint.replies = [Reply(wait=True)]
    with pytest.raises(EndpointError, match=r"gives no answer within 0.05 s, 9 times"):
        ask(judge(endpoint, tmp_path, timeout=0.05))
    endpoint.replies = [Reply(wait=True), Reply(GOOD)]
    assert ask(judge(endpoint, tmp_path, timeout=0.5)) == ["Good", "Poor"]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            Reply(status=401, body='{"error": {"message": "bad key"}}'),
            f"refuses the request .status 401.: set {KEY}",
        ),
        (Reply(status=403, body="no"), "status 403"),
        (Reply(status=404, body="{}"), "does not exist .status 404.: check the model's name"),
        (Reply(status=429, body='{"error": {"code": "insufficient_quota"}}'), "has no quota left"),
    ],
)
def test_what_every_request_would_meet_stops_at_once(
    endpoint: Endpoint, tmp_path: Path, pauses: list[float], reply: Reply, message: str
) -> None:
    endpoint.replies = [reply]
    with pytest.raises(InputError, match=message) as error:
        ask(judge(endpoint, tmp_path))
    assert "\n" not in str(error.value) and len(endpoint.requests) == (9 if reply.status == 429 else 1)


def test_a_server_that_does_not_run_stops_at_once(tmp_path: Path, pauses: list[float]) -> None:
    with serve() as gone:
        pass
    with pytest.raises(InputError, match="start it, or give another URL"):
        ask(judge(gone, tmp_path))


@pytest.mark.parametrize(
    ("invalid", "reason"),
    [
        ("I like it.", "it has no <answer>"),
        ("<think>still think <answer>[Good, Good]</answer>", "it has no <answer>"),
        ('<answer>["Good"]</answer>', "it has 1 ratings for 2 questions"),
        ('<answer>["Good", "Fair"]</answer>', "'Fair' is none of Good, Medium, Poor"),
        ("<answer>[]</answer>", "'' is none of"),
        ("", "it has no <answer>"),
    ],
)
def test_an_invalid_reply_is_asked_for_once_more(endpoint: Endpoint, tmp_path: Path, invalid: str, reason: str) -> None:
    endpoint.replies = [Reply(invalid), Reply("<answer>[Medium, Poor]</answer>")]
    assert ask(judge(endpoint, tmp_path)) == ["Medium", "Poor"]
    first, second = map(parts, endpoint.requests)
    assert second[0] == first[0] and second[2] == first[2] and reason in second[3] and invalid in second[3]
    assert ask(judge(endpoint, tmp_path)) == ["Medium", "Poor"] and len(endpoint.requests) == 2  # kept

    endpoint.replies = [Reply(invalid)]
    with pytest.raises(InvalidReply, match="two replies of the judge cannot be used"):
        ask(judge(endpoint, tmp_path / "other"))
    assert len(endpoint.requests) == 4 and not (tmp_path / "other").exists()


def test_with_a_warm_cache_nothing_is_asked(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.replies = [Reply(GOOD)]
    ask(judge(endpoint, tmp_path))
    (kept,) = tmp_path.rglob("*.json")
    assert json.loads(kept.read_text()) == {"model": "o", "url": endpoint.url, "version": "1", "reply": GOOD}
    assert ask(judge(endpoint, tmp_path)) == ["Good", "Poor"] and len(endpoint.requests) == 1

    blue = Image.new("RGB", (48, 32), "blue")
    others = [
        (judge(endpoint, tmp_path, model="p"), CONTENT),
        (judge(endpoint, tmp_path, version="2"), CONTENT),
        (judge(endpoint, tmp_path), ["first", blue, "then"]),
        (judge(endpoint, tmp_path), ["first", CONTENT[1], "then, too"]),
    ]
    for count, (other, content) in enumerate(others, 2):
        ask(other, content)
        assert len(endpoint.requests) == count
    for content in ("", '{"reply": "<answer>[Good]</answer>"}', "[1]", '{"reply": 5}'):
        kept.write_text(content)
        assert ask(judge(endpoint, tmp_path)) == ["Good", "Poor"]  # asked again
    assert len(endpoint.requests) == 9


def test_processes_share_a_cache_also_with_one_that_was_killed(endpoint: Endpoint, tmp_path: Path) -> None:
    def hang_at_the_third(request: Any) -> Reply:
        return Reply(GOOD, wait=parts(request) == ["2"])

    endpoint.replies = hang_at_the_third

    def run() -> None:
        one = judge(endpoint, tmp_path)
        for number in range(4):
            ask(one, [str(number)])

    fork = multiprocessing.get_context("fork")
    killed = fork.Process(target=run)
    killed.start()
    while len(endpoint.requests) < 3:
        assert killed.is_alive()
        time.sleep(0.01)
    killed.kill()
    killed.join()
    (tmp_path / "00").mkdir(exist_ok=True)
    (tmp_path / "00" / ".00.1.partial.json").write_text('{"reply": "<answer>[Go')  # of a process killed while it wrote
    endpoint.replies = [Reply(GOOD)]
    endpoint.requests.clear()
    both = [fork.Process(target=run) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    asked = [parts(request)[0] for request in endpoint.requests]
    assert {*asked} == {"2", "3"} and len(asked) <= 4
    assert len(list(tmp_path.rglob("[!.]*.json"))) == 4


def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "sk-of-another-host")
    endpoint.replies = [Reply(GOOD)]
    monkeypatch.delenv(KEY, raising=False)
    ask(judge(endpoint, tmp_path))
    monkeypatch.setenv(KEY, f" {SECRET}\n")
    asked = judge(endpoint, tmp_path, version="2")
    ask(asked)
    assert [headers["authorization"] for headers in endpoint.headers] == ["Bearer none", f"Bearer {SECRET}"]
    assert "another-host" not in str(endpoint.headers)
    assert SECRET not in json.dumps(asked.vlm.described())
    assert all(SECRET not in file.read_text() for file in tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000/v1", "is no URL of an endpoint: give one like http://localhost:8000/v1"),
        ("ftp://host/v1", "is no URL"),
        (f"https://user:{SECRET}@host/v1", f"put a key into {KEY} instead"),
        (f"https://host/v1?key={SECRET}", "the URL of host holds more than host and path"),
        ("http://[", "is no URL"),
        (None, "--judge o needs --judge-url URL, its endpoint"),
    ],
)
def test_urls_that_cannot_be_used(url: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        check_vlm("o", url, "--judge", KEY)
    assert SECRET not in str(error.value)


def test_without_the_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtra, match=r"pip install 'vlmteacher\[judge\]'"):
        check_vlm("o", "http://localhost/v1", "--judge", KEY)


def test_a_local_vlm_reads_the_images_before_the_text(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = f"local:{models['teacher']}"
    monkeypatch.setattr("vlmteacher.evaluation.vlm.LOCAL_TOKENS", 16)
    check_vlm(model, None, "--judge", KEY)
    vlm = find_vlm(model, None, KEY, "judge")
    with pytest.raises(InvalidReply):  # random weights
        Judge(vlm, tmp_path / "cache", "1").ask("the rules", CONTENT, parse_ratings(2))
    requests: list[Any] = []
    monkeypatch.setattr(vlm.teacher, "answer", lambda *given: requests.append(given) or GOOD)  # type: ignore[attr-defined]
    assert Judge(vlm, tmp_path / "cache", "1").ask("the rules", CONTENT, parse_ratings(2)) == ["Good", "Poor"]
    ((text, images, _),) = requests
    assert text == "the rules\nfirst\n[image 1]\nthen" and images == [CONTENT[1]]


def test_local_vlms_that_cannot_be_used(models: dict[str, str]) -> None:
    for model, url, message in (
        (f"local:{PACKAGED_PAIR / 'teacher'}", None, "writes queries and no other text"),
        ("local:x", "http://localhost/v1", "is no model of an endpoint: leave out --judge-url"),
    ):
        with pytest.raises(InputError, match=message):
            check_vlm(model, url, "--judge", KEY)
    vlm = find_vlm(f"local:{models['teacher']}", None, KEY, "judge")
    with pytest.raises(EndpointError, match="the teacher's context holds 2048"):
        vlm.ask("rules " * 3000, CONTENT)


def test_an_answer_is_without_its_thoughts_and_ends_with_a_sentence(endpoint: Endpoint) -> None:
    vlm = RemoteVLM("o", endpoint.url, KEY)
    endpoint.replies = [
        Reply("<think>Hm.</think>\nThe ball rolls. It sto", finish="length"),
        Reply("<think>Hm. A", finish="length"),
        Reply(" The ball rolls. It sto"),
    ]
    assert vlm.answer("Rewrite it.", [CONTENT[1]], 300) == "The ball rolls."
    assert [type(part).__name__ for part in parts(endpoint.requests[0])] == ["JpegImageFile", "str"]
    assert endpoint.requests[0]["max_completion_tokens"] == 300
    with pytest.raises(InputError, match="thinks for more than the 300 tokens"):
        vlm.answer("Rewrite it.", (), 300)
    assert vlm.answer("Rewrite it.") == "The ball rolls. It sto"
    assert without_thought("<|begin_of_thought|>no") == "" and without_thought(" a ") == "a"
