"""The loop of test-time optimisation and what it stands on."""

from vlmteacher.moved import moved_name


def __getattr__(name: str) -> object:
    return moved_name(__name__, name)
