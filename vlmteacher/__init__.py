"""Test-time optimisation of video generation models by a vision-language model that only looks (arXiv 2606.02564)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmteacher import moved  # noqa: F401  registers the old import paths
from vlmteacher.errors import InputError, MissingExtra

if TYPE_CHECKING:
    from vlmteacher.pipeline import TeacherPipeline, TeacherPipelineOutput
    from vlmteacher.queries import QuerySet

__version__ = "0.1.0"
__all__ = ["InputError", "MissingExtra", "QuerySet", "TeacherPipeline", "TeacherPipelineOutput"]

_HOMES = {"TeacherPipeline": "pipeline", "TeacherPipelineOutput": "pipeline", "QuerySet": "queries"}


def __getattr__(name: str) -> Any:
    # torch and its friends take seconds to import: only when they are asked for.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
