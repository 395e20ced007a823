"""Surrogate decoders: light networks that turn latents into frames, so that a reward's gradient can pass cheaply."""

from vlmteacher.decoders.taehv import TinyVideoDecoder, check_decoder, load_decoder

__all__ = ["TinyVideoDecoder", "check_decoder", "load_decoder"]
