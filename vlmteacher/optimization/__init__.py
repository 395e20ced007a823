"""Test-time optimisation: the objective, the engines that run it, and the loop."""

from vlmteacher.moved import moved_name


def __getattr__(name: str) -> object:
    return moved_name(__name__, name)
