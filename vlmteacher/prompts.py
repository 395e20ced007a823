"""Checks prompts and questions, and tokenises them so that control tokens spelled in them are read as text."""

from __future__ import annotations

import re
import warnings
from typing import Any

from vlmteacher import arguments
from vlmteacher.errors import InputError, Notice
from vlmteacher.files import check_text

CUT = "\ufdd0"  # a code point that Unicode reserves for use inside programs: no text contains it

LONGEST_PROMPT = 50_000  # characters; text encoders take 512 tokens, and tokenising a megabyte takes minutes
SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f][\"'\u201d\u2019)\]]*(?=\s|$)|[\u3002\uff01\uff1f]")
BRACKETS = {*"<>[]{}|"}  # in an added word they mark a control token; words of a domain have none


def check_prompt(prompt: str) -> None:
    """Raise InputError for an empty prompt, one of more than `LONGEST_PROMPT` characters, or one that is not text."""
    if arguments.is_blank(arguments.text("prompt", prompt)):
        raise InputError("the prompt is empty: say what the video must show")
    check_text(prompt, "the prompt", LONGEST_PROMPT)


def whole_sentences(text: str) -> str:
    """The whole sentences that a text begins with; a text without the end of a sentence is returned unchanged."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else text


def quote(tokenizer: Any, text: str) -> str:
    """Return `text` with a mark inside every control token, so that `encode` reads its letters.

    Control tokens end turns, stand for images or open thoughts: the tokenizer's special tokens, and the words in
    brackets that were added to its vocabulary. Text without any is returned unchanged. Raises InputError for a text
    that contains the mark itself.
    """
    if CUT in text:
        raise InputError(f"the text contains {ascii(CUT)[1:-1]}, which is no character: remove it")
    control = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special or BRACKETS & {*str(t)}]
    control = sorted((token for token in control if len(token.strip()) > 1), key=len, reverse=True)
    if not control:
        return text
    # A lookahead, because one token may begin inside another.
    return re.sub(f"(?=({'|'.join(map(re.escape, control))}))(.)", rf"\2{CUT}", text, flags=re.DOTALL)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, parts of which went through `quote`, without added special tokens."""
    return [
        i for part in text.split(CUT) for i in tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    ]


def tokenize(tokenizer: Any, text: str, limit: int) -> Any:
    """Tokenise a text as diffusers does for a T5, padded or cut to `limit` tokens; control tokens in it are text."""
    keywords = {"padding": "max_length", "max_length": limit, "truncation": True, "return_tensors": "pt"}
    return tokenizer(_spaced(tokenizer, text), **keywords)


def _spaced(tokenizer: Any, text: str) -> str:
    # A T5's control tokens are words of its vocabulary too: only split in two words they are read as text.
    return quote(tokenizer, text).replace(CUT, " ")


def check_cut(tokenizer: Any, text: str | list[int], limit: int, what: str) -> dict[str, int]:
    """Return {what: the number of tokens beyond `limit`}, which the text encoder drops; {} if there are none.

    A notice quotes the last words that are kept. text: as `tokenize` takes it, or the token ids of a chat.
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
