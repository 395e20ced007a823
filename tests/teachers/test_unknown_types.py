"""Checkpoints that cannot be Teachers: each is refused in one line that says what it lacks and what is known."""

import json

import pytest

from vlmteacher.errors import InputError
from vlmteacher.teachers import base, load_teacher

PICTURES = ("llava", "idefics3", "paligemma", "gemma3")
TEXTS = ("llama", "qwen3", "qwen3_5_text")
OTHERS = ("video_llava", "internvl_chat", "nonsense", None, ["qwen3_vl"], 7)  # see videos, or are not known at all
REASONS = dict.fromkeys(PICTURES, "sees pictures but no videos: it ") | dict.fromkeys(TEXTS, "sees no pictures: it ")


@pytest.mark.parametrize("model_type", [*PICTURES, *TEXTS, *OTHERS], ids=str)
def test_it_is_refused_in_one_line(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(InputError) as caught:
        load_teacher(tmp_path)
    reason = REASONS.get(model_type, "") if isinstance(model_type, str) else ""
    known = ", ".join(base.FAMILIES)
    assert str(caught.value) == (
        f"teacher {str(tmp_path)!r} {reason}is of the model type {model_type!r}; known types: {known}: "
        "take a VLM that sees videos"
    )
