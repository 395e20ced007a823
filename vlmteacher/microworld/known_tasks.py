"""Which prompts the packaged models know: the wordings of the ten families of tasks, and no others."""

from __future__ import annotations

import re
import string
from functools import cache

from vlmteacher.microworld.families import FAMILIES
from vlmteacher.microworld.scene import COLORS

_COLOR = f"(?:{'|'.join(COLORS)})"
_BOX = f"the {_COLOR} box"
_NAMES = {"order": f"{_BOX}(?:, then {_BOX})*"}  # what fills the braces of a wording, where it is not a colour


def family_of(prompt: str) -> str | None:
    """The name of the family one of whose wordings the prompt is, whatever its case and last full stop, or None."""
    text = " ".join(prompt.split()).rstrip(".").lower()
    return next((name for name, pattern in _patterns().items() if pattern.fullmatch(text)), None)


def unknown_task(prompt: str) -> str | None:
    """What the packaged pair knows, in one line, where the prompt is outside of its families; else None."""
    if family_of(prompt) is not None:
        return None
    example = FAMILIES["move"].prompts[0].format(ball="red", box="blue")
    return (
        f"the packaged pair knows {len(FAMILIES)} kinds of tasks ({', '.join(FAMILIES)}) in the wordings of"
        f" docs/internals/microworld.md, and this prompt is none of them: its questions and answers mean little. Write"
        f' one like "{example}", or give a Reasoner and a Teacher of your own'
    )


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    return {
        name: re.compile(
            "|".join(
                _pattern(text.replace("{ending}", ending))
                for text in (*family.prompts, *family.paraphrases)
                for ending in family.endings
            )
        )
        for name, family in FAMILIES.items()
    }


def _pattern(wording: str) -> str:
    parts = string.Formatter().parse(wording.rstrip(".").lower())
    return "".join(re.escape(text) + (_NAMES.get(name, _COLOR) if name else "") for text, name, _, _ in parts)
