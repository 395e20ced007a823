"""`vlmteacher lora push` against a hub on this machine, which takes what huggingface_hub sends."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run

ROOT = Path(__file__).parents[2]


class Hub(BaseHTTPRequestHandler):
    """The calls of an upload: the card's check, the repository, which files are large, the commit."""

    received: dict[str, Any]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status, answer = 200, {}
        if self.path == "/api/validate-yaml":
            self.received["card"] = json.loads(body)["content"]
            answer = {"errors": [], "warnings": []}
        elif self.path == "/api/repos/create":
            if json.loads(body)["name"] == "forbidden":
                status, answer = 400, {"error": "you may not"}
            self.received["private"] = (
                json.loads(body).get("private") or json.loads(body).get("visibility") == "private"
            )
            answer = answer or {"url": f"http://{self.headers['Host']}/me/lora", "name": "me/lora", "id": "1"}
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            answer = {"files": files}
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.received["files"][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            answer = {"commitUrl": f"http://{self.headers['Host']}/me/lora/commit/abc", "commitOid": "abc"}
        self._answer(status, answer)

    def do_GET(self) -> None:
        self._answer(200, {"id": "me/lora", "sha": "abc", "siblings": [], "private": False, "tags": []})

    do_HEAD = do_GET

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, Any]]]:
    received: dict[str, Any] = {"files": {}}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Hub,), {"received": received}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()


def push(endpoint: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its endpoint when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_x", "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "vlmteacher", "lora", "push", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_run_folder_is_pushed(run: Run, solve: Any, tmp_path: Path, hub: tuple[str, dict[str, Any]]) -> None:
    endpoint, received = hub
    folder = tmp_path / "run"
    assert run(*solve(out=folder, max_steps=1))[0] == 0
    done = push(endpoint, folder, "me/lora", "--private")
    assert done.returncode == 0, done.stderr
    assert f"{endpoint}/me/lora/commit/abc" in done.stdout
    assert sorted(received["files"]) == ["README.md", "after.mp4", "before.mp4", "lora.safetensors", "queries.json"]
    assert received["files"]["lora.safetensors"] == (folder / "lora.safetensors").read_bytes()
    assert received["card"] == (folder / "README.md").read_text() and received["private"]
    done = push(endpoint, folder, "me/forbidden")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_folder_without_a_run_is_refused(run: Run, tmp_path: Path) -> None:
    status, out, err = run("lora", "push", tmp_path, "me/lora")
    assert (status, out) == (2, "") and "is no folder of a finished run: it has no lora.safetensors" in err
