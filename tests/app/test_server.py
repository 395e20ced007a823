"""The server over HTTP: what it refuses to read, to take and to listen to."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.app.test_folders import RECORD, write
from tests.conftest import Run
from vlmteacher.app.server import Served, is_local, listen, serve
from vlmteacher.errors import InputError, Notice
from vlmteacher.pipeline import TeacherPipeline

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'vlmteacher[ui]'")


@pytest.fixture(scope="module")
def served(pipe: TeacherPipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    runs = tmp_path_factory.mktemp("ui") / "runs"
    folder = write(runs / "one", "run.json", RECORD)
    (folder / "report.html").write_text("<p>page</p>")
    (folder / "state.pt").write_text("state")
    with listen("127.0.0.1", 0) as sock, serve(pipe, sock, runs) as served:
        yield served


def port(served: Served) -> int:
    return int(served.url.rstrip("/").rpartition(":")[2])


def ask(served: Served, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port(served), timeout=60)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content


def test_the_page_names_no_address_but_its_own(served: Served) -> None:
    status, headers, content = ask(served, "GET", "/")
    assert status == 200 and "connect-src 'self'" in headers["content-security-policy"]
    config = json.loads(ask(served, "GET", "/config")[2])
    assert not config["analytics_enabled"] and b"fonts.googleapis" not in content


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file%3D/etc/passwd",
        "/gradio_api/file=http://127.0.0.1/",
        "/gradio_api/file/%2e%2e/%2e%2e/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1/",
        "/gradio_api/info",
        "/file=/etc/passwd",
        "/runs/../../etc/passwd",
        "/runs/%2e%2e/%2e%2e/etc/passwd",
        "/runs/one/..%2f..%2f..%2fetc%2fpasswd",
        "/runs/one/state.pt",
        "/runs/one/.lock",
        "/runs//etc/passwd",
        "/static/../config.py",
        "/assets/%2e%2e/%2e%2e/index.html",
        "/static/%2fetc%2fpasswd",
        "/reports/../runs",
        "/docs",
        "/openapi.json",
    ],
)
def test_no_path_of_the_machine_is_readable(served: Served, path: str) -> None:
    status, _, content = ask(served, "GET", path)
    assert status in (403, 404) and b"root:" not in content and b"state" not in content


def test_files_of_a_run_are_readable_and_cannot_use_the_page(served: Served) -> None:
    status, headers, content = ask(served, "GET", "/runs/one/report.html")
    assert (status, content) == (200, b"<p>page</p>")
    assert headers["content-security-policy"].startswith("sandbox") and headers["x-content-type-options"] == "nosniff"
    assert ask(served, "GET", "/runs/one/run.json?download")[1]["content-disposition"].startswith("attachment")


def test_a_foreign_name_of_this_machine_is_refused(served: Served) -> None:
    assert ask(served, "GET", "/", Host="rebound.example:80")[0] == 404
    assert ask(served, "GET", "/", Host=f"localhost:{port(served)}")[0] == 200


def test_an_upload_of_200_mb_is_refused_before_it_is_read(served: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port(served), timeout=60)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", str(200 * 2**20))
    connection.endheaders(b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n')
    answer = connection.getresponse()
    assert answer.status == 413 and b"20 MB" in answer.read()
    connection.close()


def test_an_upload_of_unknown_length_ends_at_the_limit(served: Served) -> None:
    start = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    chunks = iter([start, *[bytes(2**20)] * 40])
    status, _, content = ask(
        served, "POST", "/gradio_api/upload", chunks, **{"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert status == 413 and b"maximum allowed size" in content
    assert [path for path in served.app.uploads.rglob("*") if path.is_file() and path.stat().st_size > 2**21] == []


def event(served: Served, component: str, name: str, data: list[Any]) -> str:
    """What an event of a component answers, as a browser would ask for it."""
    config = json.loads(ask(served, "GET", "/config")[2])
    ids = {each["id"] for each in config["components"] if each["type"] == component}
    chosen = next(each for each in config["dependencies"] for target in each["targets"] if target[0] in ids)
    body = json.dumps({"data": data, "fn_index": chosen["id"], "session_hash": name})
    assert ask(served, "POST", "/gradio_api/queue/join", body, **{"Content-Type": "application/json"})[0] == 200
    connection = http.client.HTTPConnection("127.0.0.1", port(served), timeout=60)
    connection.request("GET", f"/gradio_api/queue/data?session_hash={name}")
    answer = connection.getresponse()
    while line := answer.readline().decode():
        if "process_completed" in line:
            connection.close()
            return line
    raise AssertionError("no answer")


def test_no_event_reads_a_picture_that_was_not_uploaded(served: Served, tmp_path: Path) -> None:
    Image.new("RGB", (48, 32), "red").save(tmp_path / "private.png")
    file = {"path": str(tmp_path / "private.png"), "meta": {"_type": "gradio.FileData"}}
    for number, forged in enumerate((file, {**file, "url": "http://127.0.0.1:1/x.png"})):
        answer = event(served, "uploadbutton", f"forged{number}", [forged, "crop"])
        assert "data:image" not in answer and "was not uploaded here" in answer


def test_hosts_that_others_reach_are_named() -> None:
    assert [is_local(host) for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3")] == [True] * 4
    assert [is_local(host) for host in ("0.0.0.0", "::", "192.168.0.1", "name")] == [False] * 4
    with warnings.catch_warnings(), listen("127.0.0.1", 0):
        warnings.simplefilter("error")
    with pytest.warns(Notice, match="no password"), listen("0.0.0.0", 0):
        pass


def test_an_address_that_cannot_be_used_is_refused(run: Run, tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as sock, pytest.raises(InputError, match="give another --port"):
        listen("127.0.0.1", sock.getsockname()[1])
    for flags, text in (
        (["--port", "70000"], "--port must be from 0 to 65535"),
        (["--host", "192.0.2.1"], "cannot be listened on"),
        (["--rank", "0"], "rank must be"),
        (["--runs", os.devnull], "is not a directory"),
    ):
        status, _, err = run("ui", "--runs", tmp_path / "runs", *flags)
        assert status == 2 and text in err and len(err.splitlines()) == 1, err


def test_ctrl_c_ends_the_program(run: Run, models: dict[str, str], tmp_path: Path) -> None:
    flags = [part for name, value in models.items() for part in (f"--{name}", value)]
    with listen("127.0.0.1", 0) as sock:
        free = sock.getsockname()[1]
    ended = threading.Event()

    def interrupt() -> None:
        while not ended.is_set():
            try:
                connection = http.client.HTTPConnection("127.0.0.1", free, timeout=5)
                connection.request("GET", "/config")
                if connection.getresponse().status == 200:
                    os.kill(os.getpid(), signal.SIGINT)
                    return
            except OSError:
                time.sleep(0.05)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    status, out, err = run("ui", "--port", free, "--runs", tmp_path / "runs", *flags)
    ended.set()
    thread.join()
    assert status == 130, err
    assert f"Open http://127.0.0.1:{free}/ in a browser" in out and err.splitlines() == ["interrupted"]
