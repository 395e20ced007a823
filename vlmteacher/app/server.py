"""The server of the page: on this machine alone by default, and with nothing to read but what the page shows."""

from __future__ import annotations

import os
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from vlmteacher.errors import InputError, MissingExtra, Notice
from vlmteacher.files import make_folder
from vlmteacher.settings import Keywords

if TYPE_CHECKING:
    from fastapi import FastAPI

    from vlmteacher.app.service import Service
    from vlmteacher.pipeline import TeacherPipeline

UPLOAD_LIMIT = 20 * 2**20  # bytes of a first frame
REQUEST_LIMIT = UPLOAD_LIMIT + 2**21  # bytes of any request; Gradio itself ends an upload at its limit, and tidies up
TOO_LARGE = f"at most {UPLOAD_LIMIT // 2**20} MB are taken: give a smaller file"
LOCAL = ("localhost", "127.0.0.1", "[::1]")
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self';"
    " frame-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)  # Gradio's page has inline scripts and compiles its templates
REPORT_POLICY = "sandbox allow-scripts allow-downloads; frame-ancestors 'self'"  # a report has its own policy beside it
NEEDED = (
    *("/assets/", "/static/", "/runs/", "/reports/"),
    *("/gradio_api/queue/", "/gradio_api/upload", "/gradio_api/heartbeat/", "/gradio_api/startup-events"),
)
PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/gradio_api/cancel")
"""The routes that the page needs, by their beginnings, and whole ones. Gradio has others, which read files, fetch
addresses or list the API: they do not exist here."""


def is_local(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket on this address; port 0 is a free one. Raises InputError, and warns of a host that others reach."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(f"--host {host} --port {port} cannot be listened on ({why}): give another --port") from error
    if not is_local(host):
        warnings.warn(
            f"--host {host}: everybody who reaches this machine can use the models, and see and stop all runs; there is"
            " no password",
            Notice,
            stacklevel=2,
        )
    return sock


def import_gradio() -> None:
    """Import Gradio, which must send nothing to anybody. Raises MissingExtra."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise MissingExtra("vlmteacher ui needs the package gradio: pip install 'vlmteacher[ui]'") from error


@dataclass
class Served:
    """A server at work. url: of its page; thread: it ends with the server."""

    url: str
    thread: threading.Thread
    app: Service


@contextmanager
def serve(
    pipe: TeacherPipeline,
    sock: socket.socket,
    runs: Path,
    settings: Keywords | None = None,
    calls: dict[str, Any] | None = None,
    host: str = "127.0.0.1",
) -> Iterator[Served]:
    """Serve the page of these models inside the block; at its end the run at work stops and keeps its state.

    sock: see `listen`. runs: the folder of all runs. settings, calls: keywords of every call. Raises MissingExtra,
    and OutputError where the folder cannot be made.
    """
    import_gradio()
    make_folder(runs)
    with TemporaryDirectory(prefix="vlmteacher-ui-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        import uvicorn

        from vlmteacher.app.examples import packaged_examples
        from vlmteacher.app.folders import Runs
        from vlmteacher.app.jobs import Worker
        from vlmteacher.app.service import Service

        packaged = pipe.models["reasoner"].startswith("packaged/")
        examples = packaged_examples() if packaged else []
        app = Service(Worker(pipe), Runs(runs), examples, settings or {}, calls or {}, Path(uploads))
        config = uvicorn.Config(
            _application(app, is_local(host)),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=1,
            ws="none",
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([sock],), name="vlmteacher-ui", daemon=True)
        thread.start()
        name, port = sock.getsockname()[:2]
        shown = f"[{name}]" if ":" in name else name
        try:
            yield Served(f"http://{shown}:{port}/", thread, app)
        finally:
            app.worker.close()
            server.should_exit = True
            thread.join(5)
            sock.close()


def _application(app: Service, local: bool) -> Any:
    """The page and the files of its runs, behind `_guarded`."""
    import gradio as gr
    from fastapi import FastAPI
    from fastapi.responses import FileResponse, HTMLResponse, Response

    from vlmteacher.app.folders import PUBLIC
    from vlmteacher.app.page import build
    from vlmteacher.app.views import style
    from vlmteacher.runs.pages import source

    web = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def run_file(request: Any) -> Any:
        name, file = request.path_params["name"], request.path_params["file"]
        path = app.runs.file(name, file)
        if path is None:
            return Response("there is no such file", 404)
        kind = "attachment" if "download" in request.query_params else "inline"
        headers = {"Content-Security-Policy": REPORT_POLICY, "Cache-Control": "no-cache"}
        return FileResponse(path, 200, headers, PUBLIC[file], filename=file, content_disposition_type=kind)

    def report(request: Any) -> Any:
        if (text := app.reports.get(request.path_params["key"])) is None:
            return Response("this report is no longer kept: make it again", 404)
        headers = {"Content-Security-Policy": REPORT_POLICY}
        if "download" in request.query_params:
            headers["Content-Disposition"] = 'attachment; filename="sweeps.html"'
        return HTMLResponse(text, headers=headers)

    web.add_route("/runs/{name:path}/{file}", run_file)
    web.add_route("/reports/{key}", report)
    font = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif"]
    gr.mount_gradio_app(
        web,
        build(app),
        path="/",
        theme=gr.themes.Base(
            primary_hue="indigo", neutral_hue="zinc", font=font, font_mono=["ui-monospace", "Consolas", "monospace"]
        ),
        head=f"<style>{source('shared.css')}{style()}</style>",  # Gradio's own `css` loses the rules of media
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=UPLOAD_LIMIT,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
    )
    return _guarded(web, local)


def _guarded(web: FastAPI, local: bool) -> Any:
    """The application without the routes that the page does not need, for local names alone, with a policy.

    A foreign name of this machine (of a page that has its own name point here) is refused.
    """

    from fastapi import HTTPException

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await web(scope, receive, send)
            return
        headers = dict(scope.get("headers", ()))
        name = headers.get(b"host", b"").decode("latin-1").lower()
        name = name[: name.rindex("]") + 1] if "]" in name else name.partition(":")[0]
        path = scope["path"]
        needed = path in PAGES or path.startswith(NEEDED)
        if scope["type"] != "http" or not needed or ".." in path or (local and name not in LOCAL):
            await _refuse(send, 404, "there is nothing here")
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > REQUEST_LIMIT:
            await _refuse(send, 413, TOO_LARGE)
            return
        read = 0

        async def limited() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > REQUEST_LIMIT:
                raise HTTPException(413, TOO_LARGE)
            return message

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                known = {key.lower() for key, _ in message["headers"]}
                extra = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
                if b"content-security-policy" not in known:
                    extra.append((b"content-security-policy", POLICY.encode()))
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await web(scope, limited, with_policy)

    return guarded


async def _refuse(send: Any, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
