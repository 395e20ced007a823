"""The packaged pair knows the wordings of its families, and says so about any other prompt."""

from __future__ import annotations

import numpy as np
import pytest

from vlmteacher.microworld import world
from vlmteacher.microworld.families import FAMILIES
from vlmteacher.microworld.known_tasks import family_of, unknown_task


@pytest.mark.parametrize("name", FAMILIES)
def test_every_wording_of_a_family_is_known(name: str) -> None:
    rng, family = np.random.default_rng(0), FAMILIES[name]
    for split in ("train", "ood"):
        scene = world.sample_scene(rng, name, split)
        prompts = [text.format(**family.names(scene)) for text in family.prompts]
        if family.paraphrases:
            prompts += [family.paraphrase(scene, rng) for _ in range(20)]
        for prompt in prompts:
            assert unknown_task(prompt) is None, prompt
        assert family_of(prompts[0]) == name
        assert family_of(f"  {prompts[0].upper().rstrip('.')} ") == name


@pytest.mark.parametrize(
    "prompt",
    [
        "A cat plays piano.",
        "Move the red ball to the right.",
        "Move the pink ball into the blue box.",
        "Move the red ball into the blue box. Then sing.",
        "Move the red\x00 ball into the blue box",
        "",
    ],
)
def test_other_prompts_are_not(prompt: str) -> None:
    note = unknown_task(prompt)
    assert note and "knows 10 kinds of tasks" in note and "\n" not in note
