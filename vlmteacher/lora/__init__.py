"""LoRA: adding it to a transformer, its fused layers, its files."""

from vlmteacher.moved import moved_name


def __getattr__(name: str) -> object:
    return moved_name(__name__, name)
