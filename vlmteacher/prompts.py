"""Prompts and questions: checked, read as text whatever control tokens they spell, and told where they are cut off."""

from __future__ import annotations

import re
import warnings
from typing import Any

from vlmteacher import arguments
from vlmteacher.errors import InputError, Notice
from vlmteacher.files import check_text

CUT = "\ufdd0"  # a code point that Unicode keeps for such uses inside of programs: no text holds it

LONGEST_PROMPT = 50_000  # characters; text encoders take 512 tokens, and tokenising a megabyte takes minutes
BRACKETS = {*"<>[]{}|"}  # of a control token; an added word of a domain has none


def check_prompt(prompt: str) -> None:
    """Raise InputError for a prompt that says nothing, or is no text."""
    if not arguments.text("prompt", prompt).strip():
        raise InputError("the prompt is empty: say what the video must show")
    check_text(prompt, "the prompt", LONGEST_PROMPT)


def quote(tokenizer: Any, text: str) -> str:
    """Return `text` with a mark inside of every control token, so that `encode` reads its letters and no token.

    Control tokens end turns, stand for images, open thoughts: the tokenizer's special tokens, and what was added to its
    vocabulary in brackets. Text without any is returned as it is. Raises InputError for a text that holds the mark
    itself.
    """
    if CUT in text:
        raise InputError(f"the text holds {ascii(CUT)[1:-1]}, which is no character: remove it")
    control = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special or BRACKETS & {*str(t)}]
    control = sorted((token for token in control if len(token.strip()) > 1), key=len, reverse=True)
    if not control:
        return text
    # A lookahead, for one token may begin inside of another.
    return re.sub(f"(?=({'|'.join(map(re.escape, control))}))(.)", rf"\2{CUT}", text, flags=re.DOTALL)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, of which parts went through `quote`; nothing is added to it."""
    return [
        i for part in text.split(CUT) for i in tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    ]


def tokenize(tokenizer: Any, text: str, limit: int) -> Any:
    """A text as diffusers gives it to a T5, padded or cut to `limit` tokens; control tokens in it are text."""
    keywords = {"padding": "max_length", "max_length": limit, "truncation": True, "return_tensors": "pt"}
    return tokenizer(_spaced(tokenizer, text), **keywords)


def _spaced(tokenizer: Any, text: str) -> str:
    # A T5 has its control tokens among its words too: only as two words they are text.
    return quote(tokenizer, text).replace(CUT, " ")


def check_cut(tokenizer: Any, text: str | list[int], limit: int, what: str) -> dict[str, int]:
    """{what: tokens} that a text encoder of `limit` tokens does not get, {} if none; a notice tells where it stops.

    text: as `tokenize` takes it, or the ids of a chat.
    """
    ids = tokenizer(_spaced(tokenizer, text), verbose=False)["input_ids"] if isinstance(text, str) else text
    lost = len(ids) - limit
    if lost <= 0:
        return {}
    kept = " ".join(tokenizer.decode(ids[: limit - 1], skip_special_tokens=True).split())[-60:]
    warnings.warn(
        f"the {what.replace('_', ' ')} has {len(ids)} tokens, and the Reasoner's text encoder takes {limit}: {lost} are"
        f" lost after {kept!r}; shorten it, for the Teacher reads all of it",
        Notice,
        stacklevel=3,
    )
    return {what: lost}
