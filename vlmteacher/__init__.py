"""Test-time optimisation of video generators by a frozen vision-language model (arXiv 2606.02564)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmteacher import moved  # noqa: F401  registers the old import paths
from vlmteacher.errors import InputError, MissingExtra
from vlmteacher.version import __version__

if TYPE_CHECKING:
    from vlmteacher.microworld.example import packaged_example
    from vlmteacher.output import TeacherPipelineOutput
    from vlmteacher.pipeline import TeacherPipeline
    from vlmteacher.queries import QuerySet

__all__ = [
    "InputError",
    "MissingExtra",
    "QuerySet",
    "TeacherPipeline",
    "TeacherPipelineOutput",
    "__version__",
    "packaged_example",
]

_HOMES = {
    "TeacherPipeline": "pipeline",
    "TeacherPipelineOutput": "output",
    "QuerySet": "queries",
    "packaged_example": "microworld.example",
}


def __getattr__(name: str) -> Any:
    # imported on first use: torch, diffusers and transformers take seconds to import
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
