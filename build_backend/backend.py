"""setuptools' build backend, which may look at the torch of the environment that the package is installed into.

An isolated build sees only its own requirements, and asking for torch there would fetch a second one (gigabytes). So
the environment's site-packages are appended to sys.path, and torch is asked for only when it is not there. The other
build tools are asked for only when the machine has none of its own.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (the hooks of PEP 517 that stay as they are)
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def _see_the_environment() -> None:
    site = sysconfig.get_path("purelib")
    if importlib.util.find_spec("torch") is None and site not in sys.path:
        sys.path.append(site)


def _requirements() -> list[str]:
    _see_the_environment()
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return []  # nothing can be compiled: fetch nothing for it
    wanted = []
    if importlib.util.find_spec("torch") is None:
        pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text()
        wanted += re.findall(r'"(torch>=[^"]+)"', pyproject)
    if shutil.which("cmake") is None:
        wanted.append("cmake")
    if shutil.which("ninja") is None and shutil.which("make") is None:
        wanted.append("ninja")
    return wanted


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _requirements()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _requirements()


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    _see_the_environment()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    _see_the_environment()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
