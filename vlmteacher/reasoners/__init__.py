"""Reasoners: the video models that are optimised at test time."""

from vlmteacher.moved import moved_name


def __getattr__(name: str) -> object:
    return moved_name(__name__, name)
