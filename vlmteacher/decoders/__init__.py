"""Surrogate decoders: light networks that turn latents into frames, so that a reward's gradient can pass cheaply."""

from vlmteacher.decoders.taehv import SurrogateDecoder, check_decoder, load_decoder
from vlmteacher.moved import moved_name

__all__ = ["SurrogateDecoder", "check_decoder", "load_decoder"]


def __getattr__(name: str) -> object:
    return moved_name(__name__, name)
