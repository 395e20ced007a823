"""The LoRA of one instance: its layers, and the files of LoRAs."""

from vlmteacher.moved import moved_name


def __getattr__(name: str) -> object:
    return moved_name(__name__, name)
