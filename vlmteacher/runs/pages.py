"""Self-contained HTML pages: the templates, and videos and pictures as data URLs."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmteacher.errors import OutputError
from vlmteacher.media import data_url, shrink_video
from vlmteacher.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def environment(*packages: str) -> Environment:
    """The templates of this package, and before it of others.

    Everything is escaped, also in .css and .js, which hold no values.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader(package) for package in (*packages, "vlmteacher.runs")])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def source(name: str) -> str:
    """The text of a template file."""
    templates = environment()
    assert templates.loader is not None
    return templates.loader.get_source(templates, name)[0]


def page(template: str, **values: Any) -> str:
    """The page of a template. Text in `values` is shown as text.

    The page may load nothing, and runs the one script of `templates/page.js`, whose hash is in its security policy.
    """
    templates, style, script = environment(), source("shared.css") + source("page.css"), source("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return templates.get_template(template).render(
        **values, style=style, script=script, script_hash=digest, version=__version__
    )


def video_url(path: Path, limit: int, width: int | None = None) -> str | None:
    """A video as a data URL of at most `limit` bytes, recoded where it is larger; None where that is not possible.

    width: in pixels at most, where it is recoded.
    """
    try:
        data = path.read_bytes()
        room = limit * 3 // 4 - 30  # of bytes before they are coded in base64
        if len(data) > room:
            data = shrink_video(path, room, width)
    except (OSError, OutputError):
        return None
    return data_url("video/mp4", data) if data else None


def image_url(path: Path) -> str | None:
    """A WebP file as a data URL; None where it cannot be read."""
    try:
        return data_url("image/webp", path.read_bytes())
    except OSError:
        return None
